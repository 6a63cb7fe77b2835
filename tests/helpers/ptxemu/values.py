"""PTX types as NumPy sees them, and the float arithmetic that NumPy lacks."""

from typing import NamedTuple

import numpy as np


class Type(NamedTuple):
    """kind: b, u, s (integers), f (IEEE floats), bf (bfloat16), p (predicates), or a pair."""

    kind: str
    bits: int

    @property
    def is_float(self):
        return self.kind in ("f", "bf")

    @property
    def is_signed(self):
        return self.kind == "s"


TYPES = {f"{kind}{bits}": Type(kind, bits) for kind in "bsu" for bits in (8, 16, 32, 64)}
TYPES |= {f"f{bits}": Type("f", bits) for bits in (16, 32, 64)}
TYPES |= {"bf16": Type("bf", 16), "pred": Type("p", 1)}
TYPES |= {f"{kind}x2": Type(f"{kind}x2", bits) for kind, bits in (("f16", 32), ("bf16", 32))}
TYPES["f32x2"] = Type("f32x2", 64)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
LEAST_NORMAL = np.float32(2.0**-126)


def from_bits(bits, type):
    """An array of unsigned integers as numbers of a PTX type."""
    if type.kind == "f":
        return bits.view(FLOAT[type.bits])
    if type.kind == "bf":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(SIGNED[type.bits]) if type.is_signed else bits


def to_bits(values, type):
    """The reverse of from_bits; floats are rounded to nearest even."""
    if type.kind == "f":
        return np.asarray(values, FLOAT[type.bits]).view(UNSIGNED[type.bits])
    if type.kind == "bf":
        return to_bfloat16(values)
    if type.is_signed:
        return np.asarray(values).astype(SIGNED[type.bits]).view(UNSIGNED[type.bits])
    return np.asarray(values).astype(UNSIGNED[type.bits])


def to_bfloat16(values):
    """The bits of float32 values rounded to bfloat16; NaN becomes PTX's canonical 0x7fff."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(values):
    """Denormal float32 to zeros of the same sign, as .ftz does; other types unchanged."""
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < LEAST_NORMAL, np.copysign(np.float32(0), values), values)


def fused_multiply_add(a, b, c):
    """a · b + c, rounded once.

    The product of two float32 is exact in float64, and rounding its sum with c to odd before
    rounding to float32 makes two roundings one. In float64 the exact error of the product
    (Dekker's) and of the sum (Knuth's) is added at the end, which leaves at most one unit in the
    last place where the sum lies close to a tie.
    """
    if a.dtype == np.float64:
        product, product_error = _two_product(a, b)
        total, error = _two_sum(product, c)
        return np.where(np.isfinite(total), total + (error + product_error), a * b + c)
    total, error = _two_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    bits = total.copy().view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(total) & (bits & 1 == 0)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, odd, bits).view(np.float64).astype(np.float32)


def _two_sum(a, b):
    total = a + b
    share = total - a
    return total, (a - (total - share)) + (b - share)


def _two_product(a, b):
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, np.where(np.isfinite(error), error, 0.0)


def _halves(values):
    scaled = values * 134217729.0  # 2²⁷ + 1
    high = scaled - (scaled - values)
    return high, values - high


def either(masks):
    """Where any of the masks is true; None stands for nowhere."""
    masks = [mask for mask in masks if mask is not None]
    return np.logical_or.reduce(np.broadcast_arrays(*masks)) if masks else None
