"""Weights and reductions of a loss, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def reduce(loss: Tensor, weight: Tensor | None, reduction: str, sides: int) -> Tensor:
    """What `dfl_loss` returns for a loss of each distribution; sides is the axis of the sides."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "sides":
        return loss.sum(sides) / max(loss.shape[sides], 1)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(loss.numel(), 1) if reduction == "mean" else total


def upstream(
    grad: Tensor, weight: Tensor | None, reduction: str, sides: int, shape: Sequence[int]
) -> Tensor:
    """The gradient of the loss of each distribution, of that shape, from that of `reduce`."""
    if reduction == "sides":
        grad = (grad / max(shape[sides], 1)).unsqueeze(sides)
    elif reduction == "mean":
        grad = grad / max(math.prod(shape), 1)
    if weight is not None:
        grad = grad * weight.to(grad.dtype)
    return grad.expand(shape)
