"""Launch plans: pure values that say how one operator runs on one `Problem`.

Making a plan imports no Triton and touches no device, so that a plan can be explained, compiled for
another machine, or run in an emulator; what is launched is exactly what the plan says.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..box_problem import BoxProblem
from ..problem import Axis, Problem

ELEMENT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
GRID_LIMIT = 65535  # of the grid's second and third axis
UNROLLED_BINS = 64  # above, a lane cannot hold a distribution in registers
LAZY_BINS = 33
# A lane of the lazy forward kernel holds C rows' worth of granules in flight; with 8-element
# granules and more bins than this the compiler spills.
LAZY_WIDE_BINS = 24
MANY = 1 << 18  # distributions that fill a GPU with four-warp programs


@dataclass(frozen=True)
class Argument:
    """A runtime argument of a kernel.

    `value` is the role of a tensor ("logits", "target", …) for a pointer, whose type begins with
    "*", else the number; the type "null" is a pointer to nothing. `divisible` says that the pointer
    or number is a multiple of 16.
    """

    name: str
    type: str
    value: str | int | float
    divisible: bool = False


@dataclass(frozen=True)
class LaunchPlan:
    """How one operator runs on one problem: kernel, grid, block, arguments, constants.

    `block` counts threads on NVIDIA GPUs. `shared` is the bytes of dynamic shared memory, beside
    what the kernel itself declares; None where the compiler decides.
    """

    op: str
    backend: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Any], ...]
    shared: int | None = None

    @property
    def num_warps(self) -> int:
        """Warps of 32 threads in a block."""
        return self.block[0] // 32

    @property
    def module(self) -> str:
        """The module of `dflkern.kernels` that holds the kernel."""
        return self.kernel.partition("_")[0]


@functools.lru_cache(maxsize=4096)
def plan(op: str, problem: Problem, backend: str) -> LaunchPlan:
    """The launch of op on problem.

    Args:
        op: an operator's name, with "_backward" for its gradient: "dfl_loss", "dfl_decode",
            "dfl_loss_and_decode", "dfl_loss_backward", …; for a BoxProblem "decode_boxes",
            "box_loss", their gradients, or "box_loss_sums", the second launch of "box_loss".
        problem: with at least one distribution.
        backend: "triton" or "cuda".

    Returns:
        A pure value; the same for the same arguments.

    Raises:
        ValueError: for a backend without launch plans, or a problem without distributions.
    """
    if backend not in ("triton", "cuda"):
        raise ValueError(
            f'plan: the backend "{backend}" has no launch plans; "triton" and "cuda" have.'
        )
    if not problem.count:
        raise ValueError("plan: the problem has no distributions, so nothing is launched.")
    if isinstance(problem, BoxProblem):
        if backend == "cuda":
            from .cuda_box_plans import plan_cuda_boxes

            return plan_cuda_boxes(op, problem)
        from .box_plans import plan_triton_boxes

        return plan_triton_boxes(op, problem)
    if backend == "cuda":
        from .cuda_plans import plan_cuda

        return plan_cuda(op, problem)
    return _plan_triton(op, problem)


def _plan_triton(op: str, problem: Problem) -> LaunchPlan:
    backward = op.endswith("_backward")
    kernel, constants, grid, warps = _structure(problem, backward)
    loss, position = "loss" in op, "decode" in op
    constants = {"K": problem.num_bins, "MARGIN": problem.margin, "LOSS": loss,
                 "POSITION": position, **constants}  # fmt: skip
    pointers = pointers_of(problem, backward, loss, position)
    if kernel.startswith("columns"):
        numbers = axes_numbers(problem, backward)
    else:
        numbers = {"n": problem.count}
    if not kernel.startswith("columns") and "lazy" not in kernel:
        del pointers["project"]
    arguments = []
    for role, element in pointers.items():
        if element is None:
            constants[f"{role}_ptr"] = None
        else:
            aligned = problem.aligned or role != "logits"
            arguments.append(Argument(f"{role}_ptr", f"*{element}", role, aligned))
    for name, value in numbers.items():
        if value == 1:  # as Triton specialises it
            constants[name] = 1
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            arguments.append(Argument(name, kind, value, value % 16 == 0))
    return LaunchPlan(
        op, "triton", kernel, grid, (32 * warps, 1, 1), tuple(arguments), tuple(constants.items())
    )


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


def blocks(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def grid_axes(problem: Problem) -> tuple[Axis, Axis, Axis]:
    """The lanes' axis, and the two that the grid's second and third axis walk.

    Lanes walk the axis of stride 1 where that is long enough to fill warps, else the longest axis.
    """
    axes = sorted(problem.axes, key=lambda axis: axis.size, reverse=True)
    unit = [axis for axis in axes if axis.logits == 1 and axis.size >= 32]
    if unit and all(axis.size <= GRID_LIMIT for axis in axes if axis is not unit[0]):
        axes.remove(unit[0])
        axes.insert(0, unit[0])
    axes += [Axis(1, 0, 0, 0)] * (3 - len(axes))
    return axes[0], axes[1], axes[2]


def beyond_grid(problem: Problem) -> list[str]:
    """Why a problem does not fit a GPU's grid; empty if it does."""
    if isinstance(problem, BoxProblem):
        if problem.batch <= GRID_LIMIT:
            return []
        return [f"there are more than {GRID_LIMIT} images, the limit of a GPU's grid"]
    _, middle, outer = grid_axes(problem)
    if max(middle.size, outer.size) <= GRID_LIMIT:
        return []
    return [f"two axes are longer than {GRID_LIMIT}, the limit of a GPU's grid"]


def pointers_of(
    problem: Problem, backward: bool, loss: bool, position: bool
) -> dict[str, str | None]:
    """Element type of each tensor by role, None for those the operator does not have."""
    logits, wide = ELEMENT[problem.dtype], ELEMENT[problem.compute_dtype]
    pointers = {
        "logits": logits,
        "target": wide if loss else None,
        "project": wide if problem.project else None,
    }
    if not backward:
        return {**pointers, "loss": wide if loss else None, "position": wide if position else None}
    return {
        **pointers,
        "grad_loss": wide if loss else None,
        "grad_position": wide if position else None,
        "grad_logits": logits,
    }


def axes_numbers(problem: Problem, backward: bool) -> dict[str, int]:
    """The length of the lanes' axis and all strides, as kernels for any strides take them."""
    axis, middle, outer = grid_axes(problem)
    numbers = {
        "n": axis.size,
        "bin_stride": problem.bin_stride,
        "axis_stride": axis.logits,
        "middle_stride": middle.logits,
        "outer_stride": outer.logits,
        "axis_output_stride": axis.output,
        "middle_output_stride": middle.output,
        "outer_output_stride": outer.output,
    }
    if backward:
        numbers |= {
            "grad_bin_stride": problem.grad_bin_stride,
            "axis_grad_stride": axis.grad,
            "middle_grad_stride": middle.grad,
            "outer_grad_stride": outer.grad,
        }
    return numbers
