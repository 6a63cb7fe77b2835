"""The loss of boxes: a warp looks at BLOCK anchors and computes those that have a weight.

The grid is (blocks of anchors, images), of one warp each; offsets are int64. `foreground` says how
a warp finds its anchors and divides them among its lanes. The forward pass needs a second launch of
one program, which adds the sums of the warps in a fixed order.
"""

import triton
import triton.language as tl

from .box_iou import paired_iou, paired_iou_gradient
from .distribution import exponentials, forward, gradients, place_target
from .foreground import box_of, edges_at, find_anchors, scores_at, take_anchors
from .lanes import backward_at, forward_at, read_bins, write_bins


@triton.jit
def boxloss_forward_kernel(
    logits_ptr, anchor_points_ptr, target_boxes_ptr, weight_ptr, foreground_ptr, project_ptr,
    partials_ptr, anchor_weight_ptr, n, batch_stride, anchor_stride, side_stride, bin_stride,
    weight_batch_stride, weight_anchor_stride, weight_class_stride, classes, programs,
    K: tl.constexpr, MARGIN: tl.constexpr, PROJECT: tl.constexpr, KIND: tl.constexpr,
    SCORES: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of w (1 - IoU), of w mean(DFL), and the number of anchors, of each program."""
    image = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    side = lane % 4
    sign = tl.where(side < 2, -1.0, 1.0)
    zero = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    weight_ptr += image * weight_batch_stride
    bits, weights = find_anchors(
        foreground_ptr, weight_ptr, block, n, classes, weight_anchor_stride, weight_class_stride,
        zero, SCORES, BLOCK, BLOCK_C,
    )  # fmt: skip
    if anchor_weight_ptr is not None:
        anchor_weight_ptr += image * n + block
        stored = block + lane < n
        if SCORES and foreground_ptr is not None:
            stored = stored & (bits >> lane.to(tl.uint32) & 1 == 0)
        tl.store(anchor_weight_ptr + lane, weights, mask=stored)
    iou_loss = zero
    dfl_loss = zero
    count = zero
    while bits != 0:
        within, found, bits = take_anchors(bits, lane, BLOCK)
        anchor = block + within
        point, edge = edges_at(anchor_points_ptr, target_boxes_ptr, anchor, side, n, found)
        side_ptr = logits_ptr + (image * batch_stride + anchor * anchor_stride + side * side_stride)
        z = ()
        if UNROLL:  # before anything is waited for
            z = read_bins(side_ptr, bin_stride, found, K, CHUNK)
        if SCORES and foreground_ptr is not None:
            weight = scores_at(
                weight_ptr + anchor * weight_anchor_stride, lane, found, classes,
                weight_class_stride, zero, BLOCK, BLOCK_C,
            )  # fmt: skip
            if anchor_weight_ptr is not None:
                tl.store(anchor_weight_ptr + within, weight, mask=found & (side == 0))
        else:
            weight = tl.gather(weights, within, 0)
        t, left, right_weight = place_target((edge - point) * sign, project_ptr, K, MARGIN, PROJECT)
        if UNROLL:
            dfl, position = forward(
                z, t, left, right_weight, project_ptr, K, True, True, PROJECT
            )  # fmt: skip
        else:
            dfl, position = forward_at(
                side_ptr, bin_stride, found, t, left, right_weight, project_ptr,
                K, True, True, PROJECT, False, CHUNK,
            )  # fmt: skip
        ax1, ay1, ax2, ay2 = box_of(point + position * sign, lane)
        bx1, by1, bx2, by2 = box_of(edge, lane)
        iou = paired_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND)
        active = found & (weight != 0)
        first = active & (side == 0)
        iou_loss += tl.where(first, weight * (1.0 - iou), 0.0)
        dfl_loss += tl.where(active, weight * (dfl * 0.25), 0.0)
        count += tl.where(first, 1.0, 0.0)
    partials_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr, tl.sum(iou_loss, 0))
    tl.store(partials_ptr + programs, tl.sum(dfl_loss, 0))
    tl.store(partials_ptr + 2 * programs, tl.sum(count, 0))


@triton.jit
def boxloss_sums_kernel(
    partials_ptr, normalizer_ptr, iou_loss_ptr, dfl_loss_ptr, programs, BLOCK: tl.constexpr
):  # fmt: skip
    """Both losses, from the sums of all programs; 0 without anchors, whatever the normalizer."""
    lane = tl.arange(0, BLOCK)
    iou = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    dfl = iou
    count = iou
    normalizer = tl.load(normalizer_ptr)
    for first in range(0, programs, BLOCK):
        live = first + lane < programs
        part_ptr = partials_ptr + first + lane
        iou_part = tl.load(part_ptr, mask=live, other=0.0)
        dfl_part = tl.load(part_ptr + programs, mask=live, other=0.0)
        count_part = tl.load(part_ptr + 2 * programs, mask=live, other=0.0)
        iou += iou_part
        dfl += dfl_part
        count += count_part
    found = tl.sum(count, 0) > 0
    tl.store(iou_loss_ptr, tl.where(found, tl.sum(iou, 0) / normalizer, 0.0))
    tl.store(dfl_loss_ptr, tl.where(found, tl.sum(dfl, 0) / normalizer, 0.0))


@triton.jit
def _zero_bins(grad_ptr, bin_stride, mask, K: tl.constexpr, UNROLL: tl.constexpr):
    zero = tl.zeros(mask.shape, grad_ptr.dtype.element_ty)
    if UNROLL:
        for _ in tl.static_range(K):
            tl.store(grad_ptr, zero, mask=mask)
            grad_ptr += bin_stride
    else:
        for _ in range(K):
            tl.store(grad_ptr, zero, mask=mask)
            grad_ptr += bin_stride


@triton.jit
def _write_zeros(
    grad_logits_ptr, block, n, bits, batch_stride, anchor_stride, side_stride, bin_stride,
    K: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store gradients of 0 for the anchors whose bit is not set.

    PACKED: the gradients of neighbouring anchors are contiguous, and lanes write granules of four
    elements side by side. A granule never holds elements of two anchors.
    """
    grad_logits_ptr += tl.multiple_of(tl.program_id(1).to(tl.int64) * batch_stride, 4)
    if PACKED:
        row: tl.constexpr = 4 * K
        grad_logits_ptr += block * row
        end = tl.minimum(n - block, BLOCK) * row
        zeros = tl.zeros((4 * BLOCK,), grad_logits_ptr.dtype.element_ty)
        for first in range(0, row * BLOCK, 4 * BLOCK):
            element = first + tl.arange(0, 4 * BLOCK)
            idle = bits >> (element // row).to(tl.uint32) & 1 == 0
            tl.store(grad_logits_ptr + element, zeros, mask=idle & (element < end))
    else:
        lane = tl.arange(0, BLOCK)
        idle = (bits >> lane.to(tl.uint32) & 1 == 0) & (block + lane < n)
        side_ptr = grad_logits_ptr + (block + lane) * anchor_stride
        for _ in tl.static_range(4):
            _zero_bins(side_ptr, bin_stride, idle, K, UNROLL)
            side_ptr += side_stride


@triton.jit
def _by_position(position, point, edge, sign, lane, side, KIND: tl.constexpr):
    """The gradient of each anchor's IoU by the expected position of a lane's side."""
    ax1, ay1, ax2, ay2 = box_of(point + position * sign, lane)
    bx1, by1, bx2, by2 = box_of(edge, lane)
    x1, y1, x2, y2 = paired_iou_gradient(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND)
    return sign * tl.where(side < 2, tl.where(side == 0, x1, y1), tl.where(side == 2, x2, y2))


@triton.jit
def boxloss_backward_kernel(
    logits_ptr, anchor_points_ptr, target_boxes_ptr, weight_ptr, foreground_ptr, project_ptr,
    normalizer_ptr, grad_iou_ptr, grad_dfl_ptr, grad_logits_ptr,
    n, batch_stride, anchor_stride, side_stride, bin_stride,
    batch_grad_stride, anchor_grad_stride, side_grad_stride, grad_bin_stride,
    weight_batch_stride, weight_anchor_stride, weight_class_stride, classes,
    K: tl.constexpr, MARGIN: tl.constexpr, PROJECT: tl.constexpr, KIND: tl.constexpr,
    SCORES: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits: what both losses say of anchors with a weight, 0 elsewhere."""
    image = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    side = lane % 4
    sign = tl.where(side < 2, -1.0, 1.0)
    zero = tl.zeros((BLOCK,), normalizer_ptr.dtype.element_ty)
    weight_ptr += image * weight_batch_stride
    bits, weights = find_anchors(
        foreground_ptr, weight_ptr, block, n, classes, weight_anchor_stride, weight_class_stride,
        zero, SCORES, BLOCK, BLOCK_C,
    )  # fmt: skip
    _write_zeros(
        grad_logits_ptr, block, n, bits,
        batch_grad_stride, anchor_grad_stride, side_grad_stride, grad_bin_stride,
        K, UNROLL, PACKED, BLOCK,
    )  # fmt: skip
    if bits != 0:
        normalizer = tl.load(normalizer_ptr)
        grad_iou = tl.load(grad_iou_ptr)
        grad_dfl = tl.load(grad_dfl_ptr)
        while bits != 0:
            within, found, bits = take_anchors(bits, lane, BLOCK)
            anchor = block + within
            point, edge = edges_at(anchor_points_ptr, target_boxes_ptr, anchor, side, n, found)
            side_ptr = logits_ptr + (
                image * batch_stride + anchor * anchor_stride + side * side_stride
            )
            grad_ptr = grad_logits_ptr + (
                image * batch_grad_stride + anchor * anchor_grad_stride + side * side_grad_stride
            )
            z = ()
            if UNROLL:  # before anything is waited for
                z = read_bins(side_ptr, bin_stride, found, K, CHUNK)
            if SCORES and foreground_ptr is not None:
                weight = scores_at(
                    weight_ptr + anchor * weight_anchor_stride, lane, found, classes,
                    weight_class_stride, zero, BLOCK, BLOCK_C,
                )  # fmt: skip
            else:
                weight = tl.gather(weights, within, 0)
            scale = weight / normalizer
            to_iou = -grad_iou * scale
            to_dfl = grad_dfl * scale * 0.25
            t, left, right_weight = place_target(
                (edge - point) * sign, project_ptr, K, MARGIN, PROJECT
            )
            active = found & (weight != 0)
            if UNROLL:
                e, s, moment = exponentials(z, project_ptr, K, True, PROJECT)
                by_position = _by_position(moment / s, point, edge, sign, lane, side, KIND)
                all_bins = gradients(
                    e, s, moment, t, left, right_weight, to_dfl, to_iou * by_position, project_ptr,
                    K, True, True, PROJECT,
                )  # fmt: skip
                gradient = ()
                for k in tl.static_range(K):
                    gradient += (tl.where(active, all_bins[k], 0.0),)
                write_bins(grad_ptr, grad_bin_stride, gradient, found, K, CHUNK)
            else:
                _zero_bins(grad_ptr, grad_bin_stride, found & (weight == 0), K, UNROLL)
                _, position = forward_at(
                    side_ptr, bin_stride, found, t, left, right_weight, project_ptr,
                    K, False, True, PROJECT, False, CHUNK,
                )  # fmt: skip
                by_position = _by_position(position, point, edge, sign, lane, side, KIND)
                backward_at(
                    side_ptr, bin_stride, grad_ptr, grad_bin_stride, active,
                    t, left, right_weight, to_dfl, to_iou * by_position, project_ptr,
                    K, True, True, PROJECT, False, CHUNK,
                )  # fmt: skip
