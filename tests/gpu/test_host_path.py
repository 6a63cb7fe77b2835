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
BACKENDS = ("triton", "cuda")
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
    """A fault of the launch code: a text of a file that is replaced, and a case that notices it.

    Other cases run before it in the same process.
    """

    name: str
    file: str
    old: str
    new: str
    case: Case
    before: tuple[Case, ...] = ()


LAUNCH, CALLS, LOSS = "gpu/launch.py", "operators/implementations.py", Case("dfl_loss")
SLICE, GUARD = Case("dfl_decode", layout="slice"), "with torch.cuda.device(device):\n            "
START = "start(x, y, z, stream, *[tensors[role].data_ptr() for role in roles]"
STREAM, DEVICE = "stream = current_stream(device)", "if torch._C._cuda_getDevice() != device:"
KEY, LOADED = "op, logits.dtype, layout, device,", "key = (device, launch_plan.signature)"
FIRST = Case("dfl_loss", place="default")
MUTATIONS = (
    Mutation("arguments swapped", LAUNCH, START, START.replace("roles", "roles[::-1]"), SLICE),
    Mutation("results swapped", CALLS, "zip(op.results, results, strict=True):",
             "zip(op.results, results[::-1], strict=True):", Case("dfl_loss_and_decode")),
    Mutation("strides swapped", "gpu/arguments.py", '"middle_stride": middle.logits',
             '"middle_stride": outer.logits', SLICE),
    Mutation("grid without its last axis", LAUNCH, START, START.replace("y, z", "y, 1"), SLICE),
    Mutation("grid of the wrong axes", LAUNCH, START, START.replace("x, y, z", "z, y, x"), SLICE),
    Mutation("one program too few", LAUNCH, "-(-(n // each) // block)", "n // each // block", LOSS),
    Mutation("grid without the rest of the rows", LAUNCH, " + (n % each > 0)", "",
             Case("dfl_decode", bins=17)),
    Mutation("number of rows of the first call", LAUNCH, "(n % each > 0), (n,)",
             "(n % each > 0), numbers", LOSS, (Case("dfl_loss", layout="rows-4d"),)),
    Mutation("sums over nothing not filled", CALLS, "result.zero_()", "pass",
             Case("box_loss", layout="empty", weight="anchors")),
    Mutation("default stream", LAUNCH, STREAM, "stream = 0", Case("dfl_loss", place="side stream")),
    Mutation("stream of the first device", LAUNCH, STREAM, "stream = current_stream(0)", LOSS),
    Mutation("current device", LAUNCH, DEVICE, "if False:", LOSS),
    Mutation("kernel loaded on the first device", LAUNCH, f"{GUARD}start",
             "if True:\n            start", LOSS),
    Mutation("kernels shared by devices", LAUNCH, LOADED, "key = (launch_plan.signature,)", LOSS,
             (FIRST,)),
    Mutation("launches shared by devices", LAUNCH, KEY, KEY.replace("device", "0"), LOSS, (FIRST,)),
    Mutation("kernels shared by dtypes", LAUNCH, LOADED, "key = (device, launch_plan.kernel)",
             SLICE, (replace(SLICE, dtype="fp16"),)),
    Mutation("launches shared by dtypes", LAUNCH, KEY, KEY.replace("logits.dtype", "None"),
             LOSS, (Case("dfl_loss", dtype="fp16"),)),
    Mutation("launches shared by reductions", LAUNCH, "aligned, others, beside", "aligned, others",
             Case("dfl_loss", reduction="mean"), (LOSS,)),
    Mutation("unaligned logits taken for aligned", LAUNCH, "aligned = logits.data_ptr() % 16 == 0",
             "aligned = True", Case("dfl_loss", layout="offset"), (LOSS,)),
    Mutation("strided upstream gradient read as packed", LAUNCH, "value = value.contiguous()",
             "value = value", Case("decode_boxes", layout="columns", upstream="reversed")),
    Mutation("upstream gradient of any stride taken for packed", "problem.py",
             "if tensor.shape == shape and tensor.is_contiguous():", "if tensor.shape == shape:",
             Case("dfl_loss", layout="rows-4d", upstream="reversed")),
    Mutation("weight of an anchor taken for that of a side", "problem.py",
             'return Beside(tensor.dtype, "sides")', "return Beside(tensor.dtype)",
             Case("dfl_loss", layout="rows-4d", weight="anchors")),
    Mutation("mean over programs", LAUNCH, "numbers = (programs, n)",
             "numbers = (programs, programs)", Case("dfl_loss", reduction="mean")),
    Mutation("room for the sums of one program", LAUNCH, "programs = x * y * z", "programs = 1",
             Case("box_loss", layout="rows", weight="scores")),
    Mutation("gradient written into the logits", CALLS, "return [torch.empty_like(main)]",
             "return [main.detach()]", LOSS),
)  # fmt: skip


class Processes:
    """Two processes on the stub device, each with half of the cases and of the mutations."""

    def __init__(self, environment, sources):
        self.environment, self.sources = environment, sources
        self.pool = ThreadPoolExecutor(2)
        self.halves = [self.pool.submit(self.run, list(self.jobs(i))) for i in range(2)]

    def jobs(self, half):
        """The job of the cases, then one for each mutation, in a copy of the package."""
        yield {"sources": None, "cases": [asdict(case) for case in CASES[half::2]]}
        for mutation in MUTATIONS[half::2]:
            folder = self.sources / mutation.name.replace(" ", "_")
            shutil.copytree(ROOT / "dflkern", folder / "dflkern")
            path = folder / "dflkern" / mutation.file
            path.write_text(path.read_text().replace(mutation.old, mutation.new))
            cases = [*mutation.before, mutation.case]
            yield {"sources": str(folder), "cases": [asdict(case) for case in cases]}

    def run(self, jobs):
        """The outcomes of each job."""
        done = subprocess.run(
            [sys.executable, "-m", "host_path_worker", json.dumps(jobs)],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def outcome(self, case):
        """What a case came to."""
        i = CASES.index(case)
        return self.halves[i % 2].result()[0][i // 2]

    def faults_of(self, mutation):
        """What was noticed of a mutation."""
        i = MUTATIONS.index(mutation)
        return self.halves[i % 2].result()[1 + i // 2][-1]["faults"]


@pytest.fixture(scope="module")
def processes(on_stub, tmp_path_factory):
    each = Processes(on_stub(GPUS=2, FILL=255), tmp_path_factory.mktemp("mutants"))
    yield each
    each.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_reference(case, processes):
    assert processes.outcome(case)["faults"] == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_of_a_fault_exists(mutation):
    assert mutation.old in (ROOT / "dflkern" / mutation.file).read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_fault_in_the_launch_code_is_caught(mutation, processes, record_property):
    faults = processes.faults_of(mutation)
    assert faults
    record_property("caught", f"host path, {mutation.name}: {faults[0]}")
