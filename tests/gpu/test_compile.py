"""`python -m dflkern compile`: files, manifest, filters, and AMD targets."""

import json
import subprocess
import sys

import pytest

FACTS = {"registers", "spills", "stack", "shared", "sass_instructions", "widest_load"}


def compile_into(folder, *arguments):
    command = [sys.executable, "-m", "dflkern", "compile", "--out", str(folder), "--jobs", "2"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def one(**chosen):
    return [word for name, value in chosen.items() for word in (f"--{name}", value)]


def test_a_manifest_of_what_was_compiled(tmp_path):
    """In an environment that has TRITON_INTERPRET, as this session's may."""
    part = one(op="dfl_decode", dtype="fp16", backend="triton", bins="16", arch="80,90")
    done = compile_into(tmp_path, *part)
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "manifest.json").read_text())["kernels"]
    assert len(kernels) == 2 * 3 * 2  # architectures, layouts, with and without a project
    for kernel in kernels:
        assert kernel["op"] == "dfl_decode"
        assert (kernel["dtype"], kernel["bins"], kernel["backend"]) == ("fp16", 16, "triton")
        assert kernel.keys() >= FACTS | {"name", "arch", "layout"}
        assert kernel["spills"] == kernel["stack"] == 0
        position = 4 if kernel["project"] else 2
        assert kernel["widest_load"] == (16 if kernel["layout"] == "rows" else position)
        assert f".target sm_{kernel['arch']}" in (tmp_path / kernel["ptx"]).read_text()
        assert (tmp_path / kernel["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert len({kernel["name"] for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_triton_kernels_compile_for_amd(arch, tmp_path):
    """Every structure in both directions; nothing of it was ever run."""
    part = one(op="dfl_loss_and_decode", dtype="fp32", bins="16", arch=arch)
    part += one(op="dfl_loss_and_decode_backward", bins="91", layout="rows")
    part += one(layout="columns")
    done = compile_into(tmp_path, *part)
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "manifest.json").read_text())["kernels"]
    structures = {"columns", "rows_chunk", "rows_lazy", "rows_tile"}
    found = {kernel["kernel"].rsplit("_", 2)[0] for kernel in kernels}
    assert found == structures
    for kernel in kernels:
        assert (kernel["backend"], kernel["arch"]) == ("triton", arch)
        assert (tmp_path / kernel["hsaco"]).read_bytes()[:4] == b"\x7fELF"


def test_an_unknown_architecture_is_refused(tmp_path):
    done = compile_into(tmp_path, "--arch", "hopper")
    assert done.returncode == 2
    assert '"hopper" is no architecture' in done.stderr
