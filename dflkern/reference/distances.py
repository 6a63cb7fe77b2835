"""The box losses of a head that predicts distances without bins, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import bbox2dist, column, dist2bbox
from ..iou import paired_box_iou, paired_box_iou_gradient
from ..problem import compute_dtype
from .boxes import boxes_of_objects
from .distributions import weighted
from .reductions import total


def distance_loss(
    distances: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    stride: Tensor,
    foreground: Tensor | None,
    matched: Tensor | None,
    dim: int,
    image_size: Sequence[float],
    iou: str,
) -> tuple[Tensor, Tensor]:
    """Σ w (1 − IoU) / normalizer and Σ w mean(|distance − target| / image side) / normalizer.

    As in `box_loss`, whatever stands in the tensors for other anchors is replaced before it is
    used.
    """
    step = _distance_step(
        distances, anchor_points, target_boxes, weight, normalizer, stride, foreground, matched,
        dim, image_size,
    )  # fmt: skip
    overlap = paired_box_iou(step.boxes, step.target_boxes, iou)
    difference = (step.distances - step.target).abs() * step.scale
    return (
        total(weighted(step.weight, 1 - overlap)) / step.normalizer,
        total(weighted(step.weight, difference.mean(-1))) / step.normalizer,
    )


def distance_loss_backward(
    grad_iou: Tensor,
    grad_l1: Tensor,
    distances: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    stride: Tensor,
    foreground: Tensor | None,
    matched: Tensor | None,
    dim: int,
    image_size: Sequence[float],
    iou: str,
) -> Tensor:
    """The gradient by the four distances, 0 off the foreground."""
    step = _distance_step(
        distances, anchor_points, target_boxes, weight, normalizer, stride, foreground, matched,
        dim, image_size,
    )  # fmt: skip
    share = (step.weight / step.normalizer).unsqueeze(-1)
    grad_boxes = -grad_iou * share * paired_box_iou_gradient(step.boxes, step.target_boxes, iou)
    first, second = grad_boxes.chunk(2, -1)
    sign = torch.sign(step.distances - step.target)
    gradient = torch.cat((-first, second), -1) + grad_l1 * share / 4 * step.scale * sign
    gradient = torch.where(step.active.unsqueeze(-1), gradient, 0)
    return _sides_last(gradient, dim).to(distances.dtype)


class _DistanceStep(NamedTuple):
    """What distance_loss and its backward have in common, harmless off the foreground."""

    active: Tensor  # (B, A)
    weight: Tensor
    normalizer: Tensor
    distances: Tensor  # (B, A, 4) in cells, like all below
    target: Tensor
    boxes: Tensor
    target_boxes: Tensor
    scale: Tensor  # from cells to fractions of the image's sides


def _distance_step(
    distances: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    stride: Tensor,
    foreground: Tensor | None,
    matched: Tensor | None,
    dim: int,
    image_size: Sequence[float],
) -> _DistanceStep:
    dtype = compute_dtype(distances.dtype)
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
    each, stride = active.unsqueeze(-1), column(stride).to(dtype)
    target_boxes = torch.where(each, target_boxes / stride, 0)
    anchor_points = torch.where(each, anchor_points.to(dtype), 0)
    height, width = image_size
    size = torch.stack([stride / width, stride / height] * 2, -1).flatten(-2)
    values = torch.where(each, _sides_last(distances, dim).to(dtype), 0)
    return _DistanceStep(
        active,
        torch.where(active, weight, 0),
        torch.where(active.any(), normalizer.to(dtype), 1),
        values,
        bbox2dist(anchor_points, target_boxes),
        dist2bbox(values, anchor_points),
        target_boxes,
        torch.where(each, size, 0),
    )


def _sides_last(values: Tensor, dim: int) -> Tensor:
    """Between (B, A, 4) and the layout of the distances."""
    return values if dim == 2 else values.transpose(1, 2)
