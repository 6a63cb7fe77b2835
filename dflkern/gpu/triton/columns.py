"""Kernels with one distribution a lane and one load a bin: any strides.

In the columns layout (a head's (B, 4K, A)) neighbouring lanes read neighbouring anchors, so every
load is coalesced. Elsewhere (rows with gaps, odd storage offsets) the loads of a lane share sectors
through the cache. The grid is (blocks of the lanes' axis, middle axis, outer axis); offsets are
int64.
"""

import triton
import triton.language as tl

from .distribution import (
    load_beside,
    place_target,
    store_loss,
    upstream_loss,
    weighted,
    widen,
)
from .lanes import backward_at, forward_at


@triton.jit
def _offset(lane, axis_stride, middle_stride, outer_stride):
    middle = tl.program_id(1).to(tl.int64) * middle_stride
    return lane * axis_stride + middle + tl.program_id(2).to(tl.int64) * outer_stride


@triton.jit
def columns_forward_kernel(
    logits_ptr, target_ptr, project_ptr, weight_ptr, loss_ptr, position_ptr,
    n, bin_stride, axis_stride, middle_stride, outer_stride,
    axis_output_stride, middle_output_stride, outer_output_stride,
    axis_weight_stride, middle_weight_stride, outer_weight_stride,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, SUM: tl.constexpr,
    PROJECT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and expected position."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < n
    logits_ptr += _offset(lane, axis_stride, middle_stride, outer_stride)
    output = _offset(lane, axis_output_stride, middle_output_stride, outer_output_stride)
    t = widen(tl.zeros((BLOCK,), logits_ptr.dtype.element_ty))
    if LOSS:
        t = tl.load(target_ptr + output, mask=live, other=0.0).to(t.dtype)
    t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
    loss, position = forward_at(
        logits_ptr, bin_stride, live, t, left, right_weight, project_ptr,
        K, LOSS, POSITION, PROJECT, UNROLL, 1,
    )  # fmt: skip
    if LOSS:
        own = _offset(lane, axis_weight_stride, middle_weight_stride, outer_weight_stride)
        loss = weighted(loss, weight_ptr, output, own, live, WEIGHT, SIDES)
        store_loss(loss_ptr, output, loss, live, SUM)
    if POSITION:
        tl.store(position_ptr + output, position, mask=live)


@triton.jit
def columns_backward_kernel(
    logits_ptr, target_ptr, project_ptr, weight_ptr, normalizer_ptr, grad_loss_ptr,
    grad_position_ptr, grad_logits_ptr,
    n, bin_stride, axis_stride, middle_stride, outer_stride,
    axis_output_stride, middle_output_stride, outer_output_stride,
    axis_weight_stride, middle_weight_stride, outer_weight_stride,
    axis_upstream_stride, middle_upstream_stride, outer_upstream_stride,
    grad_bin_stride, axis_grad_stride, middle_grad_stride, outer_grad_stride, count,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, DIVIDE: tl.constexpr,
    GRAD_LOSS: tl.constexpr, GRAD_POSITION: tl.constexpr,
    PROJECT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < n
    logits_ptr += _offset(lane, axis_stride, middle_stride, outer_stride)
    grad_logits_ptr += _offset(lane, axis_grad_stride, middle_grad_stride, outer_grad_stride)
    output = _offset(lane, axis_output_stride, middle_output_stride, outer_output_stride)
    own = _offset(lane, axis_upstream_stride, middle_upstream_stride, outer_upstream_stride)
    t = widen(tl.zeros((BLOCK,), logits_ptr.dtype.element_ty))
    grad_loss = t
    grad_position = t
    if LOSS:
        t = tl.load(target_ptr + output, mask=live, other=0.0).to(t.dtype)
        weights = _offset(lane, axis_weight_stride, middle_weight_stride, outer_weight_stride)
        grad_loss = upstream_loss(
            grad_loss_ptr, weight_ptr, normalizer_ptr, count, output, own, weights, live,
            GRAD_LOSS, WEIGHT, DIVIDE, SIDES,
        )  # fmt: skip
    if POSITION:
        grad_position = load_beside(grad_position_ptr, output, own, live, GRAD_POSITION, SIDES)
    t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
    backward_at(
        logits_ptr, bin_stride, grad_logits_ptr, grad_bin_stride, live,
        t, left, right_weight, grad_loss, grad_position, project_ptr,
        K, LOSS, POSITION, PROJECT, UNROLL, 1,
    )  # fmt: skip
