"""The public functions of a detection loss around the distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checks import (
    IOU_KINDS,
    check_anchor_points,
    check_choice,
    check_other,
    check_shape,
)
from ..operators.run import call
from ..operators.table import CLASS_LOSS, DISTANCE_LOSS
from ..problem import per_anchor, scalar
from .checks import (
    check_class_logits,
    check_image_size,
    check_integers,
    check_layout,
    check_matched,
    check_not_negative,
    check_target_boxes,
    check_targets,
    check_vector,
)

CLASS_KINDS = ("bce", "varifocal", "quality")


def class_loss(
    class_logits: Tensor,
    matched: Tensor,
    score: Tensor,
    gt_labels: Tensor,
    normalizer: Tensor | float,
    *,
    dim: int = -1,
    kind: str = "bce",
    alpha: float = 0.75,
    gamma: float = 2.0,
    detach_modulation: bool = False,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The classification loss of a dense detector, against the target that an assignment implies.

    The target y of a logit z is the anchor's score at the class of its object, and 0 everywhere
    else. With p = sigmoid(z), CE = −y log p − (1 − y) log(1 − p) and W the class weights,

        bce        Σ W CE / normalizer
        varifocal  Σ W m CE / normalizer,    m = y at the object's class, α p^γ elsewhere
        quality    Σ W m CE / normalizer,    m = |p − y|^γ

    summed over all anchors and classes, background included. No tensor of the targets is made.

    Args:
        class_logits: (B, A, C) with dim=-1, or a head's (B, C, A) with dim=1, fp16, bf16, fp32 or
            fp64, any strides. Read in place, never changed.
        matched: (B, A) int32 or int64: the index of each anchor's object in gt_labels. Background
            where it is below 0 or not below N, and where the label is not one of 0 to C − 1.
        score: (B, A), any float dtype: the target at the object's class, usually between 0 and 1.
            Not read for background.
        gt_labels: (N,) int32 or int64: the class of each object of the batch.
        normalizer: divides the sum: a float or a 0-dim tensor, used as given; usually the sum of
            all scores, at least 1.
        dim: the axis of the classes, -1 or 1.
        kind: "bce", binary cross-entropy; "varifocal", the varifocal loss; "quality", the quality
            focal loss.
        alpha: factor of varifocal loss where the target is 0; at least 0.
        gamma: exponent of the modulation m; at least 0. GFL calls it β.
        detach_modulation: whether m is a constant in backward, as in D-FINE.
        class_weight: (C,), any float dtype: factor of each class.

    Returns:
        0-dim, fp64 for fp64 logits, else fp32, whatever autocast says. Its gradient flows to
        class_logits only, in their dtype; it can be differentiated again. NaN in a logit, or in the
        score of an anchor with an object, gives NaN. An infinite logit gives the limit: a loss of
        inf where it contradicts its target, else 0. The loss of no logits is 0.

    Raises:
        TypeError: for tensors of the wrong dtype.
        ValueError: for shapes that do not fit, an unknown kind, alpha or gamma below 0 or not
            finite, tensors on several devices, or a tensor other than class_logits that requires
            grad.

    Varifocal loss: Zhang et al. 2021, https://arxiv.org/abs/2008.13367. Quality focal loss: Li et
    al. 2020, https://arxiv.org/abs/2006.04388.
    """
    op = "class_loss"
    dim = check_class_logits(op, class_logits, dim)
    anchors = (class_logits.shape[0], class_logits.shape[3 - dim])
    check_matched(op, matched, class_logits, anchors)
    check_other(op, "score", score, class_logits)
    check_shape(op, "score", score, anchors)
    check_integers(op, "gt_labels", gt_labels, class_logits)
    check_vector(op, "gt_labels", gt_labels, "the class of each object")
    check_choice(op, "kind", kind, CLASS_KINDS)
    check_not_negative(op, "alpha", alpha)
    check_not_negative(op, "gamma", gamma)
    if class_weight is not None:
        check_other(op, "class_weight", class_weight, class_logits)
        check_shape(op, "class_weight", class_weight, (class_logits.shape[dim],))
    loss: Tensor = call(
        CLASS_LOSS, class_logits=class_logits, matched=matched, score=score, gt_labels=gt_labels,
        normalizer=scalar(op, "normalizer", normalizer, class_logits), class_weight=class_weight,
        dim=dim, kind=kind, alpha=float(alpha), gamma=float(gamma),
        detach_modulation=bool(detach_modulation),
    )  # fmt: skip
    return loss


def distance_loss(
    distances: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | float,
    *,
    stride: Tensor | float,
    image_size: Sequence[float],
    dim: int = -1,
    foreground: Tensor | None = None,
    matched: Tensor | None = None,
    iou: str = "ciou",
) -> tuple[Tensor, Tensor]:
    """The two box losses of a head that predicts distances themselves, without bins.

        iou_loss = Σ w (1 − IoU) / normalizer
        l1_loss  = Σ w (mean over the 4 sides of |d − t| · stride / image side) / normalizer

    with d the predicted and t the wanted distances in cells; left and right are divided by the
    image's width, top and bottom by its height. The IoU is taken in cells. Background anchors and
    anchors of weight 0 never matter, whatever stands in them: their gradient is exactly 0. Without
    foreground both losses are 0, whatever the normalizer.

    Args:
        distances: (B, A, 4) with dim=-1, or a head's (B, 4, A) with dim=1: left, top, right and
            bottom in cells, fp16, bf16, fp32 or fp64, any strides. Never changed.
        anchor_points: (A, 2) as (x, y) in cells, from `make_anchors`.
        target_boxes: (B, A, 4) as xyxy in pixels, or (N, 4) with matched.
        weight: (B, A), or class scores (B, A, C) that are summed over C.
        normalizer: a float or a 0-dim tensor, used as given; usually the sum of all weights, at
            least 1.
        stride: pixels per cell: a number, (A,) or (A, 1).
        image_size: (height, width) of the network's input in pixels.
        dim: the axis of the sides, -1 or 1.
        foreground: (B, A) bool; None: all anchors.
        matched: (B, A) int32 or int64: the index of each anchor's box in target_boxes; background
            where it is below 0 or not below N. Not together with foreground.
        iou: "iou", "giou", "diou" or "ciou"; see `paired_box_iou`. CIoU's α is a constant in
            backward.

    Returns:
        (iou_loss, l1_loss), both 0-dim, fp64 for fp64 distances, else fp32. Gradients flow to the
        distances only, in their dtype; they can be differentiated again.

    Raises:
        TypeError: for tensors of the wrong dtype.
        ValueError: for shapes that do not fit, an unknown iou, foreground together with matched, or
            other tensors that require grad.
    """
    op = "distance_loss"
    dim = check_layout(op, "distances", distances, dim, "4")
    check_shape(op, "distances", distances, _with_sides(distances, dim))
    anchors = (distances.shape[0], distances.shape[3 - dim])
    check_anchor_points(op, anchor_points, distances, anchors[1])
    check_target_boxes(op, target_boxes, weight, foreground, matched, distances, anchors)
    stride = per_anchor(op, "stride", stride, anchors[1], distances)
    check_choice(op, "iou", iou, IOU_KINDS)
    losses: tuple[Tensor, Tensor] = call(
        DISTANCE_LOSS, distances=distances, anchor_points=anchor_points, target_boxes=target_boxes,
        weight=weight, normalizer=scalar(op, "normalizer", normalizer, distances), stride=stride,
        foreground=foreground, matched=matched, dim=dim, iou=iou,
        image_size=check_image_size(op, image_size),
    )  # fmt: skip
    return losses


def _with_sides(distances: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of the distances, with the 4 sides that they must have."""
    return (*distances.shape[:dim], 4, *distances.shape[dim + 1 :])


def pack_targets(targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of a batch in one tensor each, from torchvision's form of targets.

    Args:
        targets: for each image of the batch a dictionary with "boxes", (n, 4) as xyxy in pixels,
            and "labels", (n,) int32 or int64; other keys are ignored. n may be 0.

    Returns:
        (gt_boxes, gt_labels, gt_image): (N, 4), (N,) and (N,), where gt_image, int64, is the index
        of each object's image.

    Raises:
        TypeError: for anything else than a list of such dictionaries, or tensors of other dtypes.
        ValueError: for an empty list, shapes that do not fit, and images with tensors of different
            dtypes or devices.
    """
    check_targets(targets)
    boxes = [target["boxes"] for target in targets]
    image = [
        torch.full((len(each),), index, dtype=torch.int64, device=each.device)
        for index, each in enumerate(boxes)
    ]
    return torch.cat(boxes), torch.cat([target["labels"] for target in targets]), torch.cat(image)
