"""What the functions on boxes compute, in NumPy, from their formulas; see `model`.

With I, U, C the areas of overlap, union and enclosing box, ρ the distance of the centres and c the
enclosing diagonal, and 1e-7 added to heights and denominators:

    iou = I/U    giou = iou − (C − U)/C    diou = iou − ρ²/c²    ciou = diou − α v
    v = 4/π² (atan(w_b/h_b) − atan(w_a/h_a))²     α = v / (1 − iou + v), a constant in backward
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import model
from .bounds import Bounded, above, arctan, exact_zero, maximum, minimum

EPS = 1e-7


def iou(a, b, kind):
    """The IoU of paired boxes, and its gradient by x1, y1, x2, y2 of a; each box is a list of 4."""
    precision = a[0].precision
    eps = Bounded(EPS, precision, np.asarray(EPS * precision.unit))
    aw, ah = a[2] - a[0], a[3] - a[1] + eps
    bw, bh = b[2] - b[0], b[3] - b[1] + eps
    ow = maximum(minimum(a[2], b[2]) - maximum(a[0], b[0]), 0.0)
    oh = maximum(minimum(a[3], b[3]) - maximum(a[1], b[1]), 0.0)
    overlap = ow * oh
    union = aw * ah + bw * bh - overlap + eps
    value = overlap / union

    wide, tall = oh * above(ow, 0.0), ow * above(oh, 0.0)
    d_overlap = [
        -(wide * above(a[0], b[0])), -(tall * above(a[1], b[1])),
        wide * above(b[2], a[2]), tall * above(b[3], a[3]),
    ]  # fmt: skip
    d_area = [-ah, -aw, ah, aw]
    d_union = [d_area[i] - d_overlap[i] for i in range(4)]
    gradient = [(d_overlap[i] - value * d_union[i]) / union for i in range(4)]
    if kind == "iou":
        return value, gradient

    ew = maximum(a[2], b[2]) - minimum(a[0], b[0])
    eh = maximum(a[3], b[3]) - minimum(a[1], b[1])
    d_enclosing = [-above(b[0], a[0]), -above(b[1], a[1]), above(a[2], b[2]), above(a[3], b[3])]
    if kind == "giou":
        enclosing = ew * eh + eps
        other = [eh, ew, eh, ew]
        filled = union / enclosing
        value = value - (enclosing - union) / enclosing
        return value, [
            gradient[i] + (d_union[i] - filled * (d_enclosing[i] * other[i])) / enclosing
            for i in range(4)
        ]

    diagonal = ew * ew + eh * eh + eps
    dx, dy = b[0] + b[2] - a[0] - a[2], b[1] + b[3] - a[1] - a[3]
    share = (dx * dx + dy * dy) * 0.25 / diagonal
    diou = value - share
    along, extent = [dx, dy, dx, dy], [ew, eh, ew, eh]
    gradient = [
        gradient[i] + (along[i] * 0.5 + share * (extent[i] * d_enclosing[i]) * 2.0) / diagonal
        for i in range(4)
    ]
    if kind == "diou":
        return diou, gradient

    angle = arctan(bw / bh) - arctan(aw / ah)
    v = angle * angle * (4 / np.pi**2)
    alpha = v / (v - value + (1 + EPS))
    turn = alpha * angle * (8 / np.pi**2) / (aw * aw + ah * ah)
    by_w, by_h = turn * ah, -(turn * aw)
    signs = [-by_w, -by_h, by_w, by_h]
    return diou - alpha * v, [gradient[i] + signs[i] for i in range(4)]


def boxes_of(distances, points, box_format):
    """Four numbers of each box, from its four distances and the anchor point's two numbers."""
    x1, y1 = points[0] - distances[0], points[1] - distances[1]
    x2, y2 = points[0] + distances[2], points[1] + distances[3]
    if box_format == "xyxy":
        return [x1, y1, x2, y2]
    return [(x1 + x2) / 2.0, (y1 + y2) / 2.0, x2 - x1, y2 - y1]


def distance_gradients(by_box, box_format):
    """The gradient by the distances, from that by the numbers of the box."""
    if box_format == "xyxy":
        return [-by_box[0], -by_box[1], by_box[2], by_box[3]]
    half = [by_box[i] / 2.0 for i in range(2)]
    return [
        by_box[2] - half[0], by_box[3] - half[1], by_box[2] + half[0], by_box[3] + half[1],
    ]  # fmt: skip


class Loss(NamedTuple):
    iou: Bounded
    dfl: Bounded
    gradient: Bounded | None  # (B, A, 4, K)


def box_loss(
    logits, points, boxes, weight, normalizer, mask, project, margin, kind, upstream, precision,
    arithmetic,
):  # fmt: skip
    """Losses and gradient for logits (B, A, 4, K), weights (B, A) and upstream (iou, dfl).

    An anchor counts where the mask is set and its weight, `Bounded`, is not 0; no other is looked
    at.
    """
    bins = logits.shape[-1]
    active = np.nonzero(mask & (weight.value != 0))
    count = active[0].size
    zero = exact_zero((), precision)
    if count == 0:
        return Loss(zero, zero, exact_zero(logits.shape, precision))
    w = model.positions(project, bins, arithmetic)
    of = model.distributions(logits[active].reshape(-1, bins), precision)
    distance = model.expected(of, w).reshape(count, 4)
    points, boxes = points[active[1]].astype(arithmetic), boxes[active].astype(arithmetic)
    target = np.stack(
        (
            points[:, 0] - boxes[:, 0], points[:, 1] - boxes[:, 1],
            boxes[:, 2] - points[:, 0], boxes[:, 3] - points[:, 1],
        ),
        -1,
    )  # fmt: skip
    y = model.two_bins(target.reshape(-1), project, bins, margin, arithmetic)
    found = boxes_of(
        [distance[:, i] for i in range(4)],
        [Bounded(points[:, i], precision) for i in range(2)],
        "xyxy",
    )
    overlap, by_box = iou(found, [Bounded(boxes[:, i], precision) for i in range(4)], kind)
    weight = weight[active]
    dfl = model.loss(of, y).reshape(count, 4).sum(-1) / 4.0
    losses = [(weight * each).sum() / normalizer for each in (1.0 - overlap, dfl)]

    scale_iou, scale_dfl = (_scale(weight, normalizer, g, precision) for g in upstream)
    to_side = distance_gradients([-(scale_iou * each) for each in by_box], "xyxy")
    position = _interleaved(to_side)
    by_loss = _interleaved([scale_dfl / 4.0] * 4)
    active_gradient = model.both_gradients(of, y, w, by_loss, position)
    gradient = exact_zero(logits.shape, precision)
    gradient.value[active] = active_gradient.value.reshape(count, 4, bins)
    gradient.bound[active] = active_gradient.bound.reshape(count, 4, bins)
    return Loss(*losses, gradient)


def _scale(weight, normalizer, upstream, precision):
    """upstream · weight / normalizer, in any order of its operations."""
    g = Bounded(upstream, precision)
    either = [g / normalizer * weight, weight / normalizer * g, weight * g / normalizer]
    unknown = np.any([np.isinf(each.bound) for each in either], 0)
    bound = np.max([each.bound for each in either], 0)
    return Bounded(either[0].value, precision, np.where(unknown, np.inf, bound))


def _interleaved(sides):
    """(N, 4) in one row."""
    value = np.stack([side.value for side in sides], -1).reshape(-1)
    bound = np.stack([side.bound for side in sides], -1).reshape(-1)
    return Bounded(value, sides[0].precision, bound)


def decode_boxes(logits, points, stride, project, box_format, upstream, precision, arithmetic):
    """Boxes (B, A, 4) and the gradient (B, A, 4, K) by upstream (B, A, 4)."""
    batch, anchors, _, bins = logits.shape
    w = model.positions(project, bins, arithmetic)
    of = model.distributions(logits.reshape(-1, bins), precision)
    distance = model.expected(of, w).reshape(batch, anchors, 4)
    points = points.astype(arithmetic).astype(np.float64)
    scale = np.ones(anchors) if stride is None else stride.astype(arithmetic).astype(np.float64)
    scale = Bounded(np.broadcast_to(scale, (batch, anchors)), precision)
    centre = [Bounded(np.broadcast_to(points[:, i], (batch, anchors)), precision) for i in range(2)]
    found = boxes_of([distance[..., i] for i in range(4)], centre, box_format)
    if stride is not None:
        found = [each * scale for each in found]
    by_box = [Bounded(upstream[..., i], precision) * scale for i in range(4)]
    to_side = _interleaved(distance_gradients(by_box, box_format))
    gradient = model.expected_gradient(of, w, to_side).reshape(logits.shape)
    boxes = _interleaved(found).reshape(batch, anchors, 4)
    return boxes, gradient
