"""What the functions on distributions compute, in NumPy, from their formulas.

With m = max z, x = z − m, s = Σ exp x, p = exp(x)/s, W the positions of the bins and y the two bins
of the target t, of weights 1 − r and r with r = (t − W_l) / (W_{l+1} − W_l):

    loss = log s − Σ_k y_k x_k        ∂loss/∂z_k = p_k − y_k
    E    = Σ_k p_k W_k                ∂E/∂z_k    = p_k (W_k − E)

All logits are (N, K) here. Results are `Bounded`. The bins and weights of a target are taken in the
type of the arithmetic, whose operations are exact to the last bit, since a weight of exactly 0
makes an infinite logit cost nothing and one of 1e-9 does not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .bounds import Bounded, exact_zero, exp, log


class Distributions(NamedTuple):
    shifted: Bounded  # (N, K)
    sum: Bounded  # (N, 1)
    p: Bounded  # (N, K)


class TwoBins(NamedTuple):
    left: np.ndarray  # (N,)
    weights: np.ndarray  # (N, 2), NaN for a NaN target
    full: np.ndarray  # (N, K)


def distributions(logits, precision):
    z = Bounded(logits, precision)
    x = z - logits.max(-1, keepdims=True)
    e = exp(x)
    s = e.sum(-1).reshape(-1, 1)
    return Distributions(x, s, e / s)


def positions(project, bins, arithmetic):
    if project is None:
        return np.arange(bins, dtype=arithmetic)
    return np.asarray(project).astype(arithmetic)


def two_bins(target, project, bins, margin, arithmetic):
    """The bin l left of each target, and the weights of l and l + 1."""
    t = target.astype(arithmetic)
    w = positions(project, bins, arithmetic)
    if project is None:
        highest = arithmetic(bins - 1 - margin)
    else:
        highest = max(w[-1] - arithmetic(margin), w[0])
    t = np.where(t < w[0], w[0], t)
    t = np.where(t > highest, highest, t)
    left = np.clip(np.searchsorted(w, t, side="right") - 1, 0, bins - 2)
    right = (t - w[left]) / (w[left + 1] - w[left])
    weights = np.stack((1 - right, right), -1).astype(np.float64)
    full = np.zeros((t.size, bins))
    rows = np.arange(t.size)
    full[rows, left], full[rows, left + 1] = weights[:, 0], weights[:, 1]
    full[np.isnan(t)] = np.nan
    return TwoBins(left, weights, full)


def loss(of, y):
    """DFL of each distribution, (N,)."""
    rows = np.arange(y.left.size)
    total = log(of.sum[:, 0])
    for side in range(2):
        weight, x = y.weights[:, side], of.shifted[rows, y.left + side]
        term = x * weight
        free = weight == 0
        total = total - Bounded(
            np.where(free, 0, term.value), term.precision, np.where(free, 0, term.bound)
        )
    return total


def loss_gradient(of, y, upstream):
    """(N, K), from upstream (N,); g p − g y where g is infinite may also be NaN."""
    gradient = upstream.reshape(-1, 1) * (of.p - y.full)
    k = np.arange(y.full.shape[1]) - y.left[:, None]
    infinite = np.isinf(upstream.value)[:, None] & ((k == 0) | (k == 1))
    return gradient.unknown_where(infinite & ~np.isnan(gradient.value))


def expected(of, w):
    """E of each distribution, (N,)."""
    moment = (exp(of.shifted) * w.astype(np.float64)).sum(-1)
    return moment / of.sum[:, 0]


def expected_gradient(of, w, upstream):
    """(N, K), from upstream (N,)."""
    distance = w.astype(np.float64) - expected(of, w).reshape(-1, 1)
    product = (upstream.reshape(-1, 1) * distance) * of.p
    # In another order the product of two factors may be subnormal, and have few digits
    coarse = of.p.precision.smallest * np.nan_to_num(np.abs(distance.value))
    return Bounded(product.value, product.precision, product.bound + coarse)


def both_gradients(of, y, w, by_loss, by_position):
    """(N, K), from the upstream gradients of loss and E; the sum may be taken in any order."""
    total = loss_gradient(of, y, by_loss) + expected_gradient(of, w, by_position)
    infinite = np.isinf(by_loss.value) | np.isinf(by_position.value)
    return total.unknown_where(infinite[:, None] & ~np.isnan(total.value))


def reduce(losses, weight, reduction, shape, sides):
    """What dfl_loss returns for losses (N,) of targets of a shape; sides is an axis of it."""
    losses = losses.reshape(shape)
    if weight is not None:
        losses = losses * np.broadcast_to(weight, shape)
    if reduction == "none":
        return losses
    if reduction == "side_mean":
        return losses.sum(sides) / float(max(shape[sides], 1))
    if losses.value.size == 0:
        return exact_zero((), losses.precision)
    total = losses.sum()
    return total / float(losses.value.size) if reduction == "mean" else total


def reduce_gradient(upstream, weight, reduction, shape, sides, precision):
    """The gradient by each loss, (N,), from that by what reduce returns."""
    upstream = Bounded(upstream, precision)
    if reduction == "side_mean":
        upstream = Bounded(np.expand_dims(upstream.value, sides), precision) / float(
            max(shape[sides], 1)
        )
    elif reduction == "mean":
        upstream = upstream / float(max(np.prod(shape), 1))
    if weight is not None:
        upstream = upstream * np.broadcast_to(weight, shape)
    value = np.broadcast_to(upstream.value, shape)
    bound = np.broadcast_to(upstream.bound, shape)
    return Bounded(value.reshape(-1), precision, bound.reshape(-1))
