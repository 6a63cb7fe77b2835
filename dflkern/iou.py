"""The IoU of paired boxes in its four kinds, and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import IOU_KINDS, check_boxes, check_broadcast, check_choice
from .geometry import same_precision

EPS = 1e-7


def paired_box_iou(a: Tensor, b: Tensor, kind: str = "iou") -> Tensor:
    """IoU of a[i] with b[i], row by row (not all pairs), in one of its four kinds.

        iou   I / U
        giou  IoU − (C − U) / C                    C the area of the smallest enclosing box
        diou  IoU − ρ² / c²                        ρ between the centres, c the enclosing diagonal
        ciou  IoU − ρ² / c² − α v,                 v = 4/π² (atan(w_b/h_b) − atan(w_a/h_a))²,
              α = v / (1 − IoU + v), a constant in backward

    1e-7 is added to heights and denominators, so that an empty box gives 0 and no NaN.

    Args:
        a: (…, 4) boxes as xyxy, in any unit.
        b: (…, 4) boxes as xyxy in the unit of a; leading axes broadcast.
        kind: "iou", "giou", "diou" or "ciou".

    Returns:
        (…), fp64 if an input is fp64, else fp32; differentiable in both boxes.

    Raises:
        TypeError: for boxes that are no floating-point tensors.
        ValueError: for boxes without 4 numbers or an unknown kind.

    GIoU: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630. DIoU and CIoU: Zheng et al.
    2019, https://arxiv.org/abs/1911.08287.
    """
    check_boxes("paired_box_iou", "a", a)
    check_boxes("paired_box_iou", "b", b)
    check_broadcast("paired_box_iou", a=a.shape[:-1], b=b.shape[:-1])
    check_choice("paired_box_iou", "kind", kind, IOU_KINDS)
    a, b = same_precision(a, b)
    pair = _measure(a, b)
    iou = pair.overlap / pair.union
    if kind == "iou":
        return iou
    if kind == "giou":
        enclosing = pair.enclosing_w * pair.enclosing_h + EPS
        return iou - (enclosing - pair.union) / enclosing
    diou = iou - pair.apart / pair.diagonal
    if kind == "diou":
        return diou
    alpha, v, _ = _aspect(pair, iou)
    return diou - alpha * v


def paired_box_iou_gradient(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """The gradient of `paired_box_iou` by a, (…, 4), itself differentiable in a.

    Written out, since an operator's implementation runs below autograd.
    """
    pair = _measure(a, b)
    iou = pair.overlap / pair.union
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)

    # By x1, y1, x2, y2: of the overlap, of a's area, of the enclosing width and height
    touch_w, touch_h = (pair.overlap_w > 0).to(a.dtype), (pair.overlap_h > 0).to(a.dtype)
    tall, wide = pair.overlap_h * touch_w, pair.overlap_w * touch_h
    d_overlap = torch.stack(
        (
            -tall * _above(ax1, bx1), -wide * _above(ay1, by1),
            tall * _above(bx2, ax2), wide * _above(by2, ay2),
        ),
        -1,
    )  # fmt: skip
    d_area = torch.stack((-pair.ah, -pair.aw, pair.ah, pair.aw), -1)
    zero = torch.zeros_like(iou)
    d_width = torch.stack((-_above(bx1, ax1), zero, _above(ax2, bx2), zero), -1)
    d_height = torch.stack((zero, -_above(by1, ay1), zero, _above(ay2, by2)), -1)

    union = pair.union.unsqueeze(-1)
    d_union = d_area - d_overlap
    gradient = (d_overlap - iou.unsqueeze(-1) * d_union) / union
    if kind == "iou":
        return gradient
    width, height = pair.enclosing_w.unsqueeze(-1), pair.enclosing_h.unsqueeze(-1)
    if kind == "giou":
        enclosing = width * height + EPS
        d_enclosing = d_width * height + width * d_height
        return gradient + (d_union - union / enclosing * d_enclosing) / enclosing
    d_apart = torch.stack((pair.apart_x, pair.apart_y, pair.apart_x, pair.apart_y), -1) * -0.5
    diagonal = pair.diagonal.unsqueeze(-1)
    d_diagonal = 2 * (width * d_width + height * d_height)
    gradient = gradient - (d_apart - (pair.apart.unsqueeze(-1) / diagonal) * d_diagonal) / diagonal
    if kind == "diou":
        return gradient
    alpha, _, angle = _aspect(pair, iou)
    turn = alpha * (8 / math.pi**2) * angle / (pair.aw**2 + pair.ah**2)
    by_width, by_height = -turn * pair.ah, turn * pair.aw
    return gradient - torch.stack((-by_width, -by_height, by_width, by_height), -1)


class _Pair(NamedTuple):
    aw: Tensor
    ah: Tensor
    bw: Tensor
    bh: Tensor
    overlap_w: Tensor
    overlap_h: Tensor
    overlap: Tensor
    union: Tensor
    enclosing_w: Tensor
    enclosing_h: Tensor
    diagonal: Tensor
    apart_x: Tensor
    apart_y: Tensor
    apart: Tensor


def _measure(a: Tensor, b: Tensor) -> _Pair:
    """Lengths and areas of a pair; the centres lie (apart_x / 2, apart_y / 2) apart."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah = ax2 - ax1, ay2 - ay1 + EPS
    bw, bh = bx2 - bx1, by2 - by1 + EPS
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = overlap_w * overlap_h
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    apart_x, apart_y = bx1 + bx2 - ax1 - ax2, by1 + by2 - ay1 - ay2
    return _Pair(
        aw, ah, bw, bh, overlap_w, overlap_h, overlap, aw * ah + bw * bh - overlap + EPS,
        enclosing_w, enclosing_h, enclosing_w**2 + enclosing_h**2 + EPS,
        apart_x, apart_y, (apart_x**2 + apart_y**2) / 4,
    )  # fmt: skip


def _aspect(pair: _Pair, iou: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CIoU's α, a constant in backward, its v, and the difference of the two angles."""
    angle = torch.atan(pair.bw / pair.bh) - torch.atan(pair.aw / pair.ah)
    v = (4 / math.pi**2) * angle**2
    return (v / (v - iou + (1 + EPS))).detach(), v, angle


def _above(x: Tensor, y: Tensor) -> Tensor:
    """The derivative of max(x, y) by x: 1 where x is the larger, half at a tie."""
    return (torch.sign(x - y) + 1) / 2
