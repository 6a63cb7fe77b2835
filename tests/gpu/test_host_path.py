"""The GPU backends from the public function to the values, on a machine without a GPU.

The launch code runs on the stub CUDA device, and each kernel that it launches runs in the PTX
emulator, over the same memory. Faults put into the launch code are caught.
"""

import itertools
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from host_path import PLACES, Case

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton",)
REDUCTIONS = ("none", "sum", "mean", "side_mean")
FORMS = (
    {"layout": "rows-4d"},
    {"layout": "columns", "dtype": "fp16"},
    {"layout": "slice", "dtype": "bf16", "bins": 17, "other_dtype": "bf16"},
    {"layout": "offset", "dtype": "fp64", "bins": 8, "other_dtype": "fp64"},
    {"layout": "strided", "dtype": "fp16", "bins": 10, "other_dtype": "fp16"},
)
BOX_FORMS = (
    {"layout": "columns"},
    {"layout": "rows", "dtype": "fp16", "other_dtype": "fp16"},
    {"layout": "slice", "dtype": "bf16", "bins": 17, "project": True},
    {"layout": "offset", "dtype": "fp64", "bins": 8, "other_dtype": "fp64"},
)
UPSTREAM = ("packed", "reversed", "expanded")


def cases():
    """Every operator with every form, and all that it may be given."""
    forms, upstream, places = (itertools.cycle(each) for each in (FORMS, UPSTREAM, PLACES[::-1]))
    for reduction, weight, project in itertools.product(
        REDUCTIONS, ("", "anchors", "each"), (False, True)
    ):
        yield Case("dfl_loss", reduction=reduction, weight=weight, project=project,
                   upstream=next(upstream), **next(forms))  # fmt: skip
    for op in ("dfl_loss", "dfl_decode", "dfl_loss_and_decode"):
        for form in FORMS:
            yield Case(op, place=next(places), upstream=next(upstream), **form)
        yield Case(op, layout="empty")
    yield Case("dfl_loss", bins=91, layout="permuted", project=True)
    for form in BOX_FORMS:
        yield Case("decode_boxes", upstream=next(upstream), place=next(places), **form)
        yield Case("box_loss", place=next(places), weight="scores", **form)
    yield Case("decode_boxes", stride=False, box_format="cxcywh")
    yield Case("decode_boxes", layout="empty")
    yield Case("box_loss", layout="empty", weight="anchors")
    for iou in ("iou", "giou", "diou"):
        yield Case("box_loss", iou=iou, weight="anchors", foreground=iou == "giou")


def graph_cases():
    """Steps of a training captured into a CUDA graph."""
    base = Case("dfl_loss", place="side stream", graph=True, layout="rows-4d")
    for reduction in REDUCTIONS:
        yield replace(base, reduction=reduction, weight="anchors")
    yield replace(base, op="dfl_decode", project=True)
    yield replace(base, op="box_loss", layout="columns", weight="scores")
    yield replace(base, op="decode_boxes", layout="columns")


def backward_cases():
    """Scalars with `.backward()`, which makes the upstream gradient."""
    yield from (Case("dfl_loss", reduction=each, upstream="backward") for each in ("sum", "mean"))


CASES = tuple(
    dict.fromkeys(
        replace(case, backend=backend)
        for backend in BACKENDS
        for case in (*cases(), *graph_cases(), *backward_cases())
    )
)


@dataclass(frozen=True)
class Mutation:
    """A fault of the launch code: a text of a file that is replaced, and a case that notices it."""

    name: str
    file: str
    old: str
    new: str
    case: Case


LAUNCH, CALLS = "gpu/launch.py", "operators/implementations.py"
START = "start(x, y, z, stream, "
MUTATIONS = (
    Mutation("results swapped", CALLS, "zip(op.results, results, strict=True):",
             "zip(op.results, results[::-1], strict=True):", Case("dfl_loss_and_decode")),
    Mutation("strides swapped", "gpu/arguments.py", '"middle_stride": middle.logits',
             '"middle_stride": outer.logits', Case("dfl_decode", layout="slice")),
    Mutation("grid without its last axis", LAUNCH, START, "start(x, y, 1, stream, ",
             Case("dfl_decode", layout="slice")),
    Mutation("grid of the wrong axes", LAUNCH, START, "start(z, y, x, stream, ",
             Case("dfl_decode", layout="slice")),
    Mutation("one program too few", LAUNCH, "-(-(n // each) // block)", "n // each // block",
             Case("dfl_loss")),
    Mutation("sums over nothing not filled", CALLS, "result.zero_()", "pass",
             Case("box_loss", layout="empty", weight="anchors")),
    Mutation("default stream", LAUNCH, "stream = current_stream(device)", "stream = 0",
             Case("dfl_loss", place="side stream")),
    Mutation("current device", LAUNCH, "if torch._C._cuda_getDevice() != device:", "if False:",
             Case("dfl_loss")),
    Mutation("strided upstream gradient read as packed", "problem.py",
             "if tensor.shape == shape and tensor.is_contiguous():", "if tensor.shape == shape:",
             Case("dfl_loss", layout="rows-4d", upstream="reversed")),
    Mutation("unaligned logits taken for aligned", "problem.py",
             "aligned=logits.data_ptr() % 16 == 0", "aligned=True",
             Case("dfl_loss", layout="offset")),
    Mutation("room for the sums of one program", LAUNCH, "scratch[1] * programs or n",
             "scratch[1] or n", Case("box_loss", layout="rows", weight="scores")),
    Mutation("mean over programs", LAUNCH, "numbers = (programs, n)",
             "numbers = (programs, programs)", Case("dfl_loss", reduction="mean")),
    Mutation("weight of each side read from one number an anchor", "problem.py",
             'return Beside(tensor.dtype, "sides")', "return Beside(tensor.dtype)",
             Case("dfl_loss", layout="rows-4d", weight="anchors")),
    Mutation("gradient written into the logits", CALLS, "return [torch.empty_like(main)]",
             "return [main.detach()]", Case("dfl_loss")),
)  # fmt: skip


class Processes:
    """Jobs in processes on the stub device, two at a time."""

    def __init__(self, environment, sources):
        self.environment, self.sources = environment, sources
        self.pool = ThreadPoolExecutor(2)
        halves = [
            self.pool.submit(self.run, [{"sources": None, "cases": [*map(asdict, CASES[i::2])]}])
            for i in range(2)
        ]
        mutants = [
            self.pool.submit(self.run, [self.mutant(each) for each in MUTATIONS[i::2]])
            for i in range(2)
        ]
        self.halves, self.mutants = halves, mutants

    def run(self, jobs):
        """The outcomes of each job."""
        done = subprocess.run(
            [sys.executable, "-m", "host_path_worker", json.dumps(jobs)],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def mutant(self, mutation):
        """The job of a mutation, in a copy of the package."""
        folder = self.sources / mutation.name.replace(" ", "_")
        shutil.copytree(ROOT / "dflkern", folder / "dflkern")
        path = folder / "dflkern" / mutation.file
        text = path.read_text()
        assert mutation.old in text, f"{mutation.file} no longer has: {mutation.old}"
        path.write_text(text.replace(mutation.old, mutation.new))
        return {"sources": str(folder), "cases": [asdict(mutation.case)]}

    def outcome(self, case):
        """What a case came to."""
        i = CASES.index(case)
        (outcomes,) = self.halves[i % 2].result()
        return outcomes[i // 2]

    def faults_of(self, mutation):
        """What was noticed of a mutation."""
        i = MUTATIONS.index(mutation)
        return self.mutants[i % 2].result()[i // 2][0]["faults"]


@pytest.fixture(scope="module")
def processes(on_stub, tmp_path_factory):
    each = Processes(on_stub(GPUS=2, FILL=255), tmp_path_factory.mktemp("mutants"))
    yield each
    each.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_reference(case, processes):
    assert processes.outcome(case)["faults"] == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_fault_in_the_launch_code_is_caught(mutation, processes, record_property):
    faults = processes.faults_of(mutation)
    assert faults
    record_property("caught", f"host path, {mutation.name}: {faults[0]}")
