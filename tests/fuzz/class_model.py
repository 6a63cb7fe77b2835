"""The classification loss in NumPy, with a bound on what rounding may do to it.

Independent of dflkern: written from the formulas of binary cross-entropy, varifocal loss (Zhang et
al. 2021) and quality focal loss (Li et al. 2020), anchor by anchor where the target is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .bounds import Bounded, Precision, exp


@dataclass
class Settings:
    kind: str
    alpha: float
    gamma: float
    detached: bool


def target_of(
    shape: tuple[int, ...], matched: np.ndarray, score: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(whether this is the class of the anchor's object, the target), both (B, A, C)."""
    positive, target = np.zeros(shape, bool), np.zeros(shape)
    for image, anchor in np.ndindex(*shape[:2]):
        index = int(matched[image, anchor])
        if 0 <= index < len(labels) and 0 <= labels[index] < shape[2]:
            place = image, anchor, int(labels[index])
            positive[place], target[place] = True, score[image, anchor]
    return positive, target


def class_loss(
    logits: np.ndarray,
    positive: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    normalizer: float,
    settings: Settings,
    upstream: float,
    precision: Precision,
) -> tuple[Bounded, Bounded]:
    """The loss and the gradient of the logits, (B, A, C)."""
    p, rest, softplus, softplus_of_minus = _sigmoid(logits, precision)
    y = Bounded(target, precision)
    entropy = _product(y, softplus_of_minus) + _product(1.0 - y, softplus)
    away = p - y
    modulation, slope = _modulation(settings, positive, y, p, rest, away)
    loss = entropy if modulation is None else _product(modulation, entropy)
    gradient = away if modulation is None else modulation * away
    if slope is not None:
        gradient = gradient + _product(slope, entropy)
    if weight is not None:
        loss = _product(Bounded(np.broadcast_to(weight, loss.value.shape), precision), loss)
        gradient = gradient * weight
    total = loss.reshape(-1).sum()
    if loss.value.size:
        total = total / normalizer
    scale = Bounded(upstream, precision) / normalizer
    return total, gradient * scale


def _sigmoid(z: np.ndarray, precision: Precision) -> tuple[Bounded, ...]:
    """sigmoid and softplus of z and of −z."""
    e = exp(Bounded(-np.abs(z), precision))
    log = _log1p(e)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    up = z > 0
    p, rest = _where(up, larger, smaller), _where(up, smaller, larger)
    ramps = [Bounded(np.where(np.isnan(z), z, np.maximum(x, 0)), precision) for x in (z, -z)]
    return p, rest, ramps[0] + log, ramps[1] + log


def _modulation(
    settings: Settings, positive: np.ndarray, y: Bounded, p: Bounded, rest: Bounded, away: Bounded
) -> tuple[Bounded | None, Bounded | None]:
    """The factor of the cross entropy and its derivative by z; None for 1 and for 0."""
    gamma = settings.gamma
    if settings.kind == "bce":
        return None, None
    if settings.kind == "varifocal":
        negative = _power(p, gamma) * settings.alpha
        zero = Bounded(np.zeros_like(y.value), y.precision)
        slope = _where(positive, zero, negative * gamma * rest)
        return _where(positive, y, negative), None if settings.detached else slope
    size = _where(away.value < 0, -away, away)
    slope = _power(size, gamma - 1) * gamma * p * rest
    slope = _where(away.value < 0, -slope, slope)
    slope = _where(away.value == 0, Bounded(np.zeros_like(y.value), y.precision), slope)
    unsure = (np.abs(away.value) <= 4 * away.bound) & positive  # the sign, or a pole
    return _power(size, gamma), None if settings.detached else slope.unknown_where(unsure)


def _log1p(x: Bounded) -> Bounded:
    """Of numbers from 0 to 1, in a product of many or alone."""
    value = np.log1p(x.value)
    bound = x.bound + 40 * x.precision.unit * np.abs(value)
    return Bounded(value, x.precision, np.where(np.isnan(value), 0.0, bound))


def _power(x: Bounded, exponent: float) -> Bounded:
    """Of numbers of at least 0, by a logarithm or by products."""
    u, least = x.precision.unit, 8 * x.precision.normal
    value = x.value**exponent
    relative = np.where(x.value > 0, x.bound / np.maximum(x.value, 1e-320), 0.0)
    digits = np.abs(exponent * np.log(np.maximum(x.value, 1e-320)))
    bound = value * (2 * np.abs(exponent) * relative + (16 + 8 * digits) * u) + least
    if exponent < 1:  # a tiny base may be 0, of which the power is not
        bound = np.where(x.value <= 2 * x.bound + least, np.maximum(bound, 2 * value), bound)
    certain = (exponent == 0) | ((x.value == 0) & (x.bound == 0))
    bound = np.where(certain, 0.0, bound)
    return Bounded(value, x.precision, np.where(np.isnan(value), 0.0, bound))


def _product(factor: Bounded, value: Bounded) -> Bounded:
    """0 times infinity is 0."""
    result = factor * value
    silent = (factor.value == 0) & (factor.bound == 0) & np.isinf(value.value)
    unsure = (np.abs(factor.value) <= factor.bound) & np.isinf(value.value) & ~silent
    value, bound = np.where(silent, 0.0, result.value), np.where(silent, 0.0, result.bound)
    return Bounded(value, result.precision, np.where(unsure, np.inf, bound))


def _where(condition: np.ndarray, a: Bounded, b: Bounded) -> Bounded:
    return Bounded(
        np.where(condition, a.value, b.value), a.precision, np.where(condition, a.bound, b.bound)
    )
