"""The tensors and numbers that kernels of distributions take, on either GPU backend."""

from __future__ import annotations

from ..problem import Axis, Problem
from .launch_plan import ELEMENT, GRID_LIMIT, Step


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


def pointers_of(step: Step, problem: Problem) -> dict[str, str | None]:
    """Element type of each tensor by role, None for those the operator does not have."""
    logits, wide = ELEMENT[problem.dtype], ELEMENT[problem.compute_dtype]
    pointers = {
        "logits": logits,
        "target": wide if step.loss else None,
        "project": wide if problem.project else None,
    }
    loss, position = wide if step.loss else None, wide if step.decode else None
    if not step.backward:
        return {**pointers, "loss": loss, "position": position}
    return {**pointers, "grad_loss": loss, "grad_position": position, "grad_logits": logits}


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
