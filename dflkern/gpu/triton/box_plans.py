"""Launch plans of the Triton kernels of boxes."""

from __future__ import annotations

from typing import Any

from ..box_arguments import (
    BLOCK,
    SUMS,
    box_grid,
    numbers_of,
    pointers_of,
    programs_of,
    whole_granules,
)
from ..box_problem import BoxProblem
from ..launch_plan import UNROLLED_BINS, LaunchPlan, Step, blocks
from .plans import triton_plan

LOSS_BLOCK = 32  # anchors of a program of the loss, which is one warp
CLASSES = 128  # scores of an anchor that a warp of the loss loads at once, at most
SUMS_BLOCK, SUMS_WARPS = 4096, 16
KERNELS = {
    "decode_boxes": "boxes_decode_forward_kernel",
    "decode_boxes_backward": "boxes_decode_backward_kernel",
    "box_loss": "boxloss_forward_kernel",
    "box_loss_sums": "boxloss_sums_kernel",
    "box_loss_backward": "boxloss_backward_kernel",
}
# Read where they are, while everything else is allocated or made aligned for the launch
UNALIGNED = ("foreground", "normalizer", "grad_iou", "grad_dfl")


def plan_boxes(step: Step, problem: BoxProblem) -> LaunchPlan:
    """The launch of one step of an operator."""
    numbers = {} if step is SUMS else numbers_of(step, problem)
    if step.decode:
        grid, warps, constants = box_grid(problem), BLOCK // 32, _decode_constants(step, problem)
    else:
        grid, warps, constants = box_grid(problem, LOSS_BLOCK), 1, _loss_constants(step, problem)
        if not step.backward:
            numbers["programs"] = programs_of(grid)
        if step is SUMS:
            grid, warps, constants = (1, 1, 1), SUMS_WARPS, {"BLOCK": SUMS_BLOCK}
    unaligned = [*UNALIGNED, *["logits"] * (not problem.aligned)]
    if problem.weight is not None and not problem.weight.aligned:
        unaligned.append("weight")
    return triton_plan(
        step.name, KERNELS[step.name], grid, warps, pointers_of(step, problem), tuple(unaligned),
        numbers, constants, multiples=True,
        scratch=("partials", 3) if step.name == "box_loss" else None,
    )  # fmt: skip


def _decode_constants(step: Step, problem: BoxProblem) -> dict[str, Any]:
    return {
        "STRIDE": problem.stride,
        "CXCYWH": problem.box_format == "cxcywh",
        **_bins(step, problem),
        "BLOCK": BLOCK,
    }


def _loss_constants(step: Step, problem: BoxProblem) -> dict[str, Any]:
    assert problem.weight is not None
    classes = problem.weight.classes
    constants: dict[str, Any] = {
        "MARGIN": problem.margin,
        "KIND": problem.iou,
        "SCORES": classes is not None,
        **_bins(step, problem),
    }
    if step.backward:
        bins = problem.num_bins
        constants["PACKED"] = problem.gradient[1:] == (4 * bins, bins, 1)
    scores = 16 * blocks(min(classes or 1, CLASSES), 16)
    return {**constants, "BLOCK_C": scores, "BLOCK": LOSS_BLOCK}


def _bins(step: Step, problem: BoxProblem) -> dict[str, Any]:
    """How lanes read their bins."""
    bins, granule = problem.num_bins, 16 // problem.dtype.itemsize
    unroll = bins <= UNROLLED_BINS
    chunk = granule if unroll and whole_granules(step, problem) else 1
    if (step.backward or step.loss) and bins < 16:
        chunk = 1  # Triton would take these tiles through shared memory
    return {"K": bins, "PROJECT": problem.project, "UNROLL": unroll, "CHUNK": chunk}
