"""Faults put into the GPU kernels' sources, compiled and run in the emulator: each is caught.

A fault is a substitution in a copy of the package. What caught each is listed at the end of the
test run. Unchanged, the same cases pass: test_ptx_results has them all.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import emulation
from box_emulation import BoxCase
from emulation import FAR, Case

ROOT = Path(__file__).parents[2]
FORWARD, BACKWARD = "dfl_loss_and_decode", "dfl_loss_and_decode_backward"


@dataclass(frozen=True)
class Mutation:
    """A fault, by its file and the text that it replaces, and a case that must notice it."""

    name: str
    file: str
    old: str
    new: str
    case: Case | BoxCase


def triton(name, file, old, new, **case):
    return Mutation(name, f"dflkern/gpu/triton/{file}", old, new, Case(**{"op": FORWARD, **case}))


def boxes(name, file, old, new, **case):
    case = {"op": "box_loss", "keep": True, "foreground": 0.5, **case}
    return Mutation(f"boxes: {name}", f"dflkern/gpu/triton/{file}", old, new, BoxCase(**case))


def cuda(name, file, old, new, **case):
    case = {"op": FORWARD, "backend": "cuda", **case}
    return Mutation(f"cuda: {name}", f"csrc/cuda/{file}", old, new, Case(**case))


MUTATIONS = [
    triton("mask of a store dropped", "rows.py", "moment / s, mask=live)", "moment / s)"),
    triton("mask of a tile one bin too wide", "rows.py", "(bins < K)", "(bins <= K)",
           op=BACKWARD, bins=91),
    triton("gradient written at the logits' stride", "lanes.py",
           "grad_logits_ptr += grad_bin_stride", "grad_logits_ptr += bin_stride",
           op=BACKWARD, layout="strided"),
    triton("int32 offset", "rows.py", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)",
           bins=17, count=FAR, part="last"),
    triton("int32 offset along columns", "columns.py", "tl.program_id(1).to(tl.int64)",
           "tl.program_id(1)", layout="columns", count=FAR, part="last"),
    triton("off-by-one bin", "distribution.py", "1.0 - tl.abs(t - k)", "1.0 - tl.abs(t - k + 1)",
           bins=17),
    triton("no maximum", "distribution.py", "x = (z[k] - m) * LOG2E", "x = z[k] * LOG2E",
           layout="columns", special=True),
    triton("margin forgotten", "distribution.py", "K - 1 - MARGIN)", "K - 1)", bins=17),
    triton("ignored upstream gradient", "distribution.py", "-grad_loss * tl.maximum(y, 0.0)",
           "-tl.maximum(y, 0.0)", op=BACKWARD, bins=17),
    triton("upstream gradient of the wrong result", "distribution.py", "a = grad_position * r",
           "a = grad_loss * r", op=BACKWARD),
    triton("leftover rows unwritten", "../launch_plan.py", " + (n % each > 0)", "", bins=17),
    triton("NaN target swallowed", "distribution.py", "dot = t * 0", "dot = tl.zeros_like(t)",
           layout="columns", special=True),
    triton("swapped weights", "distribution.py", "tl.where(left == k, 1.0 - right_weight",
           "tl.where(left == k, right_weight", layout="columns", project=True),
    triton("expectation of the wrong positions", "distribution.py", "return k * 1.0",
           "return k * 1.0 + 1.0", layout="columns"),
    triton("16-byte loads of misaligned rows", "../../problem.py", "aligned=aligned,",
           "aligned=True,", bins=17, layout="offset"),
    boxes("an anchor taken twice", "foreground.py", "static_range(BLOCK // 4 - 1)",
          "static_range(BLOCK // 4 - 2)"),
    boxes("one class too many", "foreground.py", "(at < classes)", "(at <= classes)"),
    boxes("a quarter of the classes left out", "foreground.py", "total + tl.gather(total, lane ^ 2",
          "total + tl.gather(total, lane"),
    boxes("another side's edge", "foreground.py", "first + 2, 0", "first + 3, 0"),
    boxes("weight 0 of the background unwritten", "boxloss.py", "if anchor_weight_ptr is not None:",
          "if not SCORES:"),
    boxes("the weight of another anchor", "boxloss.py", "weight = tl.gather(weights, within, 0)",
          "weight = weights", op="box_loss_backward"),
    boxes("zeros over the foreground", "boxloss.py", "& 1 == 0) & (block", "& 0 == 0) & (block",
          op="box_loss_backward"),
    cuda("no barrier after the copy in", "rows.cu", "  __syncthreads();\n  if (!live)",
         "  if (!live)"),
    cuda("no barrier before the copy out", "rows.cu", "  }\n  __syncthreads();\n  copy_out",
         "  }\n  copy_out", op=BACKWARD, bins=17),
    cuda("last rows beyond the end", "rows.cu", "n - first < kThreads ? n - first : kThreads",
         "kThreads"),
    cuda("int32 offset", "rows.cu", "static_cast<int64_t>(blockIdx.x) * kThreads",
         "static_cast<int>(blockIdx.x * kThreads * K) / K", count=FAR, part="last"),
    cuda("left and right weight swapped", "distribution.cuh", "weighted(y.left_weight, left)",
         "weighted(y.right_weight, left)", bins=17),
    cuda("gradient at the logits' stride", "columns.cu", "destination + k * grad_bin_stride",
         "destination + k * bin_stride", op=BACKWARD, layout="strided"),
    cuda("padding of shared memory forgotten", "rows.cu", "kWhole ? g + g / 8 : g", "g"),
    cuda("upstream gradient ignored", "distribution.cuh", "fma(grad_loss, r, right_weight * 0)",
         "fma(F(1), r, right_weight * 0)", op=BACKWARD, layout="columns"),
]  # fmt: skip
QUICK = (
    "mask of a store dropped", "NaN target swallowed", "boxes: the weight of another anchor",
    "cuda: no barrier after the copy in",
)  # fmt: skip

RUN = """
import json, sys
import box_emulation, emulation
case = json.loads(sys.argv[1])
if "anchors" in case:
    outcome = box_emulation.run_box_case(box_emulation.BoxCase(**case))
else:
    outcome = emulation.run_case(emulation.Case(**case))
print(json.dumps(outcome.faults))
"""


def faults_of(mutation, folder):
    """What the emulator and the comparison say of a mutated copy of the sources."""
    for name in ("dflkern", "csrc"):
        shutil.copytree(ROOT / name, folder / name)
    path = folder / mutation.file
    text = path.read_text()
    assert mutation.old in text
    path.write_text(text.replace(mutation.old, mutation.new))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests" / "helpers")]),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "DFLKERN_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(vars(mutation.case))],
        capture_output=True, text=True, env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.quick
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_the_text_of_a_fault_exists(mutation):
    assert mutation.old in (ROOT / mutation.file).read_text()


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.ptx_full)
        for each in MUTATIONS
    ],
)
def test_a_fault_is_caught(mutation, tmp_path, record_property):
    reason = emulation.compiles(mutation.case.backend)
    if reason:
        pytest.skip(f"{mutation.case.backend}: {reason}")
    faults = faults_of(mutation, tmp_path)
    assert faults
    record_property("caught", f"{mutation.name}: {faults[0]}")
