"""What task_aligned_assign computes, in NumPy, object by object, from its definition.

An assignment is a chain of decisions. Every overlap and metric is an interval that holds what any
correct arithmetic may find; where two intervals overlap, rounding decides, and the whole image is
left open. Values computed from the same numbers are equal in any arithmetic, so that ties are
decided.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import box_model
from .bounds import Bounded


class Options(NamedTuple):
    topk: int
    topk2: int
    alpha: float
    beta: float
    iou: str
    min_side: float
    conflicts: str
    eps: float


class Range(NamedTuple):
    """Intervals that hold a value, and a key that is the same where the value must be."""

    low: np.ndarray
    high: np.ndarray
    key: np.ndarray

    def __getitem__(self, index):
        return Range(self.low[index], self.high[index], self.key[index])


class Undecided(Exception):  # noqa: N818  (no error: rounding decides)
    """Rounding decides."""


class Assigned(NamedTuple):
    matched: np.ndarray  # (B, A)
    known: np.ndarray  # (B, A), whether an anchor is decided
    score: Bounded  # (B, A)
    total: Bounded


def assign(logits, boxes, points, gt_boxes, labels, images, options, precision, arithmetic):
    """For logits (B, A, C), boxes (B, A, 4) and points (A, 2), which are in pixels."""
    batch, anchors, classes = logits.shape
    matched = np.full((batch, anchors), -1)
    known = np.ones((batch, anchors), bool)
    value, bound = np.zeros((batch, anchors)), np.zeros((batch, anchors))
    gt_boxes = gt_boxes.astype(arithmetic)
    for image in range(batch):
        objects = [
            n
            for n in range(len(gt_boxes))
            if images[n] == image and 0 <= labels[n] < classes and is_valid(gt_boxes[n])
        ]
        pairs = [
            pair(logits[image, :, labels[n]], boxes[image], gt_boxes[n], options, precision)
            for n in objects
        ]
        inside = [contains(gt_boxes[n], points, options, arithmetic) for n in objects]
        try:
            final = decide(pairs, inside, gt_boxes[objects], options)
        except Undecided:
            known[image], bound[image] = False, np.inf
            continue
        for n, (overlap, metric), chosen in zip(objects, pairs, final, strict=True):
            if chosen:
                matched[image, chosen] = n
                low, high = scores(overlap[chosen], metric[chosen], options, precision)
                value[image, chosen] = (low + high) / 2
                bound[image, chosen] = (high - low) / 2
    score = Bounded(value, precision, bound)
    return Assigned(matched, known, score, score.sum())


def is_valid(box):
    x1, y1, x2, y2 = box
    return bool(np.isfinite(box).all() and x1 < x2 and y1 < y2 and x1 + y1 + x2 + y2 > 0)


def contains(box, points, options, arithmetic):
    """Whether each point is inside, in the type of the arithmetic, which is exact to the bit."""
    found = np.ones(len(points), bool)
    least, eps = arithmetic(options.min_side), arithmetic(options.eps)
    for axis in range(2):
        first, second = box[axis], box[axis + 2]
        if least > 0:
            centre, half = (first + second) / arithmetic(2), max(second - first, least)
            first, second = centre - half / arithmetic(2), centre + half / arithmetic(2)
        found &= (points[:, axis] - first > eps) & (second - points[:, axis] > eps)
    return found


def pair(logits, boxes, box, options, precision):
    """(overlap, metric) of one object with each anchor."""
    found = [Bounded(boxes[:, i], precision) for i in range(4)]
    iou, _ = box_model.iou([Bounded(side, precision) for side in box], found, options.iou)
    nan = np.isnan(iou.value) & np.isfinite(iou.bound)
    open_ = ~np.isfinite(iou.bound)
    reach = 4 * iou.bound
    low = np.where(nan | open_, 0.0, np.clip(iou.value - reach, 0, 1))
    high = np.where(nan, 0.0, np.where(open_, 1.0, np.clip(iou.value + reach, 0, 1)))
    apart = np.zeros(len(boxes), bool)
    for axis in range(2):
        apart |= np.minimum(box[axis + 2], boxes[:, axis + 2]) <= np.maximum(
            box[axis], boxes[:, axis]
        )
    if options.iou != "giou":  # which a box with its corners swapped makes positive
        low, high = np.where(apart, 0, low), np.where(apart, 0, high)
    overlap = Range(low, high, _keys(box, boxes))

    unit, least = precision.unit, 8 * precision.smallest
    sigmoid = np.where(logits < 0, np.exp(np.minimum(logits, 0)), 1) / (1 + np.exp(-abs(logits)))
    sigmoid = np.where(sigmoid < precision.smallest / 4, 0, sigmoid)
    spread = np.where((sigmoid == 1) | (sigmoid == 0), 0, 16 * unit * sigmoid + least)
    lowest = np.maximum(sigmoid - spread, 0) ** options.alpha * low**options.beta
    highest = np.minimum(sigmoid + spread, 1) ** options.alpha * high**options.beta
    lowest = np.maximum(lowest * (1 - 32 * unit) - least, 0)
    highest = np.where(highest < precision.smallest / 4, 0, highest * (1 + 32 * unit) + least)
    nan = np.isnan(lowest) | np.isnan(highest)
    lowest, highest = np.where(nan, 0, lowest), np.where(nan, 0, highest)
    return overlap, Range(lowest, highest, _keys(box, boxes, logits))


def _keys(box, *values):
    """A text for each anchor, of the numbers that its value depends on."""
    rows = np.column_stack([np.broadcast_to(box, (len(values[0]), 4)), *values])
    return np.asarray([row.astype(np.float64).tobytes().hex() for row in rows], dtype=object)


def decide(pairs, inside, gt_boxes, options):
    """The anchors of each object, or Undecided."""
    picked = [
        largest(metric, np.flatnonzero(candidates), options.topk)
        for (_, metric), candidates in zip(pairs, inside, strict=True)
    ]
    final = [list(chosen) for chosen in picked]
    for anchor in sorted({a for chosen in picked for a in chosen}):
        claimers = [n for n, chosen in enumerate(picked) if anchor in chosen]
        if len(claimers) < 2:
            continue
        rivals = {
            "claimed": claimers,
            "inside": [n for n, candidates in enumerate(inside) if candidates[anchor]],
            "all": list(range(len(pairs))),
        }[options.conflicts]
        best = winner([(n, pairs[n][0][anchor]) for n in rivals])
        for n in claimers:
            final[n].remove(anchor)
        final[best].append(anchor)
    if options.topk2 < options.topk:
        final = [
            largest(metric, sorted(chosen), options.topk2)
            for (_, metric), chosen in zip(pairs, final, strict=True)
        ]
    return final


def largest(metric, anchors, count):
    """The anchors of the `count` largest metrics above 0, the first of equal ones."""
    anchors = np.asarray(anchors, dtype=int)
    anchors = anchors[metric.high[anchors] > 0]
    low, high, key = metric[anchors]
    equal = key[:, None] == key
    earlier = anchors[:, None] > anchors
    above = np.where(equal, earlier, low > high[:, None]).sum(1)
    maybe_above = np.where(equal, earlier, high >= low[:, None]).sum(1)
    if ((above < count) & ((maybe_above >= count) | (low == 0))).any():
        raise Undecided
    return [int(a) for a in anchors[above < count]]


def winner(rivals):
    """Of (object, overlap) in the order of the objects, the first of the largest overlap."""
    for i, (n, mine) in enumerate(rivals):
        for j, (_, other) in enumerate(rivals):
            if i == j:
                continue
            equal = mine.key == other.key or mine.low == mine.high == other.low == other.high
            if not (mine.low > other.high or (equal and i < j)):
                break
        else:
            return n
    raise Undecided


def scores(overlap, metric, options, precision):
    """Bounds on the scores of an object's anchors."""
    low = metric.low * overlap.low.max() / (metric.high.max() + options.eps)
    with np.errstate(all="ignore"):
        high = metric.high * overlap.high.max() / (metric.low.max() + options.eps)
    high = np.where(metric.high == 0, 0, np.fmin(high, overlap.high.max()))
    low = np.where(np.isnan(low), 0, low)
    room = 16 * precision.unit
    least = np.where(metric.high == 0, 0, 8 * precision.smallest)
    return np.maximum(low * (1 - room) - least, 0), high * (1 + room) + least
