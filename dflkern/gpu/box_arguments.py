"""The tensors and numbers that kernels of boxes take, on either GPU backend."""

from __future__ import annotations

from .box_problem import BoxProblem
from .launch_plan import ELEMENT, STEPS, Step, blocks

BLOCK = 128  # anchors of a block
SUMS = STEPS["box_loss_sums"]


def box_grid(problem: BoxProblem, block: int = BLOCK) -> tuple[int, int, int]:
    """Blocks of anchors, and images."""
    return blocks(problem.anchors, block), problem.batch, 1


def whole_granules(step: Step, problem: BoxProblem) -> bool:
    """Whether every distribution, and its gradient in backward, is whole 16-byte granules."""
    granule = 16 // problem.dtype.itemsize
    places = [problem.logits]
    if step.backward:
        places.append(problem.gradient)
    return (
        problem.aligned
        and problem.num_bins % granule == 0
        and all(place.bin == 1 for place in places)
        and all(stride % granule == 0 for place in places for stride in place[:3])
    )


def pointers_of(step: Step, problem: BoxProblem) -> dict[str, str | None]:
    """Element type of each tensor by role, None for those the call does not have."""
    logits, wide = ELEMENT[problem.dtype], ELEMENT[problem.compute_dtype]
    stride = wide if problem.stride else None
    project = wide if problem.project else None
    if step.decode and step.backward:
        return {"logits": logits, "stride": stride, "project": project, "grad_boxes": wide,
                "grad_logits": logits}  # fmt: skip
    if step.decode:
        return {"logits": logits, "anchor_points": wide, "stride": stride, "project": project,
                "boxes": wide}  # fmt: skip
    if step is SUMS:
        return dict.fromkeys(("partials", "normalizer", "iou_loss", "dfl_loss"), wide)
    assert problem.weight is not None
    pointers: dict[str, str | None] = {
        "logits": logits,
        "anchor_points": wide,
        "target_boxes": wide,
        "weight": ELEMENT[problem.weight.dtype],
        "foreground": "u8" if problem.foreground else None,
        "project": project,
    }
    if not step.backward:
        return {**pointers, "partials": wide, "anchor_weight": wide if problem.keep else None}
    return {**pointers, "normalizer": wide, "grad_iou": wide, "grad_dfl": wide,
            "grad_logits": logits}  # fmt: skip


def numbers_of(step: Step, problem: BoxProblem) -> dict[str, int]:
    """Lengths and strides, as the kernels take them."""
    numbers = {
        "n": problem.anchors,
        "batch_stride": problem.logits.batch,
        "anchor_stride": problem.logits.anchor,
        "side_stride": problem.logits.side,
        "bin_stride": problem.logits.bin,
    }
    if step.decode:
        numbers |= {
            "box_batch_stride": 4 * problem.anchors,
            "box_anchor_stride": 4 if problem.sides_last else 1,
            "box_side_stride": 1 if problem.sides_last else problem.anchors,
        }
    if step.backward:
        numbers |= {
            "batch_grad_stride": problem.gradient.batch,
            "anchor_grad_stride": problem.gradient.anchor,
            "side_grad_stride": problem.gradient.side,
            "grad_bin_stride": problem.gradient.bin,
        }
    if step.loss:
        assert problem.weight is not None
        numbers |= {
            "weight_batch_stride": problem.weight.batch,
            "weight_anchor_stride": problem.weight.anchor,
            "weight_class_stride": problem.weight.score,
            "classes": problem.weight.classes or 0,
        }
    return numbers


def programs_of(grid: tuple[int, int, int]) -> int:
    """How many sums the first launch of box_loss writes of each kind."""
    across, images, _ = grid
    return across * images
