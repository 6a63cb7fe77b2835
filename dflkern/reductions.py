"""Weights and reductions of a loss, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .problem import savable

# PyTorch sums up to 32 768 values on one thread; the square root of that balances both stages
_ONE_THREAD = 4096


def reduce(loss: Tensor, weight: Tensor | None, reduction: str, sides: int) -> Tensor:
    """What `dfl_loss` returns for a loss of each distribution; sides is the axis of the sides."""
    if weight is not None:
        loss = loss * savable(weight).to(loss.dtype)
    if reduction == "sides":
        return loss.sum(sides) / max(loss.shape[sides], 1)
    if reduction == "none":
        return loss
    return total(loss) / max(loss.numel(), 1) if reduction == "mean" else total(loss)


def total(values: Tensor) -> Tensor:
    """The sum of all values, in an order that does not depend on the number of threads.

    PyTorch splits a sum over a whole tensor into a part for each thread. A sum over an axis that
    leaves many results, or over few values, stays on one thread.
    """
    rest = values.reshape(-1)
    while rest.device.type == "cpu" and len(rest) > _ONE_THREAD:
        rest = F.pad(rest, (0, -len(rest) % _ONE_THREAD)).view(-1, _ONE_THREAD).sum(1)
    return rest.sum()


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
