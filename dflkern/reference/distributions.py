"""DFL and its expected position, in plain PyTorch.

With x = z − max z, s = Σ exp x, p = exp(x)/s, positions W, and y the target's two bins l and l + 1:

    loss = log s − Σ_k y_k x_k        ∂loss/∂z_k = p_k − y_k
    E    = Σ_k p_k W_k                ∂E/∂z_k    = p_k (W_k − E)

Everything is shifted by the maximum before anything is subtracted, since a log-sum-exp minus a
large logit cancels. All functions take logits of any dtype, compute in fp32 (fp64 for fp64 logits),
never write into an argument, and are differentiable in the logits and the upstream gradients, which
is what double backward uses. `project` is None (0, 1, …, K − 1) or a tensor in the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import compute_dtype
from .reductions import reduce, upstream


def dfl_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    reduction: str,
) -> Tensor:
    """DFL, weighted and reduced."""
    loss = loss_of_each(logits, target, project, dim, margin)
    return reduce(loss, weight, normalizer, reduction, dim - 1)


def dfl_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    project: Tensor | None,
    dim: int,
    margin: float,
    reduction: str,
) -> Tensor:
    """The gradient in the logits' dtype."""
    grad_loss = grad_loss.to(compute_dtype(logits.dtype))
    grad_each = upstream(grad_loss, weight, normalizer, reduction, dim - 1, target.shape)
    return gradient_of_each(grad_each, logits, target, project, dim, margin)


def loss_of_each(
    logits: Tensor, target: Tensor, project: Tensor | None, dim: int, margin: float
) -> Tensor:
    """DFL of each distribution."""
    shifted = _shifted(logits, dim)
    target = target.to(shifted.dtype)
    left, left_weight, right_weight = two_bins(target, project, shifted.shape[dim], margin)
    return shifted.exp().sum(dim).log() - (
        weighted(left_weight, _pick(shifted, left, dim))
        + weighted(right_weight, _pick(shifted, left + 1, dim))
    )


def gradient_of_each(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    project: Tensor | None,
    dim: int,
    margin: float,
) -> Tensor:
    """The gradient g·(p − y) of `loss_of_each`, in the logits' dtype."""
    p = _probabilities(logits, dim)
    y = two_bin_target(target.to(p.dtype), project, p.shape[dim], dim, margin)
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
    return loss_of_each(logits, target, project, dim, margin), dfl_decode(logits, project, dim)


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
        gradient_of_each(grad_loss, wide, target, project, dim, margin)
        + dfl_decode_backward(grad_position, wide, project, dim)
    ).to(logits.dtype)


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


def weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Product of weight and values with 0 · −inf = 0; a NaN weight stays NaN."""
    return torch.where(weight == 0, 0, weight * values)
