"""Weights and reductions of a loss, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import savable

_ONE_THREAD = 4096  # values of one stage of a sum; PyTorch takes several threads beyond 32 768


def reduce(
    loss: Tensor, weight: Tensor | None, normalizer: Tensor | None, reduction: str, sides: int
) -> Tensor:
    """What `dfl_loss` returns for a loss of each distribution; sides is the axis of the sides."""
    if weight is not None:
        loss = loss * savable(weight).to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "side_mean":
        return loss.sum(sides) / max(loss.shape[sides], 1)
    if reduction == "mean":
        return total(loss) / max(loss.numel(), 1)
    if normalizer is None or not loss.numel():  # a sum over nothing is 0, whatever divides it
        return total(loss)
    return total(loss) / savable(normalizer).to(loss.dtype)


def total(values: Tensor) -> Tensor:
    """The sum of all values, in an order that does not depend on the number of threads.

    PyTorch splits a sum over a whole tensor into a part for each thread. A sum over an axis that
    leaves many results, or over few values, stays on one thread. torch.compile has sums of its own.
    """
    staged = values.device.type == "cpu" and values.numel() > _ONE_THREAD
    if staged and not torch.compiler.is_compiling():
        rows = F.pad(values.reshape(-1), (0, -values.numel() % _ONE_THREAD))
        return total(rows.view(-1, _ONE_THREAD).sum(1))
    return values.sum()


def upstream(
    grad: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    reduction: str,
    sides: int,
    shape: Sequence[int],
) -> Tensor:
    """The gradient of the loss of each distribution, of that shape, from that of `reduce`."""
    if reduction == "side_mean":
        grad = (grad / max(shape[sides], 1)).unsqueeze(sides)
    elif reduction == "mean":
        grad = grad / max(math.prod(shape), 1)
    elif normalizer is not None:
        grad = grad / normalizer.to(grad.dtype)
    if weight is not None:
        grad = grad * weight.to(grad.dtype)
    return grad.expand(shape)
