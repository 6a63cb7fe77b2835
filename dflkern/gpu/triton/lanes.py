"""One distribution a lane, read from any place and any strides: what columns and boxes share.

Up to 64 bins stay in registers (UNROLL); more are read anew for every pass. CHUNK is 1, or how many
neighbouring bins of a lane one 16-byte load takes.
"""

import triton
import triton.language as tl

from .distribution import (
    LN2,
    LOG2E,
    backward,
    bin_gradient,
    forward,
    position_of,
    slopes,
    weight_of,
    widen,
)
from .rows import put, take


@triton.jit
def read_bins(logits_ptr, bin_stride, mask, K: tl.constexpr, CHUNK: tl.constexpr):
    """The K bins of each lane."""
    z = ()
    if CHUNK > 1:
        within = tl.arange(0, CHUNK)[None, :]
        for c in tl.static_range(K // CHUNK):
            chunk_ptr = logits_ptr[:, None] + (within + c * CHUNK)
            chunk = take(tl.load(chunk_ptr, mask=mask[:, None], other=0.0), CHUNK)
            for i in tl.static_range(CHUNK):
                z += (widen(chunk[i]),)
    else:
        for _ in tl.static_range(K):
            z += (widen(tl.load(logits_ptr, mask=mask, other=0.0)),)
            logits_ptr += bin_stride
    return z


@triton.jit
def _maximum(logits_ptr, bin_stride, mask, K: tl.constexpr):
    m = widen(tl.load(logits_ptr, mask=mask, other=0.0))
    for _ in range(1, K):
        logits_ptr += bin_stride
        m = tl.maximum(m, widen(tl.load(logits_ptr, mask=mask, other=0.0)))
    return m


@triton.jit
def forward_at(
    logits_ptr, bin_stride, mask, t, left, right_weight, project_ptr,
    K: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Loss and expected position of the distributions that begin at logits_ptr."""
    if UNROLL:
        z = read_bins(logits_ptr, bin_stride, mask, K, CHUNK)
        loss, position = forward(
            z, t, left, right_weight, project_ptr, K, LOSS, POSITION, PROJECT
        )  # fmt: skip
    else:
        m = _maximum(logits_ptr, bin_stride, mask, K)
        s = tl.zeros_like(m)
        moment = tl.zeros_like(m)
        dot = t * 0
        for k in range(K):
            x = (widen(tl.load(logits_ptr, mask=mask, other=0.0)) - m) * LOG2E
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
    return loss, position


@triton.jit
def backward_at(
    logits_ptr, bin_stride, grad_logits_ptr, grad_bin_stride, mask,
    t, left, right_weight, grad_loss, grad_position, project_ptr,
    K: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the distributions under the mask."""
    if UNROLL:
        z = read_bins(logits_ptr, bin_stride, mask, K, CHUNK)
        gradient = backward(
            z, t, left, right_weight, grad_loss, grad_position, project_ptr,
            K, LOSS, POSITION, PROJECT,
        )  # fmt: skip
        write_bins(grad_logits_ptr, grad_bin_stride, gradient, mask, K, CHUNK)
    else:
        m = _maximum(logits_ptr, bin_stride, mask, K)
        s = tl.zeros_like(m)
        moment = tl.zeros_like(m)
        bin_ptr = logits_ptr
        for k in range(K):
            e = tl.exp2((widen(tl.load(bin_ptr, mask=mask, other=0.0)) - m) * LOG2E)
            bin_ptr += bin_stride
            s += e
            if POSITION:
                moment = tl.fma(e, position_of(k, project_ptr, PROJECT), moment)
        a, b, expected = slopes(t, s, moment, grad_loss, grad_position, LOSS, POSITION)
        for k in range(K):
            e = tl.exp2((widen(tl.load(logits_ptr, mask=mask, other=0.0)) - m) * LOG2E)
            logits_ptr += bin_stride
            distance = position_of(k, project_ptr, PROJECT) - expected
            y = weight_of(k, t, left, right_weight, PROJECT)
            g = bin_gradient(e, a, b, distance, y, grad_loss, LOSS, POSITION)
            tl.store(grad_logits_ptr, g, mask=mask)
            grad_logits_ptr += grad_bin_stride


@triton.jit
def write_bins(
    grad_logits_ptr, grad_bin_stride, gradient, mask, K: tl.constexpr, CHUNK: tl.constexpr
):
    """Store the K gradients of each lane."""
    if CHUNK > 1:
        within = tl.arange(0, CHUNK)[None, :]
        for c in tl.static_range(K // CHUNK):
            chunk = ()
            for i in tl.static_range(CHUNK):
                chunk += (gradient[c * CHUNK + i].to(grad_logits_ptr.dtype.element_ty),)
            chunk_ptr = grad_logits_ptr[:, None] + (within + c * CHUNK)
            tl.store(chunk_ptr, put(chunk, CHUNK), mask=mask[:, None])
    else:
        for k in tl.static_range(K):
            tl.store(grad_logits_ptr, gradient[k], mask=mask)
            grad_logits_ptr += grad_bin_stride
