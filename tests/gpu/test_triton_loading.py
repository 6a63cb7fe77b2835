"""Where a GPU cannot run Triton's kernels: one warning, and the next backend serves.

On the stub device, each scenario in a process of its own, which starts with an empty Triton cache.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys, warnings
import torch
exec(sys.argv[1])
import dflkern
logits = torch.empty(5, 4, 16, device="cuda")
found = {}
with warnings.catch_warnings(record=True) as seen, torch.no_grad():
    warnings.simplefilter("always")
    for _ in range(2):
        shape = list(dflkern.dfl_decode(logits).shape)
    found["explained"] = dflkern.explain("dfl_decode", logits).splitlines()
found["warnings"] = [str(each.message) for each in seen if "dflkern" in str(each.message)]
print(json.dumps(found | {"shape": shape}))
"""
REFUSALS = {  # what is wrong: how, the environment, and what the warning must say
    "no C compiler": ("os.environ['PATH'] = ''", {}, "C compiler"),
    "an unknown GPU": ("", {"STUB_CC": "20"}, ""),
    "a driver that loads nothing": (
        "import triton; from triton.runtime import driver\n"
        "def refuse(*given): raise RuntimeError('Triton Error [CUDA]: PTX toolchain is too old')\n"
        "driver.active.utils.load_binary = refuse", {}, "PTX toolchain is too old"
    ),
    "nowhere to keep a kernel": ("", {"TRITON_CACHE_DIR": "/dev/null/cache"}, "/dev/null"),
}  # fmt: skip


DAMAGE = """
import pathlib
for path in pathlib.Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*_kernel.json"):
    path.write_text(path.read_text()[:-9])
"""
COMPILED = """
import torch, dflkern
logits = torch.empty(5, 4, 16, device="cuda", requires_grad=True)
target = torch.empty(5, 4, device="cuda")
for project in (None, [0.5 * k for k in range(16)], torch.empty(16, device="cuda")):
    torch._dynamo.reset()
    def loss(logits, target):
        decoded = dflkern.dfl_decode(logits, project=project)
        return dflkern.dfl_loss(logits, target, project=project, reduction="mean") + decoded.sum()
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, capture, replays
        compiled(logits, target).backward()
        logits.grad = None  # of the graph, whose next run overwrites it
    loss(logits, target).backward()
"""


def run(on_stub, tmp_path, before, environment):
    settings = on_stub() | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, before],
        env=settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("before", ["", "del os.getuid"])
def test_nothing_is_said_where_all_is_well(on_stub, tmp_path, before):
    found = run(on_stub, tmp_path, before, {})
    assert found["warnings"] == []
    assert "triton: serves it" in found["explained"][1]


@pytest.mark.parametrize("name", REFUSALS)
def test_where_a_gpu_cannot_run_them_the_next_backend_serves(on_stub, tmp_path, name):
    before, environment, words = REFUSALS[name]
    found = run(on_stub, tmp_path, before, environment)
    assert found["shape"] == [5, 4]
    warning = found["warnings"][0]
    assert warning.startswith("dflkern: no Triton kernels: cuda:0 cannot run them: ")
    assert words in warning
    assert sum("no Triton kernels" in each for each in found["warnings"]) == 1
    assert "triton: no, cuda:0 cannot run them" in found["explained"][1]
    assert any(": serves it" in line for line in found["explained"][2:])


def test_a_damaged_kernel_is_compiled_anew(on_stub, tmp_path):
    run(on_stub, tmp_path, "", {})
    assert list(tmp_path.glob("triton/*/*_kernel.json"))
    found = run(on_stub, tmp_path, DAMAGE, {})
    assert found["warnings"] == []
    assert "triton: serves it" in found["explained"][1]


def test_compiled_into_cuda_graphs_with_every_kind_of_project(on_stub, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=on_stub(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
