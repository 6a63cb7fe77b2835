"""Kernels with one distribution a lane and one load a bin: any strides.

In the columns layout (a head's (B, 4K, A)) neighbouring lanes read neighbouring anchors, so every
load is coalesced. Elsewhere (rows with gaps, odd storage offsets) the loads of a lane share sectors
through the cache. The grid is (blocks of the lanes' axis, middle axis, outer axis); offsets are
int64.
"""

import triton
import triton.language as tl

from .distribution import (
    LN2,
    LOG2E,
    backward,
    bin_gradient,
    forward,
    place_target,
    position_of,
    slopes,
    weight_of,
    widen,
)


@triton.jit
def _offset(lane, axis_stride, middle_stride, outer_stride):
    middle = tl.program_id(1).to(tl.int64) * middle_stride
    return lane * axis_stride + middle + tl.program_id(2).to(tl.int64) * outer_stride


@triton.jit
def columns_forward_kernel(
    logits_ptr, target_ptr, project_ptr, loss_ptr, position_ptr,
    n, bin_stride, axis_stride, middle_stride, outer_stride,
    axis_output_stride, middle_output_stride, outer_output_stride,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    PROJECT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and expected position."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < n
    logits_ptr += _offset(lane, axis_stride, middle_stride, outer_stride)
    output = _offset(lane, axis_output_stride, middle_output_stride, outer_output_stride)
    if UNROLL:
        z = ()
        for _ in tl.static_range(K):
            z += (widen(tl.load(logits_ptr, mask=live, other=0.0)),)
            logits_ptr += bin_stride
        t = tl.zeros_like(z[0])
        if LOSS:
            t = tl.load(target_ptr + output, mask=live, other=0.0)
        t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
        loss, position = forward(
            z, t, left, right_weight, project_ptr, K, LOSS, POSITION, PROJECT
        )  # fmt: skip
    else:
        m = _maximum(logits_ptr, bin_stride, live, K)
        t = tl.zeros_like(m)
        if LOSS:
            t = tl.load(target_ptr + output, mask=live, other=0.0)
        t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
        s = tl.zeros_like(m)
        moment = tl.zeros_like(m)
        dot = t * 0
        for k in range(K):
            x = (widen(tl.load(logits_ptr, mask=live, other=0.0)) - m) * LOG2E
            logits_ptr += bin_stride
            e = tl.exp2(x)
            s += e
            if POSITION:
                moment = tl.fma(e, position_of(k, project_ptr, PROJECT), moment)
            if LOSS:
                y = weight_of(k, t, left, right_weight, PROJECT)
                dot = tl.where(y > 0, tl.fma(y, x, dot), dot)
        loss = (tl.log2(s) - dot) * LN2
        position = moment / s
    if LOSS:
        tl.store(loss_ptr + output, loss, mask=live)
    if POSITION:
        tl.store(position_ptr + output, position, mask=live)


@triton.jit
def columns_backward_kernel(
    logits_ptr, target_ptr, project_ptr, grad_loss_ptr, grad_position_ptr, grad_logits_ptr,
    n, bin_stride, axis_stride, middle_stride, outer_stride,
    axis_output_stride, middle_output_stride, outer_output_stride,
    grad_bin_stride, axis_grad_stride, middle_grad_stride, outer_grad_stride,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    PROJECT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < n
    logits_ptr += _offset(lane, axis_stride, middle_stride, outer_stride)
    grad_logits_ptr += _offset(lane, axis_grad_stride, middle_grad_stride, outer_grad_stride)
    output = _offset(lane, axis_output_stride, middle_output_stride, outer_output_stride)
    z = ()
    if UNROLL:
        for _ in tl.static_range(K):
            z += (widen(tl.load(logits_ptr, mask=live, other=0.0)),)
            logits_ptr += bin_stride
        m = z[0]
    else:
        m = _maximum(logits_ptr, bin_stride, live, K)
    t = tl.zeros_like(m)
    grad_loss = t
    grad_position = t
    if LOSS:
        t = tl.load(target_ptr + output, mask=live, other=0.0)
        grad_loss = tl.load(grad_loss_ptr + output, mask=live, other=0.0)
    if POSITION:
        grad_position = tl.load(grad_position_ptr + output, mask=live, other=0.0)
    t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
    if UNROLL:
        gradient = backward(
            z, t, left, right_weight, grad_loss, grad_position, project_ptr,
            K, LOSS, POSITION, PROJECT,
        )  # fmt: skip
        for k in tl.static_range(K):
            tl.store(grad_logits_ptr, gradient[k], mask=live)
            grad_logits_ptr += grad_bin_stride
    else:
        s = tl.zeros_like(m)
        moment = tl.zeros_like(m)
        bin_ptr = logits_ptr
        for k in range(K):
            e = tl.exp2((widen(tl.load(bin_ptr, mask=live, other=0.0)) - m) * LOG2E)
            bin_ptr += bin_stride
            s += e
            if POSITION:
                moment = tl.fma(e, position_of(k, project_ptr, PROJECT), moment)
        a, b, expected = slopes(t, s, moment, grad_loss, grad_position, LOSS, POSITION)
        for k in range(K):
            e = tl.exp2((widen(tl.load(logits_ptr, mask=live, other=0.0)) - m) * LOG2E)
            logits_ptr += bin_stride
            distance = position_of(k, project_ptr, PROJECT) - expected
            y = weight_of(k, t, left, right_weight, PROJECT)
            g = bin_gradient(e, a, b, distance, y, grad_loss, LOSS, POSITION)
            tl.store(grad_logits_ptr, g, mask=live)
            grad_logits_ptr += grad_bin_stride


@triton.jit
def _maximum(logits_ptr, bin_stride, live, K: tl.constexpr):
    """The largest bin of each lane, read in a loop."""
    m = widen(tl.load(logits_ptr, mask=live, other=0.0))
    for _ in range(1, K):
        logits_ptr += bin_stride
        m = tl.maximum(m, widen(tl.load(logits_ptr, mask=live, other=0.0)))
    return m
