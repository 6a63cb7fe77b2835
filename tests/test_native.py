"""Building, finding, trusting and loading the CPU library."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

import dflkern
from dflkern import cache, compiler, native
from dflkern.__main__ import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the library is built on POSIX systems")

CALL = """
import sys, warnings, torch, dflkern
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = dflkern.dfl_loss(torch.zeros(4, 16), torch.ones(4))
assert abs(loss[0].item() - 2.7725887) < 1e-6
from dflkern import native
print(len([w for w in seen if "dflkern" in str(w.message)]))
print(*[w.message for w in seen if "dflkern" in str(w.message)])
print(native.describe())
"""


def call(cache, **environment):
    """Three calls in a process of its own: its warnings, their words, and the library's state."""
    environment = {**os.environ, "DFLKERN_CACHE": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, check=False,
        env={k: v for k, v in environment.items() if v},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warned, words, state = done.stdout.splitlines()
    return int(warned), words, state, done.stderr


DEFINE = "import torch\nkeep = torch.library.Library('dflkern', 'DEF')\n"  # what ops.py does first


@pytest.fixture
def built():
    """The path of this process's library."""
    if not native.load():
        pytest.skip(f"no CPU library: {native.describe()}")
    return native._State.path


def fake_compiler(folder, body):
    """A compiler that logs its calls and then runs body."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{body}\n')
    path.chmod(0o700)
    return path


def calls_of(folder):
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if "--version" not in line]


def test_eight_processes_build_once(tmp_path):
    logged = fake_compiler(tmp_path, f'exec {compiler.find_compiler()} "$@"')
    cache = tmp_path / "cache"
    environment = {**os.environ, "DFLKERN_CACHE": str(cache), "CXX": str(logged)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CALL], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]  # fmt: skip
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, results
    assert len([line for line in calls_of(tmp_path) if "-shared" in line]) == 1
    assert sum("building its CPU kernels" in errors for _, errors in results) == 1
    assert all("loaded from" in output for output, _ in results)
    (folder,) = cache.glob("*/")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.glob("build-*"))


def test_a_broken_compiler_is_tried_once_and_warned_of(tmp_path):
    broken = fake_compiler(tmp_path, 'echo "fatal error: it is broken" >&2; exit 1')
    cache = tmp_path / "cache"
    warned, words, state, errors = call(cache, CXX=str(broken))
    assert warned == 1
    assert "it is broken" in words
    assert "run on the reference" in words
    assert "python -m dflkern build" in words
    assert "it is broken" in state
    tried = len(calls_of(tmp_path))
    assert tried > 0
    warned, words, state, errors = call(cache, CXX=str(broken))
    assert warned == 1
    assert "remembered from an earlier attempt" in words
    assert "building" not in errors
    assert len(calls_of(tmp_path)) == tried


def test_no_compiler(tmp_path):
    warned, words, _, _ = call(tmp_path / "cache", CXX="no-such-compiler")
    assert warned == 1
    assert "no C++ compiler was found (looked for no-such-compiler)" in words
    assert "apt install g++" in words


def test_a_named_backend_raises_with_the_reason(tmp_path):
    code = "import torch, dflkern; dflkern.use_backend('cpu'); dflkern.dfl_decode(torch.ones(4, 8))"
    environment = {**os.environ, "CXX": "no-such-compiler", "DFLKERN_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert '"cpu" was asked for and cannot serve this call: no C++ compiler' in done.stderr


def test_read_only_home(tmp_path):
    """A home that cannot be written to: the build goes to a folder of the user's own in /tmp."""
    environment = {"XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": str(tmp_path), "DFLKERN_CACHE": ""}
    warned, _, state, _ = call("", **environment)
    assert warned == 0
    assert state.startswith(f"loaded from {tmp_path}/dflkern-{os.getuid()}/")
    assert stat.S_IMODE((tmp_path / f"dflkern-{os.getuid()}").stat().st_mode) == 0o700


def test_a_cache_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path))
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(compiler.BuildError, match=f"belongs to user {mine}, not to {mine + 1}"):
        cache.folder("name")
    monkeypatch.undo()
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(compiler.BuildError, match="others can write to"):
        cache.folder("name")
    tmp_path.chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path / "link"))
    with pytest.raises(compiler.BuildError, match="or is a link"):
        cache.folder("name")


def test_a_library_of_somebody_else_is_not_loaded(tmp_path, monkeypatch):
    library = tmp_path / native.LIBRARY
    library.write_bytes(b"not ours")
    library.chmod(0o666)
    with pytest.raises(compiler.BuildError, match="others can write to"):
        native._cached(tmp_path)


def test_another_cpu_or_source_or_compiler_is_another_build(monkeypatch, tmp_path):
    """A home shared by machines: a build for AVX-512 must not meet a CPU without it."""
    chosen = compiler.find_compiler()
    keys = {compiler.key(chosen)}
    monkeypatch.setattr(compiler, "cpu_features", lambda: ("avx2",))
    keys.add(compiler.key(chosen))
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "compiler_version", lambda path: "another")
    keys.add(compiler.key(chosen))
    monkeypatch.undo()
    copy = tmp_path / "csrc"
    copy.mkdir()
    for path in compiler.sources().glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "run.cpp").write_text("// changed\n")
    monkeypatch.setattr(compiler, "sources", lambda: copy)
    keys.add(compiler.key(chosen))
    assert len(keys) == 4


def test_prebuilt_for_this_kind_of_machine(tmp_path, monkeypatch, capsys):
    out = tmp_path / "lib"
    assert main(["build", "--out", str(out)]) == 0
    assert str(out / native.LIBRARY) in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["abi"] == "2.10"
    monkeypatch.setattr(native, "PREBUILT", out)
    assert native._prebuilt() == out / native.LIBRARY
    code = (
        "import sys, torch\ntorch.ops.load_library(sys.argv[1])\n"
        "z = torch.zeros(9, 16, dtype=torch.bfloat16)\n"
        "print(torch.ops.dflkern._cpu_dfl_decode(z, None, 1).sum().item())"
    )
    for python in filter(None, (sys.executable, os.environ.get("DFLKERN_OTHER_PYTHON"))):
        done = subprocess.run(
            [python, "-c", DEFINE + code, str(out / native.LIBRARY)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == "67.5", done.stderr
    monkeypatch.setattr(compiler, "cpu_features", lambda: ("sse2",))
    if manifest["features"]:
        assert native._prebuilt() is None


def test_one_build_under_two_torch_versions(built):
    """The library of this torch, loaded and run by another torch."""
    other = os.environ.get("DFLKERN_OTHER_PYTHON")
    if not other:
        pytest.skip("DFLKERN_OTHER_PYTHON names no Python with another torch")
    code = (
        "import sys\n" + DEFINE + "torch.ops.load_library(sys.argv[1])\n"
        "z = torch.arange(32.0).view(2, 16)\n"
        "t = torch.tensor([3.25, 14.0])\n"
        "loss = torch.ops.dflkern._cpu_dfl_loss(z, t, None, 1, 0.01)\n"
        "grad = torch.ops.dflkern._cpu_dfl_loss_backward(torch.ones(2), z, t, None, 1, 0.01)\n"
        "print(torch.__version__, loss.tolist(), grad.sum().item())"
    )
    outputs = [
        subprocess.run([python, "-c", code, str(built)], capture_output=True, text=True, check=True)
        .stdout.strip()
        .split(" ", 1)
        for python in (sys.executable, other)
    ]
    assert outputs[0][0] != outputs[1][0]
    assert outputs[0][1] == outputs[1][1]


def test_describe_without_building(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(native._State, "path", None)
    monkeypatch.setattr(native._State, "reason", None)
    assert native.describe().startswith("to be built at the first call, with ")
    assert not list(tmp_path.glob("*/*.so"))
    logits = torch.zeros(4, 16)
    assert "to be built" in dflkern.explain("dfl_decode", logits)
