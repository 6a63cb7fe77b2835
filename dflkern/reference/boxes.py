"""Boxes from distributions, and the two losses of a training step, in plain PyTorch.

The gradient of a box's sides reaches the logits through `dfl_loss_and_decode_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import bbox2dist, column, dist2bbox
from ..iou import paired_box_iou, paired_box_iou_gradient
from ..problem import compute_dtype
from .distributions import (
    dfl_decode,
    dfl_decode_backward,
    dfl_loss_and_decode_backward,
    loss_of_each,
    weighted,
)
from .reductions import total


def decode_boxes(
    logits: Tensor,
    anchor_points: Tensor,
    stride: Tensor | None,
    project: Tensor | None,
    dim: int,
    box_format: str,
) -> Tensor:
    """Boxes of all anchors: (B, A, 4) for dim 3, (B, 4, A) for dim 2; in pixels given a stride."""
    distances = _sides_last(dfl_decode(logits, project, dim), dim)
    boxes = dist2bbox(distances, anchor_points.to(distances.dtype), box_format=box_format)
    if stride is not None:
        boxes = boxes * column(stride).to(boxes.dtype)
    if dim == 3:
        return boxes
    return boxes.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def decode_boxes_backward(
    grad_boxes: Tensor,
    logits: Tensor,
    stride: Tensor | None,
    project: Tensor | None,
    dim: int,
    box_format: str,
) -> Tensor:
    """The gradient by the four distances, through dfl_decode's."""
    grad = _sides_last(grad_boxes.to(compute_dtype(logits.dtype)), dim)
    if stride is not None:
        grad = grad * column(stride).to(grad.dtype)
    first, second = grad.chunk(2, -1)
    if box_format == "cxcywh":  # centre = anchor + (rb − lt)/2, size = lt + rb
        first, second = second - first / 2, second + first / 2
    else:
        first = -first
    grad_distances = torch.cat((first, second), -1)
    if dim == 2:
        grad_distances = grad_distances.transpose(1, 2)
    return dfl_decode_backward(grad_distances, logits, project, dim)


def box_loss(
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    foreground: Tensor | None,
    matched: Tensor | None,
    stride: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    iou: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """W (1 − IoU) and w mean(DFL over sides) of each anchor, or Σ of them / normalizer.

    Whatever stands in the logits, boxes and weights of background anchors is replaced before it is
    used, so that a NaN there can reach neither the sums nor, as 0·NaN, the gradient.
    """
    step = _box_step(
        logits, anchor_points, target_boxes, weight, normalizer, foreground, matched, stride,
        project, dim,
    )  # fmt: skip
    overlap = paired_box_iou(step.boxes, step.target_boxes, iou)
    loss = _sides_last(loss_of_each(step.logits, step.target, project, dim, margin), dim).mean(-1)
    iou_loss, dfl_loss = weighted(step.weight, 1 - overlap), weighted(step.weight, loss)
    if reduction == "none":
        return iou_loss, dfl_loss
    return total(iou_loss) / step.normalizer, total(dfl_loss) / step.normalizer


def box_loss_backward(
    grad_iou: Tensor,
    grad_dfl: Tensor,
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    foreground: Tensor | None,
    matched: Tensor | None,
    stride: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    iou: str,
    reduction: str,
) -> Tensor:
    """The gradient a·(p − y) + b·p·(W − E): a from DFL, b from the IoU through the box's side."""
    step = _box_step(
        logits, anchor_points, target_boxes, weight, normalizer, foreground, matched, stride,
        project, dim,
    )  # fmt: skip
    if reduction == "none":
        grad_iou = torch.where(step.foreground, grad_iou, 0).unsqueeze(-1)
        grad_dfl = torch.where(step.foreground, grad_dfl, 0).unsqueeze(-1)
    scale = (step.weight / step.normalizer).unsqueeze(-1)
    grad_boxes = -grad_iou * scale * paired_box_iou_gradient(step.boxes, step.target_boxes, iou)
    first, second = grad_boxes.chunk(2, -1)
    grad_position = torch.cat((-first, second), -1)
    grad_loss = (grad_dfl * scale / 4).expand_as(grad_position)
    if dim == 2:
        grad_position, grad_loss = grad_position.transpose(1, 2), grad_loss.transpose(1, 2)
    gradient = dfl_loss_and_decode_backward(
        grad_loss, grad_position, step.logits, step.target, project, dim, margin
    )
    return torch.where(_with_bins(step.foreground, dim), gradient, 0).to(logits.dtype)


class _BoxStep(NamedTuple):
    """What box_loss and its backward have in common, all of it harmless off the foreground."""

    foreground: Tensor  # (B, A), without anchors of weight 0
    weight: Tensor
    normalizer: Tensor
    logits: Tensor
    target_boxes: Tensor
    target: Tensor  # of the DFL, in the layout of the logits without their bins
    boxes: Tensor


def _box_step(
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    foreground: Tensor | None,
    matched: Tensor | None,
    stride: Tensor | None,
    project: Tensor | None,
    dim: int,
) -> _BoxStep:
    dtype = compute_dtype(logits.dtype)
    weight = weight.to(dtype)
    if weight.ndim == 3:
        weight = weight.sum(-1)
    active = weight != 0
    if foreground is not None:
        active = active & (foreground.view(torch.uint8) != 0)  # a bool may be any byte
    target_boxes = target_boxes.to(dtype)
    if matched is not None:
        target_boxes, exists = boxes_of_objects(target_boxes, matched)
        active = active & exists
    if stride is not None:
        target_boxes = target_boxes / column(stride).to(dtype)
    logits = torch.where(_with_bins(active, dim), logits.to(dtype), 0)
    target_boxes = torch.where(active.unsqueeze(-1), target_boxes, 0)
    anchor_points = torch.where(active.unsqueeze(-1), anchor_points.to(dtype), 0)
    target = bbox2dist(anchor_points, target_boxes)
    divisor = 1 if normalizer is None else normalizer.to(dtype)
    return _BoxStep(
        active,
        torch.where(active, weight, 0),
        torch.where(active.any(), divisor, 1),
        logits,
        target_boxes,
        target.transpose(1, 2) if dim == 2 else target,
        dist2bbox(_sides_last(dfl_decode(logits, project, dim), dim), anchor_points),
    )


def boxes_of_objects(boxes: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """The box of each anchor's object, and whether there is one: 0 ≤ matched < len(boxes)."""
    exists = (matched >= 0) & (matched < len(boxes))
    if not len(boxes):
        return boxes.new_zeros(*matched.shape, 4), exists
    return boxes[torch.where(exists, matched, 0).long()], exists


def _with_bins(anchors: Tensor, dim: int) -> Tensor:
    """(B, A) in a shape that broadcasts to the logits."""
    return anchors[:, None, None, :] if dim == 2 else anchors[:, :, None, None]


def _sides_last(values: Tensor, dim: int) -> Tensor:
    """(B, A, 4), whichever axis held the bins."""
    return values if dim == 3 else values.transpose(1, 2)
