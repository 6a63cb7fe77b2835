"""Tensors of hostile values and strides, from NumPy's random generators."""

from __future__ import annotations

import numpy as np
import torch

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LAYOUTS = (
    "contiguous", "offset", "permuted", "padded", "stepped", "expanded", "overlapping",
)  # fmt: skip
VALUES = ("normal", "zero", "equal", "sharp", "wide", "special", "extreme")
SPECIAL = (np.nan, np.inf, -np.inf, 1e30, -1e30, -0.0, 0.0, 1e-40, -1e-40, 6e-8, 65504.0, -65504.0)
EXTREME = (3.3e38, -3.3e38, 65504.0, -65504.0, 1e-38, -1e-38, 1e-45, 0.0, -0.0)
# The bytes of a mask that are True are all but 0
MASKS = ("bits", "none", "all", "bytes", "all 255", "few")


def numbers(rng, size, kind, scale=3.0):
    """`size` float64 numbers of one of VALUES."""
    if kind == "zero":
        return np.zeros(size)
    if kind == "equal":
        return np.full(size, rng.normal() * scale)
    if kind == "extreme":
        return rng.choice(EXTREME, size)
    values = rng.normal(size=size) * scale
    if kind == "sharp":  # a few large numbers among small ones
        return np.where(rng.random(size) < 0.1, values * 30, values)
    if kind == "wide":
        return values * 10.0 ** rng.uniform(-6, 3)
    if kind == "special":
        return np.where(
            rng.random(size) < rng.choice([0.02, 0.2]), rng.choice(SPECIAL, size), values
        )
    return values


def lay_out(rng, fill, shape, dtype, layout):
    """A tensor of a shape whose elements lie in memory as the layout says.

    `fill(size)` gives the numbers. What lies between and around the elements is NaN, or 255 in a
    mask. Elements of an expanded or overlapping tensor share memory.
    """
    shape = tuple(shape)
    if layout == "overlapping" and shape:
        strides = [int(s) for s in rng.integers(0, 4, len(shape))]
        reach = sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
        return _storage(fill(reach + 1), dtype).as_strided(shape, strides)
    if layout == "expanded" and shape:
        shared = rng.random(len(shape)) < 0.5
        base = [1 if one and n else n for one, n in zip(shared, shape, strict=True)]
        return _storage(fill(_count(base)), dtype).view(base).expand(shape)
    if layout == "permuted":
        order = [int(axis) for axis in rng.permutation(len(shape))]
        base = _storage(fill(_count(shape)), dtype).view([shape[axis] for axis in order])
        return base.permute([order.index(axis) for axis in range(len(shape))])
    if layout in ("padded", "stepped"):
        steps = [int(s) for s in rng.integers(1, 3, len(shape))] if layout == "stepped" else None
        steps = steps or [1] * len(shape)
        before = [int(b) for b in rng.integers(0, 3, len(shape))]
        whole = [
            b + n * s + int(rng.integers(0, 2))
            for b, n, s in zip(before, shape, steps, strict=True)
        ]
        base = _storage(_around(_count(whole), dtype), dtype).view(whole)
        view = base[
            tuple(slice(b, b + n * s, s) for b, n, s in zip(before, shape, steps, strict=True))
        ]
        return view.copy_(_storage(fill(_count(shape)), dtype).view(shape))
    offset = int(rng.integers(1, 8)) if layout == "offset" else 0
    values = np.concatenate((_around(offset, dtype), fill(_count(shape))))
    return _storage(values, dtype)[offset:].view(shape)


def mask_of(rng, shape, kind, layout):
    """A bool tensor over bytes that need not be 0 or 1, as other libraries and bugs leave them."""

    def fill(size):
        chance = {"none": 0.0, "all": 1.0, "all 255": 1.0, "few": 0.1}.get(kind, 0.5)
        byte = {"bytes": rng.integers(1, 256, size), "all 255": 255}.get(kind, 1)
        return np.where(rng.random(size) < chance, byte, 0)

    return lay_out(rng, fill, shape, torch.uint8, layout).view(torch.bool)


def exact(tensor):
    """The values of a tensor in float64, which holds those of every type."""
    if tensor.dtype == torch.bool:
        return tensor.detach().view(torch.uint8).numpy() != 0
    return tensor.detach().to(torch.float64).numpy()


def bits(tensor):
    """The bytes of a tensor's elements, in order."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return dense.reshape(-1).view(torch.uint8)


def memory(tensor):
    """All bytes of a tensor's storage, with what lies around its elements."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def _count(shape):
    return int(np.prod(shape, dtype=np.int64))


def _around(size, dtype):
    return np.full(size, 255 if dtype == torch.uint8 else np.nan)


def _storage(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
