"""The classification loss against an implicit target, in plain PyTorch.

With z a logit, p = sigmoid(z), and y its target (the score at the object's class, else 0):

    CE        = y softplus(−z) + (1 − y) softplus(z)
    bce       = CE
    varifocal = y CE at the object's class, α p^γ CE elsewhere
    quality   = |p − y|^γ CE

This form of CE has the right limit at z = ±inf, where softplus(z) − y z is inf − inf. A product of
0 and an infinite number is 0; NaN always stays NaN. Everything is computed in fp32 (fp64 for fp64
logits) and is differentiable in the logits and the upstream gradient, for double backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import compute_dtype
from .reductions import total


def class_loss(
    class_logits: Tensor,
    matched: Tensor,
    score: Tensor,
    gt_labels: Tensor,
    normalizer: Tensor,
    class_weight: Tensor | None,
    dim: int,
    kind: str,
    alpha: float,
    gamma: float,
    detach_modulation: bool,
) -> Tensor:
    """Σ over anchors and classes of class weight · modulation · CE, divided by the normalizer."""
    z = class_logits.to(compute_dtype(class_logits.dtype))
    if not z.numel():
        return z.sum()  # 0, whatever the normalizer
    target = _dense_target(z, matched, score, gt_labels, dim)
    loss = _cross_entropy(z, target.score)
    if kind != "bce":
        factor = _modulation(z, target, kind, alpha, gamma)
        loss = _product(factor.detach() if detach_modulation else factor, loss)
    loss = _weighted(loss, class_weight, dim)
    return total(loss) / normalizer.to(loss.dtype)


def class_loss_backward(
    grad_loss: Tensor,
    class_logits: Tensor,
    matched: Tensor,
    score: Tensor,
    gt_labels: Tensor,
    normalizer: Tensor,
    class_weight: Tensor | None,
    dim: int,
    kind: str,
    alpha: float,
    gamma: float,
    detach_modulation: bool,
) -> Tensor:
    """The gradient modulation · (p − y) + CE · ∂modulation/∂z, in the logits' dtype."""
    if not class_logits.numel():
        return torch.zeros_like(class_logits)
    z = class_logits.to(compute_dtype(class_logits.dtype))
    target = _dense_target(z, matched, score, gt_labels, dim)
    gradient = z.sigmoid() - target.score
    if kind != "bce":
        factor = _modulation(z, target, kind, alpha, gamma)
        gradient = (factor.detach() if detach_modulation else factor) * gradient
        if not detach_modulation:
            slope = _modulation_slope(z, target, kind, alpha, gamma)
            gradient = gradient + _product(slope, _cross_entropy(z, target.score))
    gradient = _weighted(gradient, class_weight, dim)
    scale = grad_loss.to(z.dtype) / normalizer.to(z.dtype)
    return (scale * gradient).to(class_logits.dtype)


def matched_labels(matched: Tensor, gt_labels: Tensor, num_classes: int) -> Tensor:
    """The class of each anchor's object; −1 for background and for numbers out of range."""
    if not gt_labels.numel():
        return torch.full_like(matched, -1, dtype=torch.int64)
    exists = (matched >= 0) & (matched < len(gt_labels))
    labels = gt_labels[torch.where(exists, matched, 0).long()].long()
    return torch.where(exists & (labels >= 0) & (labels < num_classes), labels, -1)


class _DenseTarget(NamedTuple):
    """What `class_loss` is compared with, in the shape of the logits."""

    positive: Tensor  # whether this is the class of the anchor's object
    score: Tensor  # 0 elsewhere


def _dense_target(
    z: Tensor, matched: Tensor, score: Tensor, gt_labels: Tensor, dim: int
) -> _DenseTarget:
    classes = torch.arange(z.shape[dim], device=z.device)
    labels = matched_labels(matched, gt_labels, z.shape[dim])
    positive = labels.unsqueeze(dim) == _along(classes, z, dim)
    return _DenseTarget(positive, torch.where(positive, score.to(z.dtype).unsqueeze(dim), 0))


def _softplus(z: Tensor) -> Tensor:
    return -F.logsigmoid(-z)  # F.softplus leaves out log(1 + exp(−z)) of large z


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return _product(y, _softplus(-z)) + _product(1 - y, _softplus(z))


def _modulation(z: Tensor, target: _DenseTarget, kind: str, alpha: float, gamma: float) -> Tensor:
    p = z.sigmoid()
    if kind == "varifocal":
        return torch.where(target.positive, target.score, alpha * p.pow(gamma))
    return (p - target.score).abs().pow(gamma)


def _modulation_slope(
    z: Tensor, target: _DenseTarget, kind: str, alpha: float, gamma: float
) -> Tensor:
    """The derivative of `_modulation` by z."""
    p, rest = z.sigmoid(), (-z).sigmoid()
    if kind == "varifocal":
        return torch.where(target.positive, 0, alpha * gamma * p.pow(gamma) * rest)
    away = p - target.score
    nonzero = torch.where(away == 0, 1, away)  # |p − y|^(γ − 1) is infinite at 0 if γ < 1
    slope = gamma * nonzero.abs().pow(gamma - 1) * nonzero.sign() * p * rest
    return torch.where(away == 0, 0, slope)


def _weighted(values: Tensor, class_weight: Tensor | None, dim: int) -> Tensor:
    if class_weight is None:
        return values
    return _product(_along(class_weight.to(values.dtype), values, dim), values)


def _product(factor: Tensor, values: Tensor) -> Tensor:
    """The product, with 0 · inf = 0; NaN stays NaN."""
    return torch.where((factor == 0) & values.isinf(), 0, factor * values)


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector as a tensor that broadcasts along dim of like."""
    return values.reshape([-1 if axis == dim else 1 for axis in range(like.ndim)])
