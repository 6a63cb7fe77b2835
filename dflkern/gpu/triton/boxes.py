"""Boxes: a lane owns an anchor, whose four sides it takes one after the other.

The grid is (blocks of anchors, images); offsets are int64. box_loss needs two launches: each
program writes its sums, and one program adds them up in a fixed order.
"""

import triton
import triton.language as tl

from .box_iou import paired_iou, paired_iou_gradient
from .distribution import place_target
from .lanes import backward_at, forward_at, write_zeros_at


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
            logits_ptr, bin_stride, grad_logits_ptr, grad_bin_stride, live, live,
            t, t, t, t, upstream, project_ptr, K, False, True, PROJECT, UNROLL, CHUNK, False,
        )  # fmt: skip
        logits_ptr += side_stride
        grad_logits_ptr += side_grad_stride


@triton.jit
def _weight(
    foreground_ptr, weight_ptr, anchor, live, n, classes,
    weight_batch_stride, weight_anchor_stride, weight_class_stride,
    like, FOREGROUND: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """The weight of each anchor, 0 where it is background; class scores are summed."""
    image = tl.program_id(1).to(tl.int64)
    if FOREGROUND:
        marked = tl.load(foreground_ptr + image * n + anchor, mask=live, other=0)
        live = live & (marked != 0)
    weight_ptr += image * weight_batch_stride + anchor * weight_anchor_stride
    weight = like
    if SCORES:
        for _ in range(classes):
            weight += tl.load(weight_ptr, mask=live, other=0.0).to(like.dtype)
            weight_ptr += weight_class_stride
    else:
        weight = tl.load(weight_ptr, mask=live, other=0.0).to(like.dtype)
    return weight


@triton.jit
def _box_at(anchor_points_ptr, target_boxes_ptr, anchor, n, active):
    """Anchor point and target box."""
    box_ptr = target_boxes_ptr + (tl.program_id(1).to(tl.int64) * n + anchor) * 4
    x = tl.load(anchor_points_ptr + 2 * anchor, mask=active, other=0.0)
    y = tl.load(anchor_points_ptr + 2 * anchor + 1, mask=active, other=0.0)
    x1 = tl.load(box_ptr, mask=active, other=0.0)
    y1 = tl.load(box_ptr + 1, mask=active, other=0.0)
    x2 = tl.load(box_ptr + 2, mask=active, other=0.0)
    y2 = tl.load(box_ptr + 3, mask=active, other=0.0)
    return x, y, x1, y1, x2, y2


@triton.jit
def _of_side(side, left, top, right, bottom):
    return tl.where(side < 2, tl.where(side == 0, left, top), tl.where(side == 2, right, bottom))


@triton.jit
def _target_of(side, x, y, x1, y1, x2, y2):
    """The wanted distance of a side."""
    return _of_side(side, x - x1, y - y1, x2 - x, y2 - y)


@triton.jit
def boxes_loss_forward_kernel(
    logits_ptr, anchor_points_ptr, target_boxes_ptr, weight_ptr, foreground_ptr, project_ptr,
    partials_ptr, n, batch_stride, anchor_stride, side_stride, bin_stride,
    weight_batch_stride, weight_anchor_stride, weight_class_stride, classes, programs,
    K: tl.constexpr, MARGIN: tl.constexpr, PROJECT: tl.constexpr, KIND: tl.constexpr,
    FOREGROUND: tl.constexpr, SCORES: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of w (1 - IoU), of w mean(DFL), and the number of anchors, of each program."""
    anchor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    weight = _weight(
        foreground_ptr, weight_ptr, anchor, anchor < n, n, classes,
        weight_batch_stride, weight_anchor_stride, weight_class_stride, zero, FOREGROUND, SCORES,
    )  # fmt: skip
    active = weight != 0
    count = tl.sum(tl.where(active, zero + 1, zero), 0)
    iou_sum = tl.sum(zero, 0)
    dfl_sum = iou_sum
    if count > 0:
        x, y, x1, y1, x2, y2 = _box_at(anchor_points_ptr, target_boxes_ptr, anchor, n, active)
        image = tl.program_id(1).to(tl.int64)
        side_ptr = logits_ptr + image * batch_stride + anchor * anchor_stride
        dfl = zero
        left = zero
        top = zero
        right = zero
        bottom = zero
        for side in tl.range(4, num_stages=1):
            t, bin_left, right_weight = place_target(
                _target_of(side, x, y, x1, y1, x2, y2), project_ptr, K, MARGIN, PROJECT
            )
            loss, distance = forward_at(
                side_ptr, bin_stride, active, t, bin_left, right_weight, project_ptr,
                K, True, True, PROJECT, UNROLL, CHUNK,
            )  # fmt: skip
            side_ptr += side_stride
            dfl += loss
            left = tl.where(side == 0, distance, left)
            top = tl.where(side == 1, distance, top)
            right = tl.where(side == 2, distance, right)
            bottom = tl.where(side == 3, distance, bottom)
        iou = paired_iou(x - left, y - top, x + right, y + bottom, x1, y1, x2, y2, KIND)
        iou_sum = tl.sum(tl.where(active, weight * (1.0 - iou), 0.0), 0)
        dfl_sum = tl.sum(tl.where(active, weight * (dfl * 0.25), 0.0), 0)
    partials_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr, iou_sum)
    tl.store(partials_ptr + programs, dfl_sum)
    tl.store(partials_ptr + 2 * programs, count)


@triton.jit
def boxes_loss_sums_kernel(
    partials_ptr, normalizer_ptr, iou_loss_ptr, dfl_loss_ptr, programs, BLOCK: tl.constexpr
):  # fmt: skip
    """Both losses, from the sums of all programs; 0 without anchors, whatever the normalizer."""
    lane = tl.arange(0, BLOCK)
    iou = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    dfl = iou
    count = iou
    for first in range(0, programs, BLOCK):
        live = first + lane < programs
        part_ptr = partials_ptr + first + lane
        iou += tl.load(part_ptr, mask=live, other=0.0)
        dfl += tl.load(part_ptr + programs, mask=live, other=0.0)
        count += tl.load(part_ptr + 2 * programs, mask=live, other=0.0)
    found = tl.sum(count, 0) > 0
    normalizer = tl.load(normalizer_ptr)
    tl.store(iou_loss_ptr, tl.where(found, tl.sum(iou, 0) / normalizer, 0.0))
    tl.store(dfl_loss_ptr, tl.where(found, tl.sum(dfl, 0) / normalizer, 0.0))


@triton.jit
def boxes_loss_backward_kernel(
    logits_ptr, anchor_points_ptr, target_boxes_ptr, weight_ptr, foreground_ptr, project_ptr,
    normalizer_ptr, grad_iou_ptr, grad_dfl_ptr, grad_logits_ptr,
    n, batch_stride, anchor_stride, side_stride, bin_stride,
    batch_grad_stride, anchor_grad_stride, side_grad_stride, grad_bin_stride,
    weight_batch_stride, weight_anchor_stride, weight_class_stride, classes,
    K: tl.constexpr, MARGIN: tl.constexpr, PROJECT: tl.constexpr, KIND: tl.constexpr,
    FOREGROUND: tl.constexpr, SCORES: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits: what both losses say of active anchors, 0 elsewhere."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = anchor < n
    zero = tl.zeros((BLOCK,), normalizer_ptr.dtype.element_ty)
    weight = _weight(
        foreground_ptr, weight_ptr, anchor, live, n, classes,
        weight_batch_stride, weight_anchor_stride, weight_class_stride, zero, FOREGROUND, SCORES,
    )  # fmt: skip
    active = weight != 0
    grad_logits_ptr += image * batch_grad_stride + anchor * anchor_grad_stride
    if tl.sum(tl.where(active, zero + 1, zero), 0) > 0:
        x, y, x1, y1, x2, y2 = _box_at(anchor_points_ptr, target_boxes_ptr, anchor, n, active)
        first_ptr = logits_ptr + image * batch_stride + anchor * anchor_stride
        side_ptr = first_ptr
        left = zero
        top = zero
        right = zero
        bottom = zero
        for side in tl.range(4, num_stages=1):
            _, distance = forward_at(
                side_ptr, bin_stride, active, zero, zero, zero, project_ptr,
                K, False, True, PROJECT, UNROLL, CHUNK,
            )  # fmt: skip
            side_ptr += side_stride
            left = tl.where(side == 0, distance, left)
            top = tl.where(side == 1, distance, top)
            right = tl.where(side == 2, distance, right)
            bottom = tl.where(side == 3, distance, bottom)
        by_x1, by_y1, by_x2, by_y2 = paired_iou_gradient(
            x - left, y - top, x + right, y + bottom, x1, y1, x2, y2, KIND
        )
        scale = weight / tl.load(normalizer_ptr)
        to_iou = -tl.load(grad_iou_ptr) * scale
        to_dfl = tl.load(grad_dfl_ptr) * scale * 0.25
        side_ptr = first_ptr
        grad_ptr = grad_logits_ptr
        for side in tl.range(4, num_stages=1):
            t, bin_left, right_weight = place_target(
                _target_of(side, x, y, x1, y1, x2, y2), project_ptr, K, MARGIN, PROJECT
            )
            to_position = to_iou * _of_side(side, -by_x1, -by_y1, by_x2, by_y2)
            backward_at(
                side_ptr, bin_stride, grad_ptr, grad_bin_stride, active, live,
                t, bin_left, right_weight, to_dfl, to_position, project_ptr,
                K, True, True, PROJECT, UNROLL, CHUNK, True,
            )  # fmt: skip
            side_ptr += side_stride
            grad_ptr += side_grad_stride
    else:
        grad_ptr = grad_logits_ptr
        for _ in tl.static_range(4):
            write_zeros_at(grad_ptr, grad_bin_stride, live, K, UNROLL, CHUNK)
            grad_ptr += side_grad_stride
