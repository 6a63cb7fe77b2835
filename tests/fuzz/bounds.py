"""Numbers with a bound on their rounding error: running error analysis on NumPy arrays.

`Bounded` carries a value in float64 and a bound on the error that the same expression has in a
given precision (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3):

- A finite bound says how close a result must be.
- An infinite or NaN value of finite bound is certain, and a result must be the same.
- An infinite bound means that rounding decides, as after an overflow or at a division by what may
  be 0, and that any result will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Precision:
    """A floating-point format: unit roundoff, largest number, distance of the smallest numbers."""

    unit: float
    largest: float
    smallest: float  # subnormal
    normal: float  # the smallest normal number


PRECISIONS = {
    "float16": Precision(2.0**-11, 65504.0, 2.0**-24, 2.0**-14),
    "bfloat16": Precision(2.0**-8, 3.3895313892515355e38, 2.0**-133, 2.0**-126),
    "float32": Precision(2.0**-24, float(np.finfo(np.float32).max), 2.0**-149, 2.0**-126),
    "float64": Precision(2.0**-53, float(np.finfo(np.float64).max), 2.0**-1074, 2.0**-1022),
}


class Bounded:
    """An array of values, and a bound on the error of each; see the module."""

    __array_ufunc__ = None  # so that array * Bounded comes here

    def __init__(self, value, precision, bound=None):
        self.value = np.asarray(value, dtype=np.float64)
        self.bound = np.zeros_like(self.value) if bound is None else bound
        self.precision = precision

    def _settled(self, value, bound, certain):
        """A result; `certain()` says where one that is not finite is known nevertheless."""
        bound = bound + self.precision.unit * np.abs(value)
        if np.isfinite(bound).all() and (np.abs(value) + bound <= self.precision.largest).all():
            return Bounded(value, self.precision, bound)
        special = ~np.isfinite(value) | ~np.isfinite(bound)
        overflow = ~special & (np.abs(value) + bound > self.precision.largest)
        bound = np.where(special, np.where(certain(), 0.0, np.inf), bound)
        return Bounded(value, self.precision, np.where(overflow, np.inf, bound))

    def _pair(self, other):
        if not isinstance(other, Bounded):
            other = Bounded(other, self.precision)
        return self.value, self.bound, other.value, other.bound

    def __neg__(self):
        return Bounded(-self.value, self.precision, self.bound)

    def __add__(self, other):
        a, ra, b, rb = self._pair(other)
        return self._settled(
            a + b, ra + rb, lambda: _is_nan(a, ra) | _is_nan(b, rb) | _known_infinite(a, ra, b, rb)
        )

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return (-self) + other

    def __mul__(self, other):
        a, ra, b, rb = self._pair(other)
        bound = np.abs(a) * rb + np.abs(b) * ra + ra * rb + self.precision.smallest

        def certain():
            decided = (_decided(a, ra) & _decided(b, rb)) & _known_infinite(a, ra, b, rb)
            return _is_nan(a, ra) | _is_nan(b, rb) | decided

        return self._settled(a * b, bound, certain)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other):
        a, ra, b, rb = self._pair(other)
        value = a / b
        room = np.abs(b) - rb
        bound = np.where(room > 0, (ra + np.abs(value) * rb) / room, np.inf)

        def certain():
            by_zero = (b == 0) & (rb == 0) & np.isfinite(ra) & _decided(a, ra)
            infinite = _known_infinite(a, ra, b, rb) & _decided(b, rb)
            return _is_nan(a, ra) | _is_nan(b, rb) | by_zero | infinite

        return self._settled(value, bound + self.precision.smallest, certain)

    def __rtruediv__(self, other):
        return Bounded(other, self.precision) / self

    def __getitem__(self, index):
        return Bounded(self.value[index], self.precision, self.bound[index])

    def reshape(self, *shape):
        return Bounded(self.value.reshape(*shape), self.precision, self.bound.reshape(*shape))

    def transpose(self, *axes):
        return Bounded(self.value.transpose(*axes), self.precision, self.bound.transpose(*axes))

    def sum(self, axis=None):
        """A sum in any order."""
        v, r = self.value, self.bound
        count = v.size if axis is None else v.shape[axis]
        magnitude = np.where(np.isfinite(v), np.abs(v), 0).sum(axis)
        bound = r.sum(axis) + self.precision.unit * count * magnitude

        def certain():
            return _is_nan(v, r).any(axis) | ~np.isinf(r).any(axis)

        total = self._settled(v.sum(axis), bound, certain)
        overflow = np.isfinite(total.bound) & (magnitude > self.precision.largest)
        return Bounded(total.value, self.precision, np.where(overflow, np.inf, total.bound))

    def unknown_where(self, mask):
        return Bounded(self.value, self.precision, np.where(mask, np.inf, self.bound))

    def narrowed(self, precision):
        """Rounded to a storage format, whose range a result may leave."""
        bound = self.bound + precision.unit * np.abs(self.value) + precision.smallest
        known = np.isfinite(self.bound)
        exact = known & (~np.isfinite(self.value) | ((self.value == 0) & (self.bound == 0)))
        bound = np.where(exact, 0.0, np.where(known, bound, np.inf))
        return Bounded(self.value, precision, bound)

    def rejects(self, actual, slack=4.0):
        """Where results cannot come from this expression: farther off than slack times the bound.

        The slack is for expressions that are equal in exact arithmetic and round elsewhere.
        """
        v, r = self.value, slack * self.bound
        close = np.isinf(r) | (actual == v) | (np.isnan(actual) & np.isnan(v))
        close |= np.isfinite(v) & (np.abs(actual - v) <= r)
        close |= np.isposinf(actual) & (v + r >= self.precision.largest)
        close |= np.isneginf(actual) & (v - r <= -self.precision.largest)
        return ~close


def exact_zero(shape, precision):
    return Bounded(np.zeros(shape), precision)


def exp(x):
    """Of numbers up to 0, to 2.5 units in the last place, or 5 below −16 (csrc/common/dfl_math.h).

    What is below the smallest normal number may be 0, or a few times that number.
    """
    u, least = x.precision.unit, 8 * x.precision.normal
    value = np.exp(x.value)
    growth = np.expm1(np.minimum(np.where(np.isnan(x.bound), np.inf, x.bound), 700.0))
    bound = value * (growth + np.where(x.value < -16, 10, 5) * u) + least
    bound = np.where(np.isneginf(x.value) & (x.bound == 0), 0.0, bound)
    tiny = x.value + np.where(np.isfinite(x.bound), x.bound, 0) < -800
    return Bounded(value, x.precision, np.where(np.isnan(value), 0.0, np.where(tiny, least, bound)))


def log(x):
    """Of numbers from 1 up."""
    value = np.log(x.value)
    bound = x.bound / (x.value - x.bound) + 2 * x.precision.unit * np.abs(value)
    return Bounded(value, x.precision, np.where(np.isnan(value), 0.0, bound))


def arctan(x):
    value = np.arctan(x.value)
    slope = 1 / (1 + np.maximum(np.abs(x.value) - x.bound, 0) ** 2)
    bound = np.minimum(x.bound * slope, np.pi) + 8 * x.precision.unit * np.abs(value)
    bound = np.where(np.isinf(x.bound), np.pi, bound)
    return Bounded(value, x.precision, np.where(_is_nan(x.value, x.bound), 0.0, bound))


def minimum(a, b):
    return -maximum(-a, -b)


def maximum(a, b):
    va, ra, vb, rb = a._pair(b)
    nan = _is_nan(va, ra) | _is_nan(vb, rb)
    bound = np.where(va - ra > vb + rb, ra, np.where(vb - rb > va + ra, rb, np.maximum(ra, rb)))
    return Bounded(np.maximum(va, vb), a.precision, np.where(nan, 0.0, bound))


def above(a, b):
    """1 where a > b and 0 where a < b; anything between where rounding decides, or at a tie."""
    va, ra, vb, rb = a._pair(b)
    difference, reach = va - vb, ra + rb
    nan = _is_nan(va, ra) | _is_nan(vb, rb)
    decided = np.abs(difference) > reach
    value = np.where(decided, (difference > 0) * 1.0, 0.5)
    bound = np.where(
        decided, 0.0, np.where(np.isfinite(reach) & ~np.isnan(difference), 0.5, np.inf)
    )
    return Bounded(np.where(nan, np.nan, value), a.precision, np.where(nan, 0.0, bound))


def _is_nan(v, r):
    return np.isnan(v) & np.isfinite(r)


def _decided(v, r):
    """Not 0 for certain, or 0 for certain."""
    return (np.abs(v) > r) | ((v == 0) & (r == 0))


def _known_infinite(a, ra, b, rb):
    """At least one is infinite, and both are known."""
    return np.isfinite(ra) & np.isfinite(rb) & (np.isinf(a) | np.isinf(b))
