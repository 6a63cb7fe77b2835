"""CUDA kernels by NVRTC: compiled for any GPU without one, and kept in the user's cache."""

import ctypes
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dflkern.cpu.compiler import sources
from dflkern.gpu import plan
from dflkern.gpu.cuda import loading, nvrtc
from dflkern.gpu.offline import compile_plan
from dflkern.library import BuildError
from dflkern.problem import describe
from emulation import Case, compiles, run_case

ROOT = Path(__file__).parents[2]
KERNEL = "general_backward<fp64, Layout::rows>"
pytestmark = pytest.mark.skipif(
    compiles("cuda") is not None, reason=f"no NVRTC: {compiles('cuda')}"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that are compiled from here on."""
    kernels, compile_kernel = [], nvrtc.compile_kernel

    def noted(kernel, arch):
        kernels.append((kernel, arch))
        return compile_kernel(kernel, arch)

    monkeypatch.setattr(nvrtc, "compile_kernel", noted)
    return kernels


def test_a_plan_is_compiled_for_a_gpu_that_is_not_there():
    problem = describe((999, 16), (16, 1), torch.float64, torch.device("cuda"), 1, margin=0.01)
    made = plan("dfl_loss_backward", problem, "cuda")
    assert made.kernel == KERNEL
    done = compile_plan(made, 80)
    assert "general_backward" in done.entry
    assert re.findall(r"\.entry (\w+)", done.ptx) == [done.entry]
    assert ".target sm_80" in done.ptx
    assert not re.search(r"\b(atom|red)\.", done.ptx)
    assert done.cubin.startswith(b"\x7fELF")
    assert done.entry.encode() in done.cubin
    assert done.shared == made.shared == 128 * 17 * 8


@pytest.mark.parametrize("arch", nvrtc.archs() if compiles("cuda") is None else ())
def test_every_architecture_of_the_compiler(arch):
    entry, ptx, cubin = nvrtc.compile_kernel("rows_backward<bf16, 8, What::loss>", arch)
    assert f".target sm_{arch}" in ptx
    assert entry.encode() in cubin


def test_kernels_include_nothing_outside_csrc():
    """NVRTC has no other headers; whether csrc's suffice, compiling shows."""
    for path in (sources() / "cuda").iterdir():
        for name in re.findall(r"#\s*include\s*(\S+)", path.read_text()):
            assert (sources() / "cuda" / name.strip('"')).exists() or (
                sources() / name.strip('"')
            ).exists(), path


def test_bf16_is_rounded_in_software_where_the_gpu_cannot():
    op = "dfl_loss_and_decode_backward"
    for layout in ("rows", "columns"):
        case = Case(op, backend="cuda", arch=75, dtype="bf16", layout=layout, special=True)
        assert run_case(case).faults == ()


def test_a_broken_source_is_told_with_the_compilers_message(tmp_path, monkeypatch):
    shutil.copytree(sources(), tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / "rows.cu"
    path.write_text(path.read_text().replace("const int thread = threadIdx.x", "thread"))
    monkeypatch.setattr(nvrtc, "sources", lambda: tmp_path / "csrc")
    with pytest.raises(BuildError, match=r'rows\.cu\(\d+\): error: .*"thread"'):
        nvrtc.compile_kernel("rows_forward<fp32, 16, What::loss>", 90)


def test_without_nvrtc(monkeypatch):
    def missing(path):
        raise OSError(f"{path}: cannot open shared object file")

    for name in ("_library", "version"):
        monkeypatch.setattr(nvrtc, name, getattr(nvrtc, name).__wrapped__)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    major = torch.version.cuda.partition(".")[0]
    with pytest.raises(BuildError, match=f"libnvrtc.so.{major} was not found: a build of PyTorch"):
        nvrtc.version()
    assert "was not found" in loading.describe()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build of PyTorch for CUDA brings it" in loading.refusals()[0]


def test_nvrtc_is_found_beside_pytorch():
    """In a process where PyTorch has not loaded it, as if its own search had failed."""
    code = (
        "import ctypes, sys, pathlib, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from dflkern.gpu.cuda import nvrtc\n"
        "by_path, load = [], ctypes.CDLL\n"
        "def search(name):\n"
        "    if '/' not in name: raise OSError(name)\n"
        "    by_path.append(pathlib.Path(name).name.split('.')[0])\n"
        "    return load(name)\n"
        "ctypes.CDLL = search\n"
        "print(len(nvrtc.archs()), *by_path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.split()[0] == "0":
        pytest.skip("PyTorch keeps NVRTC elsewhere")
    assert done.stdout.split() == [str(len(nvrtc.archs())), "libnvrtc-builtins", "libnvrtc"]


def test_pytorch_for_cpus_refuses_with_a_sentence():
    python = os.environ.get("DFLKERN_OTHER_PYTHON")
    if not python:
        pytest.skip("DFLKERN_OTHER_PYTHON, a Python with another PyTorch, is not set")
    code = "import torch, dflkern.gpu.cuda.loading as c; print(torch.version.cuda, c.refusals())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if not done.stdout.startswith("None"):
        pytest.skip("the other PyTorch is built for CUDA")
    assert "has no NVRTC: a build of PyTorch for CUDA brings it" in done.stdout


def test_a_kernel_is_compiled_once(cache, compiled, capfd):
    found = loading.obtain(KERNEL, 90)
    assert compiled == [(KERNEL, 90)]
    assert found.path.is_relative_to(cache)
    assert stat.S_IMODE(found.path.parent.stat().st_mode) == 0o700
    manifest = json.loads(found.path.with_name(f"{found.path.name}.json").read_text())
    assert (manifest["kernel"], manifest["arch"]) == (KERNEL, 90)
    assert manifest["entry"].encode() in found.path.read_bytes()
    again = loading.obtain(KERNEL, 90)
    assert len(compiled) == 1
    assert again == found
    assert loading.obtain(KERNEL, 80).path != found.path
    assert loading.obtain("probe", 90).path.parent != found.path.parent
    assert len(compiled) == 3
    assert capfd.readouterr().err == ""  # nothing is announced that takes so little time


def test_a_damaged_kernel_is_compiled_again(cache, compiled):
    found = loading.obtain("probe", 90)
    content = found.path.read_bytes()
    for damage in (content[:-1], content[:-1] + b"\1", b""):
        found.path.write_bytes(damage)
        assert loading.obtain("probe", 90).path.read_bytes() == content
    assert len(compiled) == 4


def test_a_cache_that_cannot_be_written(tmp_path, compiled, monkeypatch):
    """The folder for temporary files takes its place."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for _ in range(2):
        assert loading.obtain("probe", 90).path.is_relative_to(tmp_path / "tmp")
    assert len(compiled) == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="name another folder in the environment variable"):
        loading.obtain("probe", 90)


def test_another_compiler_or_source_is_another_key(monkeypatch):
    key = nvrtc.key.__wrapped__
    before = key("cuda/rows.cu")
    assert before == key("cuda/rows.cu") != key("cuda/columns.cu")
    monkeypatch.setattr(nvrtc, "version", lambda: "12.6")
    assert key("cuda/rows.cu") != before


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), 90), ((8, 6), 86), ((8, 8), 80), ((10, 3), 100)]
)
def test_the_architecture_that_a_gpu_runs(capability, arch, monkeypatch):
    monkeypatch.setattr(nvrtc, "archs", lambda: (75, 80, 86, 89, 90, 100) if arch != 80 else (80,))
    assert loading.choose_arch(capability) == arch


@pytest.mark.parametrize("capability", [(7, 0), (12, 0)])
def test_a_gpu_that_the_compiler_does_not_know(capability, monkeypatch):
    monkeypatch.setattr(nvrtc, "archs", lambda: (75, 80, 90))
    name = "sm_{}{}".format(*capability)
    with pytest.raises(BuildError, match=f"does not compile for {name}; it knows sm_75, sm_80, sm"):
        loading.choose_arch(capability)


def test_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in loading.refusals()[0]
