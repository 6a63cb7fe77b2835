"""How a warp finds the anchors to compute among its own, and divides them among its lanes.

A warp owns BLOCK neighbouring anchors, as many as NVIDIA's warps have lanes. It reads their mask
or weights with one coalesced load, and packs the anchors to compute into the bits of a number. Then
it takes BLOCK / 4 of them at a time: four neighbouring lanes share an anchor, one side each. So a
lone anchor costs one pass over one side, and class scores are read only where they count.
"""

import triton
import triton.language as tl


@triton.jit
def scores_at(
    weight_ptr, lane, mask, classes, class_stride, zero, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The sums of class scores of the anchors of which four neighbouring lanes each hold one.

    Each lane sums four scores of every sixteen, and the lanes of an anchor exchange their sums.
    """
    sums = tl.zeros((BLOCK, 4), zero.dtype)
    score = (lane % 4 * 4)[:, None] + tl.arange(0, 4)[None, :]
    for first in range(0, classes, BLOCK_C):
        tiles = ()
        for c in tl.static_range(0, BLOCK_C, 16):
            at = first + c + score
            score_ptr = weight_ptr[:, None] + at.to(tl.int64) * class_stride
            tiles += (tl.load(score_ptr, mask=mask[:, None] & (at < classes), other=0.0),)
        for i in tl.static_range(BLOCK_C // 16):
            sums += tiles[i].to(zero.dtype)
    total = tl.sum(sums, 1)
    total += tl.gather(total, lane ^ 1, 0)
    return total + tl.gather(total, lane ^ 2, 0)


@triton.jit
def find_anchors(
    foreground_ptr, weight_ptr, block, n, classes, anchor_stride, class_stride,
    zero, SCORES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which of a block's anchors are to be computed, as bits, and the weights of all.

    Class scores under a mask are left for later: the anchors are those of the mask.
    """
    lane = tl.arange(0, BLOCK)
    flags = block + lane < n
    weights = zero
    if foreground_ptr is not None:
        image = tl.program_id(1).to(tl.int64)
        flags = tl.load(foreground_ptr + (image * n + block) + lane, mask=flags, other=0) != 0
    if SCORES:
        if foreground_ptr is None:
            quarter: tl.constexpr = BLOCK // 4
            for part in tl.static_range(4):
                anchor = block + part * quarter + lane // 4
                total = scores_at(
                    weight_ptr + anchor * anchor_stride, lane, anchor < n, classes, class_stride,
                    zero, BLOCK, BLOCK_C,
                )  # fmt: skip
                own = tl.gather(total, lane % quarter * 4, 0)
                weights = tl.where(lane // quarter == part, own, weights)
            flags = weights != 0
    else:
        anchor = block + lane
        weights = tl.load(weight_ptr + anchor * anchor_stride, mask=flags, other=0.0)
        weights = weights.to(zero.dtype)
        flags = weights != 0
    bit = tl.full((BLOCK,), 1, tl.uint32) << lane.to(tl.uint32)
    return tl.sum(tl.where(flags, bit, tl.zeros_like(bit)), 0), weights


@triton.jit
def take_anchors(bits, lane, BLOCK: tl.constexpr):
    """For each four lanes an anchor from the lowest bits, and whether there is one; other bits."""
    own = tl.zeros((BLOCK,), tl.uint32) + bits
    for i in tl.static_range(BLOCK // 4 - 1):
        own = tl.where(lane // 4 > i, own & (own - 1), own)
    for _ in tl.static_range(BLOCK // 4):
        bits = bits & (bits - 1)
    lowest = own & (0 - own)
    # A power of two is exact as a float, whose exponent is its number
    number = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    found = own != 0
    return tl.where(found, number, 0), found, bits


@triton.jit
def edges_at(anchor_points_ptr, target_boxes_ptr, anchor, side, n, found):
    """The anchor point's coordinate and the wanted box's edge on each lane's side."""
    box = (tl.program_id(1).to(tl.int64) * n + anchor) * 4
    point = tl.load(anchor_points_ptr + 2 * anchor + side % 2, mask=found, other=0.0)
    return point, tl.load(target_boxes_ptr + box + side, mask=found, other=0.0)


@triton.jit
def box_of(edge, lane):
    """All four edges of the box of which a lane holds one."""
    first = lane & -4
    return (
        tl.gather(edge, first, 0),
        tl.gather(edge, first + 1, 0),
        tl.gather(edge, first + 2, 0),
        tl.gather(edge, first + 3, 0),
    )
