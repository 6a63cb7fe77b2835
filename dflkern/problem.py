"""What a kernel needs to know about a call: the frozen `Problem`, made from metadata only."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_number, check_other, check_shape


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype all arithmetic and all results have: fp64 for fp64 logits, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def savable(tensor: Tensor) -> Tensor:
    """The tensor as autograd can save it: a copy of one that was made in inference mode."""
    if torch.compiler.is_compiling():  # which cannot ask
        return tensor
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


def filled(op: str, name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> Tensor:
    """A number as a tensor: by a fill, where torch.tensor would be a copy from the host."""
    dtype = compute_dtype(logits.dtype)
    check_number(op, name, value, dtype)
    return torch.full(shape, value, dtype=dtype, device=logits.device)


def scalar(op: str, name: str, value: Tensor | float | None, logits: Tensor) -> Tensor:
    """A 0-dim tensor, or a number as one."""
    if not isinstance(value, Tensor):
        return filled(op, name, value, (), logits)
    check_other(op, name, value, logits)
    check_shape(op, name, value, ())
    return value


def per_anchor(op: str, name: str, value: Tensor | float, anchors: int, logits: Tensor) -> Tensor:
    """A number of each anchor, (A,) or (A, 1), or one for all of them as a tensor."""
    if not isinstance(value, Tensor):
        return filled(op, name, value, (anchors,), logits)
    check_other(op, name, value, logits)
    check_shape(op, name, value, (anchors, 1), (anchors,))
    return value


class Axis(NamedTuple):
    """One axis that holds distributions: its size, and its stride in elements in each tensor.

    `weight` and `upstream` are the strides of weights and upstream gradients of the mode "strided".
    """

    size: int
    logits: int
    output: int
    grad: int
    weight: int = 0
    upstream: int = 0


class Beside(NamedTuple):
    """A tensor with a number for each target, or one that broadcasts to the targets' shape.

    `mode` says where the number of a target is: "dense" in a contiguous tensor of the targets'
    shape, "sides" in one without the last axis, "scalar" in a single number, "strided" anywhere, by
    `strides` over the targets' axes.
    """

    dtype: torch.dtype
    mode: str = "dense"
    strides: tuple[int, ...] = ()


class Besides(NamedTuple):
    """What the kernels of distributions read beside the logits and a project: no sizes.

    None for a tensor that is absent, or dense and in the compute dtype. `sides` is the size of the
    axis before the bins where a mode or the reduction asks for it, else 1, and `inner` how many
    targets are between two sides where the reduction asks. `aligned` says whether the dense ones
    begin at multiples of 16 bytes, `in_place` whether they are read as they are, without a copy.
    """

    target: torch.dtype | None = None
    weight: Beside | None = None
    normalizer: torch.dtype | None = None
    grad_loss: Beside | None = None
    grad_position: Beside | None = None
    reduction: str = "none"
    sides: int = 1
    inner: int = 1
    aligned: bool = True
    in_place: bool = True

    @property
    def strided(self) -> bool:
        """Whether one of them has strides of its own."""
        return any(
            each is not None and each.mode == "strided"
            for each in (self.weight, self.grad_loss, self.grad_position)
        )


NOTHING_BESIDE = Besides()


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
    beside: Besides = NOTHING_BESIDE

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # computed once: problems are the keys of the launches' caches

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
        if self.beside.strided:
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
            if all(outer[i] == axis.size * axis[i] for i in range(1, 6)):
                merged[-1] = Axis(outer.size * axis.size, *axis[1:])
                continue
        merged.append(axis)
    return tuple(merged)


def strides_like(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The strides of torch.empty_like of a tensor: its own if it is dense, else contiguous ones.

    A tensor is dense if its elements fill a range of memory without overlap, in any order of axes.
    Strides of axes of size 1 mean nothing, and may be others.
    """
    contiguous = contiguous_strides(shape)
    if 0 in shape or all(
        size == 1 or own == dense
        for size, own, dense in zip(shape, stride, contiguous, strict=True)
    ):
        return contiguous
    expected = 1
    for axis in sorted(
        (axis for axis, size in enumerate(shape) if size > 1), key=stride.__getitem__
    ):
        if stride[axis] != expected:
            with torch.device("meta"):
                return torch.empty_like(torch.empty_strided(shape, stride)).stride()
        expected *= shape[axis]
    return tuple(stride)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a new tensor of a shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


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
    beside: Besides = NOTHING_BESIDE,
) -> Problem:
    """The Problem of checked logits with the bins along dim (counted from the front).

    `aligned` says whether the logits begin at a multiple of 16 bytes.
    """
    gradient = strides_like(shape, stride)
    others = [axis for axis in range(len(shape)) if axis != dim]
    sizes = [shape[axis] for axis in others]
    outputs = contiguous_strides(sizes)
    nothing = (0,) * len(others)
    upstream = beside.grad_loss or beside.grad_position
    weights = (beside.weight and beside.weight.strides) or nothing
    upstreams = (upstream and upstream.strides) or nothing
    axes: tuple[Axis, ...] = (Axis(0, 0, 0, 0),)
    if 0 not in sizes:
        axes = merge([
            Axis(size, stride[axis], output, gradient[axis], weight, grad)
            for axis, size, output, weight, grad in zip(
                others, sizes, outputs, weights, upstreams, strict=True
            )
        ])  # fmt: skip
    if len(axes) > 3:
        copy = contiguous_strides(shape)
        beside = beside._replace(  # what has strides of its own is copied, too
            weight=dense(beside.weight),
            grad_loss=dense(beside.grad_loss),
            grad_position=dense(beside.grad_position),
        )
        problem = describe(
            shape, copy, dtype, device, dim, margin=margin, project=project, beside=beside
        )
        return replace(problem, copied=True)
    return Problem(
        num_bins=shape[dim],
        axes=axes,
        bin_stride=stride[dim],
        grad_bin_stride=gradient[dim],
        dtype=dtype,
        device=device,
        aligned=aligned,
        margin=margin,
        project=project,
        beside=beside,
    )


def describe_tensor(
    logits: Tensor,
    dim: int,
    *,
    margin: float = 0.0,
    project: bool = False,
    beside: Besides = NOTHING_BESIDE,
) -> Problem:
    """The Problem of a real tensor of logits."""
    return describe(
        tuple(logits.shape), logits.stride(), logits.dtype, logits.device, dim,
        aligned=logits.data_ptr() % 16 == 0, margin=margin, project=project, beside=beside,
    )  # fmt: skip


def describe_besides(arguments: Mapping[str, Any]) -> Besides:
    """What the arguments of an operator on distributions, or of its gradient, have beside logits.

    A gradient that is not there yet is taken to be as autograd gives it for a sum of the results.
    """
    get = arguments.get
    target, weight, normalizer = get("target"), get("weight"), get("normalizer")
    grad_loss, grad_position = get("grad_loss"), get("grad_position")
    reduction = get("reduction", "none")
    compute = compute_dtype(arguments["logits"].dtype)
    in_place = target is None or target.is_contiguous()
    if (weight is None and normalizer is None and grad_position is None) and (
        grad_loss is None or reduction in ("sum", "mean")
    ):  # most calls: no shapes matter
        if target is None:
            return NOTHING_BESIDE
        if in_place and target.dtype is compute and reduction != "side_mean":
            scalar = None if grad_loss is None else compute
            return _usual(reduction, scalar, target.data_ptr() % 16 == 0)
    logits, dim = arguments["logits"], arguments["dim"]
    last = dim == logits.ndim - 1
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    weights = None if weight is None else beside_of(weight, shape, last)
    if grad_loss is None or reduction in ("sum", "mean"):
        losses = None if grad_loss is None else Beside(compute, "scalar")
    else:
        if reduction == "side_mean":
            grad_loss = grad_loss.unsqueeze(dim - 1)
        losses = beside_of(grad_loss, shape, last)
    grads = None if grad_position is None else beside_of(grad_position, shape, last)
    if losses and grads and "strided" in (losses.mode, grads.mode):
        in_place = False  # strides of its own has one upstream gradient at most
        losses, grads = dense(losses), dense(grads)
    modes = [each.mode for each in (weights, losses, grads) if each]
    address = 0 if target is None else target.data_ptr()
    for tensor, each in ((weight, weights), (grad_loss, losses), (grad_position, grads)):
        if tensor is not None and each and each.mode == "dense":
            address |= tensor.data_ptr()
    return Besides(
        None if target is None or target.dtype == compute else target.dtype,
        weights,
        None if normalizer is None else normalizer.dtype,
        losses,
        grads,
        reduction,
        shape[dim - 1] if reduction == "side_mean" or "sides" in modes else 1,
        math.prod(shape[dim:]) if reduction == "side_mean" else 1,
        address % 16 == 0,
        in_place,
    )


@functools.cache
def _usual(reduction: str, scalar: torch.dtype | None, aligned: bool) -> Besides:
    grad = None if scalar is None else Beside(scalar, "scalar")
    return Besides(reduction=reduction, grad_loss=grad, aligned=aligned)


def dense(beside: Beside | None) -> Beside | None:
    """The same, copied if it has strides of its own."""
    if beside is None or beside.mode != "strided":
        return beside
    return Beside(beside.dtype)


def beside_of(tensor: Tensor, shape: Sequence[int], last: bool) -> Beside:
    """How a tensor that broadcasts to the targets' shape is read; last: its last axis is the sides.

    One that needs no strides of its own gives the same answer for all sizes.
    """
    if tensor.shape == shape and tensor.is_contiguous():
        return Beside(tensor.dtype)
    ahead = len(shape) - tensor.ndim
    strides = (0,) * ahead + tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if not any(strides):
        return Beside(tensor.dtype, "scalar")
    if last and not strides[-1]:
        without = contiguous_strides(shape[:-1])
        if all(
            size == 1 or own == dense
            for size, own, dense in zip(shape[:-1], strides[:-1], without, strict=True)
        ):
            return Beside(tensor.dtype, "sides")
    return Beside(tensor.dtype, "strided", strides)
