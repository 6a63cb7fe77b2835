"""Launch plans of the Triton kernels of distributions, by structure."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ..arguments import axes_numbers, grid_axes, pointers_of
from ..launch_plan import LAZY_BINS, UNROLLED_BINS, Argument, LaunchPlan, Step, blocks

# A lane of the lazy forward kernel holds C rows' worth of granules in flight; with 8-element
# granules and more bins than this the compiler spills.
LAZY_WIDE_BINS = 24
MANY = 1 << 18  # distributions that fill a GPU with four-warp programs


def plan_distributions(step: Step, problem: Problem) -> LaunchPlan:
    """The launch of a step on problem, which has at least one distribution."""
    kernel, own, grid, warps = _structure(problem, step.backward)
    constants: dict[str, Any] = {
        "K": problem.num_bins, "MARGIN": problem.margin, "LOSS": step.loss,
        "POSITION": step.decode, **own,
    }  # fmt: skip
    pointers = pointers_of(step, problem)
    by_axes = kernel.startswith("columns")
    if not by_axes and "lazy" not in kernel:
        del pointers["project"]
    numbers = axes_numbers(problem, step.backward) if by_axes else {"n": problem.count}
    unaligned = () if problem.aligned else ("logits",)
    return triton_plan(step.name, kernel, grid, warps, pointers, unaligned, numbers, constants)


def triton_plan(
    name: str,
    kernel: str,
    grid: tuple[int, int, int],
    warps: int,
    pointers: dict[str, str | None],
    unaligned: tuple[str, ...],
    numbers: dict[str, int],
    constants: dict[str, Any],
) -> LaunchPlan:
    """A plan whose absent tensors, and numbers that are 1, are constants, as Triton has them."""
    constants, arguments = dict(constants), []
    for role, element in pointers.items():
        if element is None:
            constants[f"{role}_ptr"] = None
        else:
            arguments.append(Argument(f"{role}_ptr", f"*{element}", role, role not in unaligned))
    for number, value in numbers.items():
        if value == 1:
            constants[number] = 1
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            arguments.append(Argument(number, kind, value, value % 16 == 0))
    return LaunchPlan(
        name, "triton", kernel, grid, (32 * warps, 1, 1), tuple(arguments),
        tuple(constants.items()),
    )  # fmt: skip


def _structure(
    problem: Problem, backward: bool
) -> tuple[str, dict[str, Any], tuple[int, int, int], int]:
    """Kernel, its own constants, grid and warps.

    Which structure serves which problem best is counted on compiled code: chunk and tile where
    rows are whole 16-byte granules, lazy for other short rows, a padded tile for long ones, and
    lanes with a load a bin for everything that is no contiguous aligned range.
    """
    bins, size, n = problem.num_bins, problem.dtype.itemsize, problem.count
    direction = "backward" if backward else "forward"
    granule = 16 // size
    uniform = not problem.project
    if problem.packed and problem.aligned and uniform:
        whole = bins % granule == 0
        if whole and not backward and bins <= UNROLLED_BINS:
            constants = {"CHUNK": granule, "BLOCK": 128}
            return "rows_chunk_forward_kernel", constants, (blocks(n, 128), 1, 1), 4
        power_of_two = bins & (bins - 1) == 0
        if bins > LAZY_BINS or (whole and power_of_two):
            width = 1 << (bins - 1).bit_length()
            block = min(128, 2048 // width)
            constants = {"BLOCK": block, "BLOCK_K": width}
            return f"rows_tile_{direction}_kernel", constants, (blocks(n, block), 1, 1), 4
    if problem.packed and problem.aligned and bins <= LAZY_BINS:
        if not backward and bins > LAZY_WIDE_BINS:
            granule = min(granule, 4)
        warps = 4 if n >= MANY else 1
        block = 32 * warps
        grid = (blocks(n // granule, block) + (n % granule > 0), 1, 1)
        constants = {"PROJECT": problem.project, "C": granule, "BLOCK": block}
        return f"rows_lazy_{direction}_kernel", constants, grid, warps
    axis, middle, outer = grid_axes(problem)
    constants = {"PROJECT": problem.project, "UNROLL": bins <= UNROLLED_BINS, "BLOCK": 128}
    grid = (blocks(axis.size, 128), middle.size, outer.size)
    return f"columns_{direction}_kernel", constants, grid, 4
