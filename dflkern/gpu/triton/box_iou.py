"""The IoU of paired boxes in its four kinds, and its gradient by the first box, on lanes.

The formulas of `dflkern.iou`. A maximum is a select, as `tl.maximum` swallows NaN on a GPU; a NaN
comes through the areas.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-7)
HALF_PI = tl.constexpr(1.5707963267948966)
FOUR_BY_PI_SQUARED = tl.constexpr(0.40528473456935109)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def _above(a, b):
    """The derivative of max(a, b) by a: 1 where a is the larger, half at a tie."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def arctangent(x):
    """atan(x): a minimax polynomial in fp32; in fp64 a series, after halving the angle thrice."""
    size = tl.abs(x)
    large = size > 1
    u = tl.where(large, 1.0 / size, size)
    if x.dtype == tl.float64:
        for _ in tl.static_range(3):
            u = u / (tl.sqrt(tl.fma(u, u, 1.0)) + 1.0)
        square = u * u
        core = square * 0 + 1.0 / 21
        for i in tl.static_range(10):
            core = 1.0 / (19 - 2 * i) - square * core
        small = 8.0 * (u * core)
    else:
        square = u * u
        core = square * 0 + 0.002919393125921488
        core = tl.fma(core, square, -0.016363102942705154)
        core = tl.fma(core, square, 0.04320463538169861)
        core = tl.fma(core, square, -0.07551655918359756)
        core = tl.fma(core, square, 0.10665768384933472)
        core = tl.fma(core, square, -0.14211000992225647)
        core = tl.fma(core, square, 0.19993767142295837)
        core = tl.fma(core, square, -0.33333152532577515)
        small = tl.fma(square * u, core, u)
    result = tl.where(large, -small + HALF_PI, small)
    return tl.where(x < 0, -result, result)


@triton.jit
def _measure(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Overlap, union, IoU, and width and height of the overlap and of the enclosing box."""
    overlap_w = _larger(_smaller(ax2, bx2) - _larger(ax1, bx1), 0.0)
    overlap_h = _larger(_smaller(ay2, by2) - _larger(ay1, by1), 0.0)
    overlap = overlap_w * overlap_h
    area = (ax2 - ax1) * (ay2 - ay1 + EPS)
    other = (bx2 - bx1) * (by2 - by1 + EPS)
    union = area + other - overlap + EPS
    enclosing_w = _larger(ax2, bx2) - _smaller(ax1, bx1)
    enclosing_h = _larger(ay2, by2) - _smaller(ay1, by1)
    return overlap_w, overlap_h, union, overlap / union, enclosing_w, enclosing_h


@triton.jit
def _aspect(aw, ah, bw, bh, iou):
    """CIoU's v, its α, a constant in backward, and the difference of the two angles."""
    angle = arctangent(bw / bh) - arctangent(aw / ah)
    v = angle * angle * FOUR_BY_PI_SQUARED
    return v, v / (v - iou + (1.0 + 1e-7)), angle


@triton.jit
def paired_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr):
    """IoU of the boxes a and b of each lane, in one of its four kinds."""
    _, _, union, iou, enclosing_w, enclosing_h = _measure(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    result = iou
    if KIND == "giou":
        enclosing = enclosing_w * enclosing_h + EPS
        result -= (enclosing - union) / enclosing
    if KIND == "diou" or KIND == "ciou":
        apart_x = bx1 + bx2 - ax1 - ax2
        apart_y = by1 + by2 - ay1 - ay2
        square = enclosing_w * enclosing_w + enclosing_h * enclosing_h + EPS
        result -= (apart_x * apart_x + apart_y * apart_y) * 0.25 / square
    if KIND == "ciou":
        v, alpha, _ = _aspect(ax2 - ax1, ay2 - ay1 + EPS, bx2 - bx1, by2 - by1 + EPS, iou)
        result -= alpha * v
    return result


@triton.jit
def paired_iou_gradient(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr):
    """The gradient of `paired_iou` by the four numbers of a."""
    overlap_w, overlap_h, union, iou, enclosing_w, enclosing_h = _measure(
        ax1, ay1, ax2, ay2, bx1, by1, bx2, by2
    )
    aw = ax2 - ax1
    ah = ay2 - ay1 + EPS
    tall = tl.where(overlap_w > 0, overlap_h, 0.0)
    wide = tl.where(overlap_h > 0, overlap_w, 0.0)
    overlap_x1 = -tall * _above(ax1, bx1)
    overlap_y1 = -wide * _above(ay1, by1)
    overlap_x2 = tall * _above(bx2, ax2)
    overlap_y2 = wide * _above(by2, ay2)
    union_x1 = -ah - overlap_x1
    union_y1 = -aw - overlap_y1
    union_x2 = ah - overlap_x2
    union_y2 = aw - overlap_y2
    g_x1 = (overlap_x1 - iou * union_x1) / union
    g_y1 = (overlap_y1 - iou * union_y1) / union
    g_x2 = (overlap_x2 - iou * union_x2) / union
    g_y2 = (overlap_y2 - iou * union_y2) / union
    # By x1 and x2 of the enclosing width, by y1 and y2 of its height
    outer_x1 = -_above(bx1, ax1)
    outer_y1 = -_above(by1, ay1)
    outer_x2 = _above(ax2, bx2)
    outer_y2 = _above(ay2, by2)
    if KIND == "giou":
        enclosing = enclosing_w * enclosing_h + EPS
        filled = union / enclosing
        g_x1 += (union_x1 - filled * (outer_x1 * enclosing_h)) / enclosing
        g_y1 += (union_y1 - filled * (outer_y1 * enclosing_w)) / enclosing
        g_x2 += (union_x2 - filled * (outer_x2 * enclosing_h)) / enclosing
        g_y2 += (union_y2 - filled * (outer_y2 * enclosing_w)) / enclosing
    if KIND == "diou" or KIND == "ciou":
        apart_x = bx1 + bx2 - ax1 - ax2
        apart_y = by1 + by2 - ay1 - ay2
        square = enclosing_w * enclosing_w + enclosing_h * enclosing_h + EPS
        share = (apart_x * apart_x + apart_y * apart_y) * 0.5 / square
        toward_x = apart_x * 0.5
        toward_y = apart_y * 0.5
        g_x1 += (toward_x + share * (enclosing_w * outer_x1)) / square
        g_y1 += (toward_y + share * (enclosing_h * outer_y1)) / square
        g_x2 += (toward_x + share * (enclosing_w * outer_x2)) / square
        g_y2 += (toward_y + share * (enclosing_h * outer_y2)) / square
    if KIND == "ciou":
        _, alpha, angle = _aspect(aw, ah, bx2 - bx1, by2 - by1 + EPS, iou)
        turn = alpha * angle * (2.0 * FOUR_BY_PI_SQUARED) / (aw * aw + ah * ah)
        g_x1 -= turn * ah
        g_y1 += turn * aw
        g_x2 += turn * ah
        g_y2 -= turn * aw
    return g_x1, g_y1, g_x2, g_y2
