"""Which anchors answer for which object: `task_aligned_assign`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import (
    IOU_KINDS,
    check_anchor_points,
    check_at_least,
    check_choice,
    check_count,
    check_device,
    check_shape,
    check_tensor,
)
from ..operators.run import call
from ..operators.table import TASK_ALIGNED_ASSIGN
from ..problem import compute_dtype, filled
from .assignment_checks import check_class_logits, check_objects

CONFLICTS = ("inside", "claimed", "all")


class Assignment(NamedTuple):
    """What `task_aligned_assign` returns.

    Attributes:
        matched: (B, A) int32, the index of each anchor's object among all objects of the batch;
            -1 for background.
        score: (B, A), how well each anchor fits its object, from 0 to 1; 0 for background.
        score_sum: 0-dim, the sum of all scores, not clamped.
    """

    matched: Tensor
    score: Tensor
    score_sum: Tensor


def task_aligned_assign(
    class_logits: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    stride: Tensor | float,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_image: Tensor,
    *,
    dim: int = -1,
    topk: int = 10,
    topk2: int | None = None,
    alpha: float = 0.5,
    beta: float = 6.0,
    iou: str = "ciou",
    min_side: float = 0.0,
    conflicts: str = "inside",
    eps: float = 1e-9,
) -> Assignment:
    """Assign anchors to objects by classification and localization together.

    For an object and an anchor of the same image,

        overlap = IoU(object's box, predicted box), clamped to [0, 1]; NaN counts as 0
        metric  = sigmoid(logit of the object's label)^alpha · overlap^beta; NaN counts as 0

    1. The candidates of an object are the anchors whose point lies inside its box, by more than eps
       pixels on all four sides. With min_side above 0 this box is centre ± max(size, min_side) / 2,
       in this step only.
    2. An object claims its topk candidates of the largest metric. A metric of 0 is never claimed;
       of equal metrics the first anchor is.
    3. An anchor that several objects claim goes to the one of the largest overlap, of equal ones
       to the first; `conflicts` says among which objects.
    4. With topk2 below topk, an object then keeps its topk2 anchors of the largest metric above 0.
    5. score = metric · (largest overlap) / (largest metric + eps), both over the object's anchors.

    An object is ignored if its label is not in [0, C) or its image not in [0, B), and if its box is
    not finite, is empty, or has corners whose coordinates add up to 0 or less, as padding has.

    Args:
        class_logits: raw class scores, fp16, bf16, fp32 or fp64, (B, A, C) with dim=-1 or (B, C, A)
            with dim=1, any strides. Read in place.
        boxes: the predicted boxes as xyxy in pixels, (B, A, 4) with dim=-1 or (B, 4, A) with dim=1:
            what `decode_boxes` returns given a stride.
        anchor_points: (A, 2) as (x, y) in cells, from `make_anchors`.
        stride: pixels per cell: a number, (A,) or (A, 1).
        gt_boxes: the boxes of all objects of the batch, (N, 4) as xyxy in pixels.
        gt_labels: the class of each object, (N,) int32 or int64.
        gt_image: the index of each object's image in the batch, (N,) int32 or int64, in any order.
        dim: the axis of the classes, and of the numbers of a box: -1 or 1.
        topk: how many anchors an object claims at most.
        topk2: how many it keeps after conflicts, from 1 to topk; None: all.
        alpha: the power of the class score, at least 0.
        beta: the power of the overlap, at least 0.
        iou: "iou", "giou", "diou" or "ciou"; see `paired_box_iou`.
        min_side: in pixels, at least 0. Ultralytics takes its second stride, 16.
        conflicts: "inside" (all objects that have the anchor as a candidate), "claimed" (those that
            claim it), or "all" (all objects of the image).
        eps: in pixels in step 1, a number in step 5; at least 0.

    Returns:
        An `Assignment` (matched, score, score_sum). matched is int32; score and score_sum are fp64
        for fp64 logits, else fp32, in which all arithmetic is done. No gradient flows through them.

    Raises:
        TypeError: for tensors of the wrong dtype, or settings that are not numbers.
        ValueError: for shapes that do not fit, tensors on several devices, or settings out of
            range.

    TOOD: Task-aligned One-stage Object Detection, Feng et al. 2021,
    https://arxiv.org/abs/2108.07755.
    """
    op = "task_aligned_assign"
    dim = check_class_logits(op, class_logits, dim)
    batch, anchors = class_logits.shape[0], class_logits.shape[3 - dim]
    boxes = _constant(op, "boxes", boxes, class_logits)
    check_shape(op, "boxes", boxes, (batch, anchors, 4) if dim == 2 else (batch, 4, anchors))
    anchor_points = _constant(op, "anchor_points", anchor_points, class_logits)
    check_anchor_points(op, anchor_points, class_logits, anchors)
    if isinstance(stride, Tensor):
        stride = _constant(op, "stride", stride, class_logits)
        check_shape(op, "stride", stride, (anchors, 1), (anchors,))
    else:
        stride = filled(op, "stride", stride, (anchors,), class_logits)
    gt_boxes = _constant(op, "gt_boxes", gt_boxes, class_logits)
    check_objects(op, gt_boxes, gt_labels, gt_image, class_logits)
    check_count(op, "topk", topk)
    if topk2 is not None:
        check_count(op, "topk2", topk2, topk)
    dtype = compute_dtype(class_logits.dtype)
    for name, value in (("alpha", alpha), ("beta", beta), ("min_side", min_side), ("eps", eps)):
        check_at_least(op, name, value, 0, dtype)
    check_choice(op, "iou", iou, IOU_KINDS)
    check_choice(op, "conflicts", conflicts, CONFLICTS)
    return Assignment(*call(
        TASK_ALIGNED_ASSIGN, class_logits=class_logits.detach(), boxes=boxes,
        anchor_points=anchor_points, stride=stride, gt_boxes=gt_boxes, gt_labels=gt_labels,
        gt_image=gt_image, dim=dim, topk=topk, topk2=topk if topk2 is None else topk2,
        alpha=float(alpha), beta=float(beta), iou=iou, min_side=float(min_side),
        conflicts=conflicts, eps=float(eps),
    ))  # fmt: skip


def _constant(op: str, name: str, value: Tensor, logits: Tensor) -> Tensor:
    """A floating-point tensor on the device of the logits, without its gradient."""
    check_tensor(op, name, value)
    check_device(op, name, value, logits)
    return value.detach()
