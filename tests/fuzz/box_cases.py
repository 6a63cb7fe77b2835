"""Cases of decode_boxes and box_loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import box_model
from .bounds import Bounded
from .making import Case, Maker, weights
from .tensors import DTYPES, exact, lay_out, mask_of, numbers


def _head(make: Maker) -> tuple[Tensor, np.ndarray]:
    """Logits in the layout of dim, and their values as (B, A, 4, K)."""
    spec = make.spec
    batch, anchors = spec.shape
    rows = spec.dim == 3
    logits = make.logits((batch, anchors, 4, spec.bins) if rows else (batch, 4, spec.bins, anchors))
    return logits, exact(logits) if rows else exact(logits).transpose(0, 3, 1, 2)


def _points(make: Maker) -> Tensor:
    kind = make.spec.places

    def fill(rng: np.random.Generator, size: int) -> np.ndarray:
        if kind in ("special", "large"):
            return numbers(rng, size, "special" if kind == "special" else "wide", 100.0)
        return rng.integers(0, 20, size) + 0.5

    return make.other("points", (make.spec.shape[1], 2), fill)


def decode_boxes(make: Maker) -> Case:
    spec = make.spec
    batch, anchors = spec.shape
    logits, values = _head(make)
    project, positions = make.project()
    points, stride = _points(make), None
    if spec.stride is not None:
        shape = (anchors,) if spec.stride == "(A,)" else (anchors, 1)
        stride = make.other("stride", shape, lambda rng, size: rng.choice([8.0, 16.0, 0.1], size))
    arguments = {
        "anchor_points": points, "stride": stride, "dim": spec.dim - (4 if spec.dim == 3 else 0),
        "project": project, "box_format": spec.box_format,
    }  # fmt: skip
    if spec.project == "descending":
        return Case(spec.op, arguments, ("logits", logits), [], raises=ValueError)
    rows = spec.dim == 3
    upstream = make.upstream("first", (batch, anchors, 4) if rows else (batch, 4, anchors))
    by_box = exact(upstream) if rows else exact(upstream).transpose(0, 2, 1)
    boxes, gradient = box_model.decode_boxes(
        values, exact(points), None if stride is None else exact(stride).reshape(-1), positions,
        spec.box_format, by_box, make.precision, make.arithmetic,
    )  # fmt: skip
    if not rows:
        boxes, gradient = boxes.transpose(0, 2, 1), gradient.transpose(0, 2, 3, 1)
    return Case(spec.op, arguments, ("logits", logits), [boxes], [upstream], gradient)


def box_loss(make: Maker) -> Case:
    spec = make.spec
    logits, _ = _head(make)
    project, positions = make.project()
    mask = None
    if spec.mask is not None:
        mask = mask_of(make.rng("mask"), spec.shape, spec.mask, spec.other_layout)
    counted = np.ones(spec.shape, bool) if mask is None else exact(mask)
    weight, summed = _scores(make, counted)
    points, boxes = _points(make), _target_boxes(make)
    active = counted & (summed.value != 0)
    if spec.places == "background":
        _spoil(make, active, logits, points, boxes)
    normalizer = _normalizer(make, summed.value, counted)
    arguments = {
        "anchor_points": points, "target_boxes": boxes, "weight": weight, "normalizer": normalizer,
        "dim": spec.dim - (4 if spec.dim == 3 else 0), "foreground": mask, "project": project,
        "margin": spec.margin, "iou": spec.iou,
    }  # fmt: skip
    if spec.project == "descending":
        return Case(spec.op, arguments, ("logits", logits), [], raises=ValueError)
    rows = spec.dim == 3
    upstream = [make.upstream(name, ()) for name in ("first", "second")]
    n = normalizer if isinstance(normalizer, float) else exact(normalizer)
    found = box_model.box_loss(
        exact(logits) if rows else exact(logits).transpose(0, 3, 1, 2), exact(points), exact(boxes),
        summed, np.float64(make.arithmetic(n)), counted, positions, spec.margin, spec.iou,
        [exact(g) for g in upstream], make.precision, make.arithmetic,
    )  # fmt: skip
    iou, dfl, gradient = found
    if spec.project == "unsorted" and active.any():  # then there are no two bins of a target
        dfl, gradient = dfl.unknown_where(True), gradient.unknown_where(active[:, :, None, None])
    if not rows:
        gradient = gradient.transpose(0, 2, 3, 1)
    return Case(spec.op, arguments, ("logits", logits), [iou, dfl], upstream, gradient)


def _target_boxes(make: Maker) -> Tensor:
    spec = make.spec

    def fill(rng: np.random.Generator, size: int) -> np.ndarray:
        if spec.places in ("special", "large"):
            return numbers(rng, size, "special" if spec.places == "special" else "wide", 100.0)
        if spec.places == "integers":
            return rng.integers(0, 20, size).astype(float)
        corner = rng.uniform(
            0, 20, size
        )  # of x1 or y1 where the index is 0 or 1, else of the other
        return corner + np.where(np.arange(size) % 4 < 2, 0.0, rng.uniform(-1, 12, size))

    return make.other("boxes", (*spec.shape, 4), fill)


def _scores(make: Maker, counted: np.ndarray) -> tuple[Tensor, Bounded]:
    """Weights (B, A) or class scores (B, A, C), and their sum for each anchor."""
    spec = make.spec
    classes = () if spec.classes is None else (spec.classes,)
    kind = spec.weight or "ones"
    weight = make.other("weight", (*spec.shape, *classes), lambda rng, n: weights(rng, n, kind))
    if kind == "background" and spec.other_layout not in ("expanded", "overlapping"):
        weight[torch.from_numpy(~counted)] = float("nan")
    scores = Bounded(exact(weight).astype(make.arithmetic), make.precision)
    return weight, scores if spec.classes is None else scores.sum(-1)


def _spoil(make: Maker, active: np.ndarray, logits: Tensor, points: Tensor, boxes: Tensor) -> None:
    """Put NaN and infinities wherever no anchor counts, in tensors that share no memory."""
    background = torch.from_numpy(~active)
    special = float(make.rng("background").choice([np.nan, np.inf, -np.inf, 1e30]))
    if make.spec.layout not in ("expanded", "overlapping"):
        rows = logits if make.spec.dim == 3 else logits.permute(0, 3, 1, 2)
        rows[background] = special
    if make.spec.other_layout not in ("expanded", "overlapping"):
        boxes[background] = special
        points[background.all(0)] = special


def _normalizer(make: Maker, weight: np.ndarray, counted: np.ndarray) -> Tensor | float:
    kind, rng = make.spec.normalizer, make.rng("normalizer")
    total = float(np.nan_to_num(weight[counted].sum(), posinf=1.0, neginf=1.0))
    value = {
        "sum": max(abs(total), 1.0), "one": 1.0, "number": float(rng.uniform(0.1, 100)),
        "zero": 0.0, "tiny": 1e-30, "negative": -2.0, "nan": float("nan"),
    }[kind]  # fmt: skip
    if kind != "nan":
        value = min(value, 60000.0)  # within fp16
    if rng.random() < 0.5:
        return value
    dtype = DTYPES[make.spec.other_dtype]
    return lay_out(rng, lambda size: np.full(size, value), (), dtype, "offset")
