"""Boxes from distributions: a lane owns an anchor, whose four sides it takes one after the other.

The grid is (blocks of anchors, images); offsets are int64.
"""

import triton
import triton.language as tl

from .lanes import backward_at, forward_at


@triton.jit
def boxes_decode_forward_kernel(
    logits_ptr, anchor_points_ptr, stride_ptr, project_ptr, boxes_ptr,
    n, batch_stride, anchor_stride, side_stride, bin_stride,
    box_batch_stride, box_anchor_stride, box_side_stride,
    K: tl.constexpr, PROJECT: tl.constexpr, STRIDE: tl.constexpr, CXCYWH: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes from softmax, expectation and anchor points."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = anchor < n
    logits_ptr += image * batch_stride + anchor * anchor_stride
    boxes_ptr += image * box_batch_stride + anchor * box_anchor_stride
    scale = tl.full((BLOCK,), 1.0, boxes_ptr.dtype.element_ty)
    if STRIDE:
        scale = tl.load(stride_ptr + anchor, mask=live, other=1.0)
    low = ()
    for side in tl.static_range(4):
        t = scale * 0
        _, position = forward_at(
            logits_ptr, bin_stride, live, t, t, t, project_ptr,
            K, False, True, PROJECT, UNROLL, CHUNK,
        )  # fmt: skip
        logits_ptr += side_stride
        point = tl.load(anchor_points_ptr + 2 * anchor + side % 2, mask=live, other=0.0)
        if side < 2:
            edge = point - position
            low += (edge,)
            if not CXCYWH:
                tl.store(boxes_ptr + side * box_side_stride, edge * scale, mask=live)
        else:
            edge = point + position
            if CXCYWH:
                start = low[side - 2]
                centre = (start + edge) * 0.5
                tl.store(boxes_ptr + (side - 2) * box_side_stride, centre * scale, mask=live)
                edge = edge - start
            tl.store(boxes_ptr + side * box_side_stride, edge * scale, mask=live)


@triton.jit
def boxes_decode_backward_kernel(
    logits_ptr, stride_ptr, project_ptr, grad_boxes_ptr, grad_logits_ptr,
    n, batch_stride, anchor_stride, side_stride, bin_stride,
    box_batch_stride, box_anchor_stride, box_side_stride,
    batch_grad_stride, anchor_grad_stride, side_grad_stride, grad_bin_stride,
    K: tl.constexpr, PROJECT: tl.constexpr, STRIDE: tl.constexpr, CXCYWH: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = anchor < n
    logits_ptr += image * batch_stride + anchor * anchor_stride
    grad_logits_ptr += image * batch_grad_stride + anchor * anchor_grad_stride
    grad_boxes_ptr += image * box_batch_stride + anchor * box_anchor_stride
    for side in tl.static_range(4):
        first = tl.load(grad_boxes_ptr + side % 2 * box_side_stride, mask=live, other=0.0)
        second = tl.load(grad_boxes_ptr + (side % 2 + 2) * box_side_stride, mask=live, other=0.0)
        # xyxy: -first, second. cxcywh: centre = anchor + (rb - lt) / 2, size = lt + rb
        if CXCYWH:
            if side < 2:
                upstream = second - first * 0.5
            else:
                upstream = second + first * 0.5
        else:
            if side < 2:
                upstream = -first
            else:
                upstream = second
        if STRIDE:
            upstream *= tl.load(stride_ptr + anchor, mask=live, other=1.0)
        t = upstream * 0
        backward_at(
            logits_ptr, bin_stride, grad_logits_ptr, grad_bin_stride, live,
            t, t, t, t, upstream, project_ptr, K, False, True, PROJECT, UNROLL, CHUNK,
        )  # fmt: skip
        logits_ptr += side_stride
        grad_logits_ptr += side_grad_stride
