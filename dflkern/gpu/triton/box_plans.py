"""Launch plans of the Triton kernels of boxes."""

from __future__ import annotations

from typing import Any

from ...box_problem import BoxProblem
from ..box_arguments import BLOCK, SUMS, box_grid, numbers_of, pointers_of, whole_granules
from ..launch_plan import UNROLLED_BINS, LaunchPlan, Step
from .plans import triton_plan

SUMS_BLOCK = 1024
KERNELS = {
    "decode_boxes": "boxes_decode_forward_kernel",
    "decode_boxes_backward": "boxes_decode_backward_kernel",
    "box_loss": "boxes_loss_forward_kernel",
    "box_loss_sums": "boxes_loss_sums_kernel",
    "box_loss_backward": "boxes_loss_backward_kernel",
}
# Read where they are, while everything else is allocated or made aligned for the launch
UNALIGNED = ("weight", "foreground", "normalizer", "grad_iou", "grad_dfl")


def plan_boxes(step: Step, problem: BoxProblem) -> LaunchPlan:
    """The launch of one step of an operator."""
    if step is SUMS:
        grid, warps = (1, 1, 1), 4
        constants: dict[str, Any] = {"BLOCK": SUMS_BLOCK}
    else:
        grid, warps = box_grid(problem), BLOCK // 32
        constants = _constants(step, problem)
    unaligned = UNALIGNED if problem.aligned else (*UNALIGNED, "logits")
    return triton_plan(
        step.name, KERNELS[step.name], grid, warps, pointers_of(step, problem), unaligned,
        numbers_of(step, problem), constants,
    )  # fmt: skip


def _constants(step: Step, problem: BoxProblem) -> dict[str, Any]:
    bins, granule = problem.num_bins, 16 // problem.dtype.itemsize
    unroll = bins <= UNROLLED_BINS
    chunk = granule if unroll and whole_granules(step, problem) else 1
    if step.backward and bins < 16:
        chunk = 1  # Triton would take these tiles through shared memory
    constants: dict[str, Any] = {"K": bins, "PROJECT": problem.project}
    if step.decode:
        constants |= {"STRIDE": problem.stride, "CXCYWH": problem.box_format == "cxcywh"}
    else:
        assert problem.weight is not None
        constants |= {
            "MARGIN": problem.margin,
            "KIND": problem.iou,
            "FOREGROUND": problem.foreground,
            "SCORES": problem.weight.classes is not None,
        }
    return {**constants, "UNROLL": unroll, "CHUNK": chunk, "BLOCK": BLOCK}
