"""Launch plans of the Triton kernels of distributions, by structure.

Nothing but the grid and the numbers of a plan depends on sizes, and none of these is specialised
upon: 1 is a constant only where it is a stride, and "i64" stands for what 31 bits do not hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Beside, Problem
from ..arguments import axes_numbers, grid_axes, pointers_of
from ..launch_plan import (
    ELEMENT,
    LAZY_BINS,
    UNROLLED_BINS,
    Argument,
    LaunchPlan,
    Step,
    blocks,
    programs_for,
)

# A lane of the lazy forward kernel holds C rows' worth of granules in flight; with 8-element
# granules and more bins than this the compiler spills.
LAZY_WIDE_BINS = 24
BLOCK = 128
SUMS_BLOCK = 1024
LENGTHS = ("n", "programs")  # never specialised upon


class Structure(NamedTuple):
    """A kernel, its own constants, warps, and how many distributions a lane takes."""

    kernel: str
    constants: dict[str, Any]
    warps: int = 4
    each: int = 1


def plan_distributions(step: Step, problem: Problem) -> LaunchPlan:
    """The launch of a step on problem, which has at least one distribution."""
    if step.name == "dfl_loss_sums":
        return _plan_sums(problem)
    structure = _structure(problem, step.backward)
    kernel, beside = structure.kernel, problem.beside
    constants: dict[str, Any] = {
        "K": problem.num_bins, "MARGIN": problem.margin, "LOSS": step.loss,
        "POSITION": step.decode, "WEIGHT": _mode(beside.weight) if beside.weight else "",
        "SIDES": beside.sides if _by_sides(step, problem) else 1,
    }  # fmt: skip
    if step.backward:
        constants |= {
            "DIVIDE": _divisor(problem),
            "GRAD_LOSS": _mode(beside.grad_loss),
            "GRAD_POSITION": _mode(beside.grad_position),
        }
    else:
        constants["SUM"] = beside.reduction in ("sum", "mean")
    constants |= structure.constants
    by_axes = kernel.startswith("columns")
    pointers = _pointers(step, problem, constants)
    if not by_axes and "lazy" not in kernel:
        del pointers["project"]
    numbers = _axes_numbers(problem, constants) if by_axes else {"n": problem.count}
    # Only the lazy kernels read more than one number a lane from anything but the logits
    aligned = {"logits", "grad_logits"} if problem.aligned else set()
    if "lazy" in kernel and beside.aligned:
        aligned |= {role for role in pointers if _mode(getattr(beside, role, None)) == "dense"}
    unaligned = tuple(role for role in pointers if role not in aligned)
    scratch = _scratch(step, problem)
    if by_axes:
        axis, middle, outer = grid_axes(problem)
        rows, grid = None, (blocks(axis.size, BLOCK), middle.size, outer.size)
    else:
        rows = (structure.each, constants["BLOCK"])
        grid = (programs_for(problem.count, rows), 1, 1)
    return triton_plan(
        step.name, kernel, grid, structure.warps, pointers, unaligned, numbers, constants,
        rows=rows, scratch=scratch,
    )  # fmt: skip


def _scratch(step: Step, problem: Problem) -> tuple[str, int] | None:
    """What stands in for the loss where another launch reduces it."""
    reduction = problem.beside.reduction
    if not step.loss or step.backward or reduction == "none":
        return None
    return ("each", 0) if reduction == "side_mean" else ("partials", 1)


def _plan_sums(problem: Problem) -> LaunchPlan:
    """The sum over what the programs of the first launch wrote, or the mean over the sides."""
    beside, wide = problem.beside, ELEMENT[problem.compute_dtype]
    if beside.reduction == "side_mean":
        return _plan_side_means(problem)
    first = _structure(problem, backward=False)
    if first.kernel.startswith("columns"):
        axis, middle, outer = grid_axes(problem)
        programs = blocks(axis.size, BLOCK) * middle.size * outer.size
    else:
        programs = programs_for(problem.count, (first.each, first.constants["BLOCK"]))
    normalizer = ELEMENT[beside.normalizer] if beside.normalizer else None
    pointers = {"partials": wide, "normalizer": normalizer, "loss": wide}
    constants = {"DIVIDE": _divisor(problem), "BLOCK": SUMS_BLOCK}
    return triton_plan(
        "dfl_loss_sums", "sums_total_kernel", (1, 1, 1), 4, pointers, tuple(pointers),
        {"n": programs, "count": problem.count}, constants, counts=True,
    )  # fmt: skip


def _plan_side_means(problem: Problem) -> LaunchPlan:
    wide, sides, inner = ELEMENT[problem.compute_dtype], problem.beside.sides, problem.beside.inner
    pointers: dict[str, str | None] = {"each": wide, "loss": wide}
    constants = {"SIDES": sides, "BLOCK": BLOCK}
    if inner == 1:
        rows = (sides, BLOCK)
        return triton_plan(
            "dfl_loss_sums", "sums_rows_kernel", (programs_for(problem.count, rows), 1, 1), 4,
            pointers, tuple(pointers), {"n": problem.count}, constants, rows=rows,
        )  # fmt: skip
    grid = (problem.count // (sides * inner), blocks(inner, BLOCK), 1)
    return triton_plan(
        "dfl_loss_sums", "sums_columns_kernel", grid, 4, pointers, tuple(pointers), {"n": inner},
        constants,
    )  # fmt: skip


def triton_plan(
    step: str,
    kernel: str,
    grid: tuple[int, int, int],
    warps: int,
    pointers: dict[str, str | None],
    unaligned: tuple[str, ...],
    numbers: dict[str, int],
    constants: dict[str, Any],
    *,
    multiples: bool = False,
    rows: tuple[int, int] | None = None,
    counts: bool = False,
    scratch: tuple[str, int] | None = None,
) -> LaunchPlan:
    """A plan whose absent tensors, and strides that are 1, are constants, as Triton has them.

    With `multiples`, the kernel is compiled for what strides are multiples of 16.
    """
    constants, arguments = dict(constants), []
    for role, element in pointers.items():
        if element is None:
            constants[f"{role}_ptr"] = None
        else:
            value = scratch[0] if role == "loss" and scratch else role
            arguments.append(Argument(f"{role}_ptr", f"*{element}", value, role not in unaligned))
    for name, number in numbers.items():
        if name.endswith("stride") and number == 1:
            constants[name] = 1
        else:
            divisible = multiples and number % 16 == 0 and name not in LENGTHS
            arguments.append(Argument(name, kind_of(number), number, divisible))
    return LaunchPlan(
        step, "triton", kernel, grid, (32 * warps, 1, 1), tuple(arguments),
        tuple(constants.items()), rows=rows, counts=counts, scratch=scratch,
    )  # fmt: skip


def kind_of(number: int) -> str:
    """The type of an argument."""
    return "i32" if -(2**31) <= number < 2**31 else "i64"


def _mode(beside: Any) -> str:
    return beside.mode if isinstance(beside, Beside) else "dense"


def _by_sides(step: Step, problem: Problem) -> bool:
    """Whether a kernel has to know how many sides there are."""
    beside = problem.beside
    modes = [_mode(beside.weight)]
    if step.backward:
        modes += [_mode(beside.grad_loss), _mode(beside.grad_position), beside.reduction]
    return bool({"sides", "side_mean"}.intersection(modes))


def _divisor(problem: Problem) -> str:
    """What divides a reduced loss, and its gradient."""
    reduction = problem.beside.reduction
    if reduction == "sum":
        return "normalizer" if problem.beside.normalizer else ""
    return {"mean": "count", "side_mean": "sides"}.get(reduction, "")


def _pointers(step: Step, problem: Problem, constants: dict[str, Any]) -> dict[str, str | None]:
    """Element type of each tensor by role, None for those the call does not have."""
    beside, pointers = problem.beside, pointers_of(step, problem)
    if step.loss and beside.target:
        pointers["target"] = ELEMENT[beside.target]
    pointers["weight"] = ELEMENT[beside.weight.dtype] if beside.weight else None
    if step.backward:
        divides = constants["DIVIDE"] == "normalizer" and beside.normalizer
        pointers["normalizer"] = ELEMENT[divides] if divides else None
    return pointers


def _axes_numbers(problem: Problem, constants: dict[str, Any]) -> dict[str, int]:
    """Lengths and strides; 0 as a constant for the strides of what has none of its own."""
    backward = "DIVIDE" in constants
    numbers = axes_numbers(problem, backward)
    own = {"weight": constants["WEIGHT"] == "strided"}
    if backward:
        if constants["DIVIDE"] == "count":
            numbers["count"] = problem.count
        else:
            constants["count"] = 1
        own["upstream"] = "strided" in (constants["GRAD_LOSS"], constants["GRAD_POSITION"])
    for name, strided in own.items():
        for which, axis in zip(("axis", "middle", "outer"), grid_axes(problem), strict=True):
            (numbers if strided else constants)[f"{which}_{name}_stride"] = getattr(axis, name)
    return numbers


def _structure(problem: Problem, backward: bool) -> Structure:
    """Which structure serves which problem best is counted on compiled code.

    chunk and tile where rows are whole 16-byte granules, lazy for other short rows, a padded tile
    for long ones, and lanes with a load a bin for everything that is no contiguous aligned range.
    """
    bins, size = problem.num_bins, problem.dtype.itemsize
    direction = "backward" if backward else "forward"
    granule = 16 // size
    uniform = not problem.project
    if problem.packed and problem.aligned and uniform:
        whole = bins % granule == 0
        if whole and not backward and bins <= UNROLLED_BINS:
            return Structure("rows_chunk_forward_kernel", {"CHUNK": granule, "BLOCK": BLOCK})
        power_of_two = bins & (bins - 1) == 0
        if bins > LAZY_BINS or (whole and power_of_two):
            width = 1 << (bins - 1).bit_length()
            constants = {"BLOCK": min(BLOCK, 2048 // width), "BLOCK_K": width}
            return Structure(f"rows_tile_{direction}_kernel", constants)
    if problem.packed and problem.aligned and bins <= LAZY_BINS:
        if not backward and bins > LAZY_WIDE_BINS:
            granule = min(granule, 4)
        constants = {"PROJECT": problem.project, "C": granule, "BLOCK": 32}
        return Structure(f"rows_lazy_{direction}_kernel", constants, 1, granule)
    constants = {"PROJECT": problem.project, "UNROLL": bins <= UNROLLED_BINS, "BLOCK": BLOCK}
    return Structure(f"columns_{direction}_kernel", constants)
