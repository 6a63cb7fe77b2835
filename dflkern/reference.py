"""The maths in plain PyTorch: the definition, the fallback on every device, the truth in tests.

With x = z − max z, s = Σ exp x, p = exp(x)/s, positions W, and y the target's two bins l and l + 1:

    loss = log s − Σ_k y_k x_k        ∂loss/∂z_k = p_k − y_k
    E    = Σ_k p_k W_k                ∂E/∂z_k    = p_k (W_k − E)

Everything is shifted by the maximum before anything is subtracted, since a log-sum-exp minus a
large logit cancels. All functions take logits of any dtype, compute in fp32 (fp64 for fp64 logits),
never write into an argument, and are differentiable in the logits and the upstream gradients, which
is what double backward uses. `project` is None (0, 1, …, K − 1) or a tensor in the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import bbox2dist, column, dist2bbox
from .iou import paired_box_iou, paired_box_iou_gradient
from .problem import compute_dtype
from .reductions import total


def dfl_loss(
    logits: Tensor, target: Tensor, project: Tensor | None, dim: int, margin: float
) -> Tensor:
    """DFL of each distribution."""
    shifted = _shifted(logits, dim)
    left, left_weight, right_weight = two_bins(target, project, shifted.shape[dim], margin)
    return shifted.exp().sum(dim).log() - (
        _weighted(left_weight, _pick(shifted, left, dim))
        + _weighted(right_weight, _pick(shifted, left + 1, dim))
    )


def dfl_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    project: Tensor | None,
    dim: int,
    margin: float,
) -> Tensor:
    """The gradient g·(p − y) in the logits' dtype."""
    p = _probabilities(logits, dim)
    y = two_bin_target(target, project, p.shape[dim], dim, margin)
    return (grad_loss.to(p.dtype).unsqueeze(dim) * (p - y)).to(logits.dtype)


def dfl_decode(logits: Tensor, project: Tensor | None, dim: int) -> Tensor:
    """The expected position of each distribution."""
    p = _probabilities(logits, dim)
    return (p * _along(positions(project, p, dim), p, dim)).sum(dim)


def dfl_decode_backward(
    grad_position: Tensor, logits: Tensor, project: Tensor | None, dim: int
) -> Tensor:
    """The gradient g·p·(W − E) in the logits' dtype."""
    p = _probabilities(logits, dim)
    w = _along(positions(project, p, dim), p, dim)
    expected = (p * w).sum(dim, keepdim=True)
    return (grad_position.to(p.dtype).unsqueeze(dim) * p * (w - expected)).to(logits.dtype)


def dfl_loss_and_decode(
    logits: Tensor, target: Tensor, project: Tensor | None, dim: int, margin: float
) -> tuple[Tensor, Tensor]:
    """Loss and expected position of each distribution."""
    return dfl_loss(logits, target, project, dim, margin), dfl_decode(logits, project, dim)


def dfl_loss_and_decode_backward(
    grad_loss: Tensor,
    grad_position: Tensor,
    logits: Tensor,
    target: Tensor,
    project: Tensor | None,
    dim: int,
    margin: float,
) -> Tensor:
    """The sum of both gradients, added in the compute dtype, in the logits' dtype."""
    wide = logits.to(compute_dtype(logits.dtype))
    return (
        dfl_loss_backward(grad_loss, wide, target, project, dim, margin)
        + dfl_decode_backward(grad_position, wide, project, dim)
    ).to(logits.dtype)


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
    if box_format == "xywh":  # centre = anchor + (rb − lt)/2, size = lt + rb
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
    normalizer: Tensor,
    foreground: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    iou: str,
) -> tuple[Tensor, Tensor]:
    """Σ w (1 − IoU) / normalizer and Σ w mean(DFL over sides) / normalizer over the foreground.

    Whatever stands in the logits, boxes and weights of other anchors is replaced before it is used,
    so that a NaN there can reach neither the sums nor, as 0·NaN, the gradient.
    """
    step = _box_step(
        logits, anchor_points, target_boxes, weight, normalizer, foreground, project, dim
    )
    overlap = paired_box_iou(step.boxes, step.target_boxes, iou)
    loss = _sides_last(dfl_loss(step.logits, step.target, project, dim, margin), dim).mean(-1)
    return (
        total(_weighted(step.weight, 1 - overlap)) / step.normalizer,
        total(_weighted(step.weight, loss)) / step.normalizer,
    )


def box_loss_backward(
    grad_iou: Tensor,
    grad_dfl: Tensor,
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    foreground: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    iou: str,
) -> Tensor:
    """The gradient a·(p − y) + b·p·(W − E): a from DFL, b from the IoU through the box's side."""
    step = _box_step(
        logits, anchor_points, target_boxes, weight, normalizer, foreground, project, dim
    )
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
    return torch.where(step.active, gradient, 0).to(logits.dtype)


class _BoxStep(NamedTuple):
    """What box_loss and its backward have in common, all of it harmless off the foreground."""

    active: Tensor  # broadcasts to the logits
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
    normalizer: Tensor,
    foreground: Tensor | None,
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
    everywhere = active[:, None, None, :] if dim == 2 else active[:, :, None, None]
    logits = torch.where(everywhere, logits.to(dtype), 0)
    target_boxes = torch.where(active.unsqueeze(-1), target_boxes.to(dtype), 0)
    anchor_points = torch.where(active.unsqueeze(-1), anchor_points.to(dtype), 0)
    target = bbox2dist(anchor_points, target_boxes)
    return _BoxStep(
        everywhere,
        torch.where(active, weight, 0),
        torch.where(active.any(), normalizer.to(dtype), 1),
        logits,
        target_boxes,
        target.transpose(1, 2) if dim == 2 else target,
        dist2bbox(_sides_last(dfl_decode(logits, project, dim), dim), anchor_points),
    )


def two_bins(
    target: Tensor, project: Tensor | None, num_bins: int, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The bin l left of each clamped target (0 ≤ l ≤ K − 2 always), and the weights of l and l + 1.

    A NaN target gets some valid bin and NaN weights.
    """
    if project is None:
        target = target.clamp(0, num_bins - 1 - margin)
        left = target.to(torch.int64).clamp(0, num_bins - 2)
        right_weight = target - left
    else:
        upper = torch.maximum(project[-1] - margin, project[0])
        target = torch.clamp(target, project[0], upper)
        left = torch.searchsorted(project, target.contiguous(), right=True) - 1
        left = left.clamp(0, num_bins - 2)
        lower = project[left]
        right_weight = (target - lower) / (project[left + 1] - lower)
    return left, 1 - right_weight, right_weight


def two_bin_target(
    target: Tensor, project: Tensor | None, num_bins: int, dim: int, margin: float
) -> Tensor:
    """The distribution y along dim; NaN in all bins where the target is NaN."""
    left, left_weight, right_weight = two_bins(target, project, num_bins, margin)
    base = (right_weight * 0).unsqueeze(dim)
    shape = list(base.shape)
    shape[dim] = num_bins
    y = base.expand(shape).scatter(dim, left.unsqueeze(dim), left_weight.unsqueeze(dim))
    return y.scatter(dim, left.unsqueeze(dim) + 1, right_weight.unsqueeze(dim))


def positions(project: Tensor | None, like: Tensor, dim: int) -> Tensor:
    """W, the position of each bin."""
    if project is not None:
        return project
    return torch.arange(like.shape[dim], dtype=like.dtype, device=like.device)


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector as a tensor that broadcasts along dim of like."""
    return values.reshape([-1 if axis == dim else 1 for axis in range(like.ndim)])


def _shifted(logits: Tensor, dim: int) -> Tensor:
    """Logits in the compute dtype, minus the maximum of their distribution."""
    z = logits.to(compute_dtype(logits.dtype))
    return z - z.detach().amax(dim, keepdim=True)


def _probabilities(logits: Tensor, dim: int) -> Tensor:
    return logits.to(compute_dtype(logits.dtype)).softmax(dim)


def _pick(values: Tensor, index: Tensor, dim: int) -> Tensor:
    return values.gather(dim, index.unsqueeze(dim)).squeeze(dim)


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Product of weight and values with 0 · −inf = 0; a NaN weight stays NaN."""
    return torch.where(weight == 0, 0, weight * values)


def _sides_last(values: Tensor, dim: int) -> Tensor:
    """(B, A, 4), whichever axis held the bins."""
    return values if dim == 3 else values.transpose(1, 2)
