"""What a kernel needs to know about a call: the frozen `Problem`, made from metadata only."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype all arithmetic and all results have: fp64 for fp64 logits, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def savable(tensor: Tensor) -> Tensor:
    """The tensor as autograd can save it: a copy of one that was made in inference mode."""
    if torch.compiler.is_compiling():  # which cannot ask
        return tensor
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


class Axis(NamedTuple):
    """One axis that holds distributions: its size, and its stride in elements in each tensor."""

    size: int
    logits: int
    output: int
    grad: int


@dataclass(frozen=True)
class Problem:
    """What a kernel needs to know about a call, read from metadata.

    `axes` are the axes beside the bins, outermost first, those of size 1 left out and neighbours
    merged wherever logits, outputs (contiguous) and the logits' gradient (strides of
    `torch.empty_like`) allow it. At most three remain: if more could not be merged, the logits
    are copied once, and `copied` says so.
    """

    num_bins: int
    axes: tuple[Axis, ...]
    bin_stride: int
    grad_bin_stride: int
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    margin: float
    project: bool
    copied: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, the targets and the results."""
        return compute_dtype(self.dtype)

    @property
    def count(self) -> int:
        """How many distributions there are."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def layout(self) -> str:
        """rows: bins contiguous; columns: neighbouring distributions contiguous; else strided."""
        if self.bin_stride == 1:
            return "rows"
        if any(axis.logits == 1 for axis in self.axes):
            return "columns"
        return "strided"

    @property
    def packed(self) -> bool:
        """The distributions are one contiguous range of memory, in logits and gradient."""
        if self.bin_stride != 1 or self.grad_bin_stride != 1 or len(self.axes) > 1:
            return False
        return all(axis.logits == axis.grad == self.num_bins for axis in self.axes)


def merge(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Join neighbours that one stride can walk in all tensors; leave out axes of size 1."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        if merged:
            outer = merged[-1]
            if all(outer[i] == axis.size * axis[i] for i in (1, 2, 3)):
                merged[-1] = Axis(outer.size * axis.size, *axis[1:])
                continue
        merged.append(axis)
    return tuple(merged)


@functools.lru_cache(maxsize=4096)
def describe(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    dim: int,
    *,
    aligned: bool = True,
    margin: float = 0.0,
    project: bool = False,
) -> Problem:
    """The Problem of checked logits with the bins along dim (counted from the front).

    `aligned` says whether the logits begin at a multiple of 16 bytes.
    """
    logits = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    gradient = torch.empty_like(logits)
    others = [axis for axis in range(len(shape)) if axis != dim]
    sizes = [shape[axis] for axis in others]
    axes = (
        (Axis(0, 0, 0, 0),)
        if 0 in sizes
        else merge(
            [
                Axis(
                    size,
                    stride[axis],
                    math.prod(sizes[i + 1 :]),
                    gradient.stride(axis),
                )
                for i, (axis, size) in enumerate(zip(others, sizes, strict=True))
            ]
        )
    )
    if len(axes) > 3:
        copy = torch.empty(shape, device="meta").stride()
        problem = describe(shape, copy, dtype, device, dim, margin=margin, project=project)
        return replace(problem, copied=True)
    return Problem(
        num_bins=shape[dim],
        axes=axes,
        bin_stride=stride[dim],
        grad_bin_stride=gradient.stride(dim),
        dtype=dtype,
        device=device,
        aligned=aligned,
        margin=margin,
        project=project,
    )


def describe_tensor(
    logits: Tensor, dim: int, *, margin: float = 0.0, project: bool = False
) -> Problem:
    """The Problem of a real tensor of logits."""
    return describe(
        tuple(logits.shape), logits.stride(), logits.dtype, logits.device, dim,
        aligned=logits.data_ptr() % 16 == 0, margin=margin, project=project,
    )  # fmt: skip
