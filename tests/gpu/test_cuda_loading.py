"""Loading of CUDA kernels on the stub device, and what happens where a GPU cannot run them."""

import json
import subprocess
import sys

import pytest

# Each scenario in a process of its own, forked from one that has imported PyTorch
PROGRAM = """
import json, os, pathlib, sys, tempfile, warnings
import torch
import dflkern
from cuda_stub import counted, counters
from dflkern.gpu.cuda import nvrtc
from dflkern.library import BuildError
from dflkern.operators.implementations import RUNS

def run(before, call):
    exec(before)
    compiled, compile_kernel = [], nvrtc.compile_kernel
    def noted(kernel, arch):
        compiled.append(f"{kernel} sm_{arch}")
        return compile_kernel(kernel, arch)
    nvrtc.compile_kernel = noted
    logits, found = torch.empty(5, 4, 91, device="cuda"), {}
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        exec(call)
        at = counters()
        for _ in range(2):
            dflkern.dfl_decode(logits)
        found["spent"] = {name: n for name, n in counted(at).items() if n}
        explained = dflkern.explain("dfl_decode", logits)
    found["warnings"] = [str(each.message) for each in seen if "dflkern" in str(each.message)]
    print(json.dumps(found | {"compiled": compiled, "explained": explained.splitlines()}))

for before, call, environment in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
    else:
        os.environ.update(environment)
        run(before, call)
        break
"""
CALL = "dflkern.dfl_decode(logits)"
DECODE = "general_forward<fp32, Layout::rows>"
DAMAGE = """
(path,) = pathlib.Path(os.environ["DFLKERN_CACHE"]).glob("*/general_forward*.cubin")
path.write_bytes(path.read_bytes()[:-1])
"""
CAPTURE = """
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        dflkern.dfl_decode(logits)
except RuntimeError as error:
    found["refused"] = str(error)
"""
NO_NVRTC = """
def missing(): raise BuildError("libnvrtc.so.13 was not found")
nvrtc._library = missing
"""
OTHER = "torch._C._StaticCudaLauncher = type('Launcher', (), {'_load_kernel': lambda *all: [0]})"
# What the next backend launches does not matter here, and Triton does not know every GPU either
NEXT = "\nRUNS['triton'] = RUNS['reference']"
REFUSALS = {  # what is wrong, how, and what the warning must say
    "a driver older than the compiler": ("", {"STUB_DRIVER": "12040"}, "CUDA driver error"),
    "an unknown GPU": ("", {"STUB_CC": "70"}, "does not compile for sm_70; it knows sm_75, sm_80"),
    "nowhere to keep a kernel": (
        "tempfile.tempdir = '/dev/null'", {"DFLKERN_CACHE": "/dev/null/cache"},
        "name another folder in the environment variable DFLKERN_CACHE",
    ),
    "no launcher in PyTorch": ("del torch._C._StaticCudaLauncher", {}, "_StaticCudaLauncher"),
    "a launcher with another interface": (OTHER, {}, "index out of range"),
}  # fmt: skip
SCENARIOS = {
    "cold": ("", CALL, {}),
    "warm": ("", CALL, {}),
    "damaged": (DAMAGE, CALL, {}),
    "captured": ("", CAPTURE, {}),
    "no NVRTC": (NO_NVRTC, CALL, {}),
    **{name: (how + NEXT, "pass", environment)
       for name, (how, environment, _) in REFUSALS.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def found(on_stub, tmp_path_factory):
    """What each scenario came to."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("DFLKERN_CACHE", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*SCENARIOS.values()])],
        env=on_stub() | folders, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(SCENARIOS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_kernel_is_compiled_at_the_first_use_and_then_found(found):
    assert found["cold"]["compiled"] == ["probe sm_90", f"{DECODE} sm_90"]
    assert found["warm"]["compiled"] == []
    assert found["damaged"]["compiled"] == [f"{DECODE} sm_90"]
    for name in ("cold", "warm", "damaged"):
        assert found[name]["spent"] == {"driver_launches": 2}  # and no calls of the file system
        assert found[name]["warnings"] == []
        assert "cuda: serves it" in found[name]["explained"][1]


def test_the_first_use_cannot_be_captured(found):
    assert "Run the call once before the capture." in found["captured"]["refused"]
    assert found["captured"]["spent"]["driver_launches"] == 3  # with the probe
    assert "cuda: serves it" in found["captured"]["explained"][1]


@pytest.mark.parametrize("name", REFUSALS)
def test_where_a_gpu_cannot_run_them_the_next_backend_serves(found, name):
    (warning,) = found[name]["warnings"]
    assert warning.startswith("dflkern: no CUDA kernels: cuda:0 cannot run them: ")
    assert warning.endswith("Calls run on Triton's kernels.")
    assert REFUSALS[name][2] in warning
    assert REFUSALS[name][2] in found[name]["explained"][1]
    assert "triton: serves it" in found[name]["explained"][2]


def test_without_nvrtc_there_is_no_warning(found):
    """As on AMD's GPUs, this is no fault of the machine."""
    assert found["no NVRTC"]["warnings"] == []
    assert found["no NVRTC"]["explained"][1] == "  cuda: no, libnvrtc.so.13 was not found"
