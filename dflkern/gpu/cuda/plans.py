"""Launch plans of the CUDA C++ kernels in csrc, by structure.

rows              contiguous aligned distributions with a fixed number of bins
columns2          pairs of neighbouring distributions with a fixed number of bins
columns1          any strides and a fixed number of bins
general_rows      any number of bins of stride 1
general_columns   any number of bins, any strides
"""

from __future__ import annotations

from ...problem import Problem
from ..arguments import axes_numbers, grid_axes, pointers_of
from ..launch_plan import ELEMENT, LAZY_BINS, UNROLLED_BINS, Argument, LaunchPlan, Step

FIXED_BINS = (8, 16, 17, 33)
PAIRED_POSITIONS = 17  # above, positions and two distributions exceed 128 registers
BLOCK = 128
WARP = 32
SHARED_LIMIT = 48 << 10  # bytes that every GPU grants a block unasked


def plan_distributions(step: Step, problem: Problem) -> LaunchPlan:
    """The launch of a step on problem, which has at least one distribution."""
    name = structure(problem)
    axis, middle, outer = grid_axes(problem)
    numbers, block, shared = axes_numbers(problem, step.backward), BLOCK, 0
    if name.startswith("general"):
        rows, shared = _rows_in_shared_memory(problem, name)
        block = max(rows, WARP)
        lanes_log2 = min(5, (problem.num_bins - 1).bit_length())
        numbers = {"bins": problem.num_bins, "rows": rows, "lanes_log2": lanes_log2} | numbers
    else:
        rows = 2 * BLOCK if name == "columns2" else BLOCK
        if name == "rows":
            numbers = {"n": axis.size}
    arguments = [
        Argument(role, f"*{element}", role) if element else Argument(role, "null", 0)
        for role, element in pointers_of(step, problem).items()
    ]
    bound = problem.margin if problem.project else problem.num_bins - 1 - problem.margin
    arguments.append(Argument("bound", ELEMENT[problem.compute_dtype], float(bound)))
    arguments += [Argument(role, "i64", number) for role, number in numbers.items()]
    return LaunchPlan(
        step.name,
        "cuda",
        _kernel(name, step, problem),
        grid=(-(-axis.size // rows), middle.size, outer.size),
        block=(block, 1, 1),
        arguments=tuple(arguments),
        constants=(),
        shared=shared,
    )


def structure(problem: Problem) -> str:
    """The structure that serves a problem."""
    along_bins = problem.bin_stride == problem.grad_bin_stride == 1
    if problem.num_bins in FIXED_BINS and problem.dtype.itemsize < 8:
        if problem.packed and problem.aligned:
            return "rows"
        if not along_bins:
            return "columns2" if _paired(problem) else "columns1"
    return "general_rows" if along_bins else "general_columns"


def prefers_triton(num_bins: int, bins_are_contiguous: bool) -> bool:
    """Whether Triton's kernels do better than these, by counts of compiled code and host time.

    Triton keeps a distribution of few bins in registers, reduces and weighs losses in the kernel,
    and is started in less time. Longer ones are padded or read anew for each pass.
    """
    return num_bins <= (LAZY_BINS if bins_are_contiguous else UNROLLED_BINS)


def _paired(problem: Problem) -> bool:
    """Whether neighbours along the lanes' axis can be read and written two at a time."""
    axis, middle, outer = grid_axes(problem)
    if not problem.aligned or axis[1:4] != (1, 1, 1):
        return False
    if problem.project and problem.num_bins > PAIRED_POSITIONS:
        return False
    strides = (problem.bin_stride, problem.grad_bin_stride, *middle[1:4], *outer[1:4])
    return all(number % 2 == 0 for number in (axis.size, *strides))


def _rows_in_shared_memory(problem: Problem, name: str) -> tuple[int, int]:
    """How many distributions a block keeps in shared memory, and the bytes that they take."""
    bins = problem.num_bins | 1 if name == "general_rows" else problem.num_bins
    size = bins * problem.compute_dtype.itemsize
    rows = BLOCK
    while rows * size > SHARED_LIMIT:
        rows //= 2
    return rows, rows * size


def _kernel(name: str, step: Step, problem: Problem) -> str:
    """The kernel, as C++ names it."""
    direction = "backward" if step.backward else "forward"
    element = ELEMENT[problem.dtype]
    if name.startswith("general"):
        return f"general_{direction}<{element}, Layout::{name.removeprefix('general_')}>"
    computed = "both" if step.loss and step.decode else "loss" if step.loss else "decode"
    what = "asked" if problem.project else computed
    arguments = f"{element}, {problem.num_bins}, What::{what}"
    if name == "rows":
        return f"rows_{direction}<{arguments}>"
    return f"columns_{direction}<{arguments}, {name.removeprefix('columns')}>"
