"""Task-aligned assignment by its definition: every object against every anchor of its image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import column
from ..iou import paired_box_iou
from ..problem import compute_dtype
from .reductions import total


def task_aligned_assign(
    class_logits: Tensor,
    boxes: Tensor,
    anchor_points: Tensor,
    stride: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_image: Tensor,
    dim: int,
    topk: int,
    topk2: int,
    alpha: float,
    beta: float,
    iou: str,
    min_side: float,
    conflicts: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results (B, A), (B, A) and (); tensors below have a row (N, A) for each object.

    An object's row is on the anchors of its image.
    """
    class_logits, boxes = class_logits.detach(), boxes.detach()
    anchor_points, gt_boxes = anchor_points.detach(), gt_boxes.detach()
    if dim == 1:
        class_logits, boxes = class_logits.mT, boxes.mT
    batch, anchors, classes = class_logits.shape
    dtype, objects = compute_dtype(class_logits.dtype), len(gt_boxes)
    matched = torch.full((batch, anchors), -1, dtype=torch.int32, device=class_logits.device)
    score = torch.zeros((batch, anchors), dtype=dtype, device=class_logits.device)
    if 0 in (batch, anchors, classes, objects):
        return matched, score, total(score)

    gt_boxes = gt_boxes.to(dtype)
    valid = _is_box(gt_boxes) & _is_index(gt_image, batch) & _is_index(gt_labels, classes)
    gt_boxes = torch.where(valid[:, None], gt_boxes, 0)
    image, label = (torch.where(valid, index, 0).long() for index in (gt_image, gt_labels))
    valid = valid[:, None].expand(objects, anchors)
    row = image[:, None].expand(objects, anchors)

    points = anchor_points.to(dtype) * column(stride).to(dtype)
    inside = valid & _contains(gt_boxes, points, min_side, eps)
    overlap = paired_box_iou(gt_boxes[:, None], boxes.to(dtype)[image], iou)
    overlap = torch.where(overlap.isnan(), 0, overlap).clamp(0, 1)
    metric = class_logits[image, :, label].to(dtype).sigmoid() ** alpha * overlap**beta
    metric = torch.where(metric.isnan(), 0, metric)

    claimed = _largest(torch.where(inside, metric, 0), topk)
    rivals = {"inside": inside, "claimed": claimed, "all": valid}[conflicts]
    contested = _count(claimed, row, batch).gather(0, row) > 1
    final = torch.where(contested, _wins(overlap, rivals, row, batch), claimed)
    if topk2 < topk:
        final = _largest(torch.where(final, metric, 0), topk2)

    number = torch.arange(objects, dtype=torch.int32, device=row.device)[:, None]
    matched = matched.scatter_reduce(0, row, torch.where(final, number, -1), "amax")
    score = score.scatter_reduce(0, row, _scores(metric, overlap, final, eps), "amax")
    return matched, score, total(score)


def _is_box(gt_boxes: Tensor) -> Tensor:
    """(N,): finite, wider and higher than 0, and not in the place of padding."""
    x1, y1, x2, y2 = gt_boxes.unbind(1)
    return gt_boxes.isfinite().all(1) & (x2 > x1) & (y2 > y1) & (x1 + y1 + x2 + y2 > 0)


def _is_index(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _contains(gt_boxes: Tensor, points: Tensor, min_side: float, eps: float) -> Tensor:
    """(N, A): by more than eps on all four sides of the box, whose sides are min_side at least."""
    first, second = gt_boxes[:, None].chunk(2, 2)
    if min_side > 0:
        centre, half = (first + second) / 2, (second - first).clamp(min=min_side) / 2
        first, second = centre - half, centre + half
    return ((points - first > eps) & (second - points > eps)).all(-1)


def _largest(metric: Tensor, count: int) -> Tensor:
    """(N, A): the `count` largest of each row, none of them 0; of equals the first."""
    order = metric.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(metric, dtype=torch.bool).scatter(1, order, True) & (metric > 0)


def _count(claimed: Tensor, row: Tensor, batch: int) -> Tensor:
    """(B, A): how many objects claim an anchor."""
    zeros = torch.zeros((batch, row.shape[1]), dtype=torch.int32, device=row.device)
    return zeros.scatter_add(0, row, claimed.int())


def _wins(overlap: Tensor, rivals: Tensor, row: Tensor, batch: int) -> Tensor:
    """(N, A): the rival of the largest overlap at each anchor of an image; of equals the first."""
    shape, objects = (batch, row.shape[1]), len(row)
    overlap = torch.where(rivals, overlap, -1)
    best = overlap.new_full(shape, -1).scatter_reduce(0, row, overlap, "amax")
    number = torch.arange(objects, device=row.device)[:, None]
    leading = torch.where(rivals & (overlap == best.gather(0, row)), number, objects)
    first = row.new_full(shape, objects).scatter_reduce(0, row, leading, "amin")
    return first.gather(0, row) == number


def _scores(metric: Tensor, overlap: Tensor, final: Tensor, eps: float) -> Tensor:
    """(N, A): metric · (largest overlap) / (largest metric + eps) of the final pairs, else 0."""
    metric, overlap = torch.where(final, metric, 0), torch.where(final, overlap, 0)
    scale = metric.amax(1, keepdim=True) + eps
    return torch.where(metric > 0, metric * overlap.amax(1, keepdim=True) / scale, 0)
