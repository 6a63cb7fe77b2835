"""The launch plans of the CUDA kernels, against the sources that NVRTC compiles."""

import fnmatch
import itertools
import re

import pytest
import torch

from dflkern.cpu.compiler import sources
from dflkern.gpu import plan, prefers_triton
from dflkern.gpu.box_problem import describe_boxes
from dflkern.gpu.cuda import nvrtc
from dflkern.gpu.cuda.plans import SHARED_LIMIT
from dflkern.library import BuildError
from dflkern.operators import backends
from dflkern.problem import describe

CUDA = torch.device("cuda")
OPS = [
    name + suffix
    for name in ("dfl_loss", "dfl_decode", "dfl_loss_and_decode")
    for suffix in ("", "_backward")
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def problem_of(shape, dim, dtype=torch.float32, stride=None, **options):
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    return describe(shape, stride, dtype, CUDA, dim % len(shape), **options)


def every_plan():
    shapes = [
        ((999, 0), 1, None), ((0, 1000), 0, None), ((0, 999), 0, None), ((3, 0, 5), 1, None),
        ((99, 0), 1, (300, 1)), ((99, 0), 1, (600, 2)), ((0,), 0, None),
    ]  # fmt: skip
    for (shape, dim, stride), bins, dtype, aligned, project in itertools.product(
        shapes, (2, 8, 16, 17, 33, 91, 256), DTYPES, (True, False), (True, False)
    ):
        shape = tuple(bins if axis == dim else size for axis, size in enumerate(shape))
        problem = problem_of(
            shape, dim, dtype, stride, aligned=aligned, project=project, margin=0.01
        )
        for op in OPS:
            yield plan(op, problem, "cuda")


def every_box_plan():
    for bins, dtype, kind, dim in itertools.product(
        (2, 8, 16, 17, 33, 256), DTYPES, DTYPES, (2, 3)
    ):
        shape = (2, 4, bins, 9) if dim == 2 else (2, 9, 4, bins)
        logits = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(2, 9, 3, dtype=kind, device="meta")
        for facts in ({}, {"project": True, "stride": True, "box_format": "cxcywh"}):
            for op in ("decode_boxes", "decode_boxes_backward"):
                yield plan(op, describe_boxes(logits, dim, **facts), "cuda")
        for facts in ({}, {"project": True, "foreground": True, "iou": "giou", "margin": 0.1}):
            problem = describe_boxes(logits, dim, weight=weight, **facts)
            for op in ("box_loss", "box_loss_sums", "box_loss_backward"):
                yield plan(op, problem, "cuda")


def check_syntax(file, kernels):
    """Let the compiler's front end make kernels of their templates, with all types and numbers."""
    with nvrtc.Program(file) as program:
        for kernel in kernels:
            program.ask_for(kernel)
        program.compile(80, "--fdevice-syntax-only")


def test_every_plan_names_a_kernel_of_the_sources():
    files = {f"cuda/{name}.cu": set() for name in ("rows", "columns", "general", "boxes")}
    for made in (*every_plan(), *every_box_plan()):
        files[nvrtc.source_of(made.kernel)].add(made.kernel)
    for file, kernels in files.items():
        check_syntax(file, sorted(kernels))
    with pytest.raises(BuildError, match='"dflkern::What" has no member "nothing"'):
        check_syntax("cuda/rows.cu", ["rows_forward<fp32, 16, What::nothing>"])


COMPUTE = ("Compute<T>", "F")
PARAMETERS = re.compile(r"__launch_bounds__\(kThreads\)\s+(\w+)\((.*?)\) \{", re.DOTALL)


def parameters_of():
    """Name and kind of each parameter, by kernel template."""
    found = {}
    for path in (sources() / "cuda").glob("*.cu"):
        for name, inside in PARAMETERS.findall(path.read_text()):
            words = [each.replace("*", " * ").split() for each in inside.split(",")]
            found[name] = [(each[-1], "*" if "*" in each else each[0]) for each in words]
    return found


def test_plans_have_the_arguments_of_their_kernels():
    """By name, kind and order: the driver checks neither their number nor their types."""
    kinds = {"null": ["*"], "i64": ["int64_t"], "fp32": COMPUTE, "fp64": COMPUTE}
    parameters, met = parameters_of(), set()
    for made in (*every_plan(), *every_box_plan()):
        name = made.kernel.partition("<")[0]
        assert [a.name for a in made.arguments] == [n for n, _ in parameters[name]], made.kernel
        for argument, (_, kind) in zip(made.arguments, parameters[name], strict=True):
            assert kind in kinds.get(argument.type, ["*"]), (made.kernel, argument)
        met.add(name)
    assert met == set(parameters)


@pytest.mark.parametrize(
    ("shape", "dim", "options", "structure"),
    [
        ((999, 16), 1, {}, "rows_*"),
        ((999, 16), 1, {"project": True}, "rows_*asked>"),
        ((999, 16), 1, {"aligned": False}, "general_*rows>"),
        ((999, 16), 1, {"stride": (20, 1)}, "general_*rows>"),
        ((999, 91), 1, {}, "general_*rows>"),
        ((999, 16), 1, {"dtype": torch.float64}, "general_*rows>"),
        ((2, 4, 16, 50), 2, {}, "columns_*, 2>"),
        ((2, 4, 16, 51), 2, {}, "columns_*, 1>"),
        ((2, 4, 16, 50), 2, {"aligned": False}, "columns_*, 1>"),
        ((2, 4, 16, 50), 2, {"stride": (5001, 800, 50, 1)}, "columns_*, 1>"),
        ((999, 16), 1, {"stride": (32, 2)}, "columns_*, 1>"),
        ((2, 4, 17, 50), 2, {"project": True}, "columns_*asked, 2>"),
        ((2, 4, 33, 50), 2, {"project": True}, "columns_*asked, 1>"),
        ((2, 4, 20, 50), 2, {}, "general_*columns>"),
    ],
)
def test_structure(shape, dim, options, structure):
    problem = problem_of(shape, dim, **options)
    for op in OPS:
        assert fnmatch.fnmatch(plan(op, problem, "cuda").kernel, structure)


def test_a_plan_is_a_pure_value():
    problem = problem_of((1000, 16), 1, margin=0.01)
    first = plan("dfl_loss", problem, "cuda")
    plan.cache_clear()
    second = plan("dfl_loss", problem_of((1000, 16), 1, margin=0.01), "cuda")
    assert first == second
    assert hash(first) == hash(second)
    assert (first.kernel, first.grid, first.block) == (
        "rows_forward<fp32, 16, What::loss>", (8, 1, 1), (128, 1, 1),
    )  # fmt: skip
    assert [(a.name, a.type, a.value) for a in first.arguments] == [
        ("logits", "*fp32", "logits"), ("target", "*fp32", "target"), ("project", "null", 0),
        ("loss", "*fp32", "loss"), ("position", "null", 0), ("bound", "fp32", 14.99),
        ("n", "i64", 1000),
    ]  # fmt: skip


def test_plans_fit_every_gpu():
    for made in every_plan():
        assert made.shared <= SHARED_LIMIT
        assert made.block[0] in (32, 64, 128)
        assert made.grid[0] < 2**31
        assert max(made.grid[1:]) <= 65535
        numbers = {a.name: a.value for a in made.arguments}
        rows = numbers.get("rows", 256 if made.kernel.endswith(", 2>") else 128)
        assert made.grid[0] * rows >= numbers["n"]


def test_auto_takes_triton_where_that_is_the_better_one():
    """As the budgets of tests/gpu/test_ptx_budgets.py say, and with the host time of a launch."""
    for bins in (8, 16, 17, 24, 33):
        assert prefers_triton(bins, True)
        assert prefers_triton(bins, False)
    assert not prefers_triton(91, True)
    assert not prefers_triton(91, False)
    for prefers, first, second in ((True, "triton", "cuda"), (False, "cuda", "triton")):
        kind = backends.Kind(CUDA, ("triton", "cuda"), prefers)
        assert backends.preference(kind) == (first, second, "reference")
