"""Cases of task_aligned_assign: crowds, tiny objects, doubles, borders, bad numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import assign_model
from .making import Case, Maker, Whole
from .tensors import exact, lay_out, numbers

SHARED = ("expanded", "overlapping")  # layouts whose elements share memory


def _cells(make: Maker) -> int:
    """Of 8 pixels on each side of an image; in a small one every object meets every other."""
    return int(make.rng("image").choice([20, 5]))


def task_aligned_assign(make: Maker) -> Case:
    spec, rng = make.spec, make.rng("assign")
    batch, anchors = spec.shape
    classes, rows = spec.classes or 1, spec.dim == 2
    logits = make.logits((batch, anchors, classes) if rows else (batch, classes, anchors))
    points, stride = _points(make), _stride(make)
    cells = exact(stride).reshape(-1) if isinstance(stride, Tensor) else np.full(anchors, stride)
    pixels = exact(points).astype(make.arithmetic) * cells.astype(make.arithmetic)[:, None]
    gt_boxes = _objects(make)
    labels = _indices(make, "labels", classes)
    images = _indices(make, "images", batch)
    boxes = _predictions(make, pixels, exact(gt_boxes))
    by_anchor = exact(boxes) if rows else exact(boxes).transpose(0, 2, 1)
    options = assign_model.Options(
        spec.topk, spec.topk2 or spec.topk, *spec.powers, spec.iou, spec.min_side, spec.conflicts,
        float(rng.choice([1e-9, 1e-9, 0.0, 0.5])),
    )  # fmt: skip
    found = assign_model.assign(
        exact(logits) if rows else exact(logits).transpose(0, 2, 1),
        by_anchor.astype(make.arithmetic), pixels, exact(gt_boxes), labels.numpy(),
        images.numpy(), options, make.precision, make.arithmetic,
    )  # fmt: skip
    arguments = {
        "boxes": boxes, "anchor_points": points, "stride": stride, "gt_boxes": gt_boxes,
        "gt_labels": labels, "gt_image": images, "dim": -1 if rows else 1, "topk": spec.topk,
        "topk2": spec.topk2, "alpha": options.alpha, "beta": options.beta, "iou": spec.iou,
        "min_side": spec.min_side, "conflicts": spec.conflicts, "eps": options.eps,
    }  # fmt: skip
    results = [Whole(found.matched, torch.int32, found.known), found.score, found.total]
    return Case(spec.op, arguments, ("class_logits", logits), results)


def _points(make: Maker) -> Tensor:
    kind, cells = make.spec.places, _cells(make)

    def fill(rng: np.random.Generator, size: int) -> np.ndarray:
        if kind in ("special", "large"):
            return numbers(rng, size, "special" if kind == "special" else "wide", 10.0)
        if kind == "integers":  # anchor points on the sides of objects
            return rng.integers(0, cells, size).astype(float)
        return rng.integers(0, cells, size) + 0.5

    return make.other("points", (make.spec.shape[1], 2), fill)


def _stride(make: Maker) -> Tensor | float:
    if make.spec.stride is None:
        return 8.0
    anchors = make.spec.shape[1]
    shape = (anchors,) if make.spec.stride == "(A,)" else (anchors, 1)
    return make.other("stride", shape, lambda rng, size: rng.choice([8.0, 8.0, 16.0], size))


def _objects(make: Maker) -> Tensor:
    """Boxes of objects, some of them twice, some tiny, some beyond the border."""
    spec = make.spec
    kind = spec.places
    rng = make.rng("objects")

    def any_numbers(rng: np.random.Generator, size: int) -> np.ndarray:
        return numbers(rng, size, "special" if kind == "special" else "wide", 100.0)

    boxes = make.other("objects", (spec.objects, 4), any_numbers)
    if spec.other_layout in SHARED or (kind in ("special", "large") and rng.random() < 0.5):
        return boxes
    size = rng.choice([3.0, 12.0, 40.0, 120.0], (spec.objects, 1)) * rng.uniform(
        0.5, 1.5, (spec.objects, 2)
    )
    centre = rng.uniform(-0.1, 1.1, (spec.objects, 2)) * 8 * _cells(make)
    if kind == "integers":
        size, centre = np.round(size / 8) * 8, np.round(centre / 8) * 8
    values = np.concatenate((centre - size / 2, centre + size / 2), 1)
    for n in range(1, spec.objects):
        if rng.random() < 0.2:
            values[n] = values[rng.integers(n)]
    if kind == "special" and spec.objects:
        at = rng.integers(spec.objects)
        values[at, rng.integers(4)] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0])
    boxes.copy_(torch.from_numpy(values))
    return boxes


def _predictions(make: Maker, pixels: np.ndarray, objects: np.ndarray) -> Tensor:
    """Boxes near the anchor points, or near some object, some of them twice."""
    spec, rng = make.spec, make.rng("predictions")
    batch, anchors = spec.shape
    rows = spec.dim == 2
    shape = (batch, anchors, 4) if rows else (batch, 4, anchors)

    def any_numbers(rng: np.random.Generator, size: int) -> np.ndarray:
        kind = {"special": "special", "large": "wide"}.get(spec.places, "normal")
        return numbers(rng, size, kind, 60.0)

    layout = make.spec.other_layout
    dtype = make.compute if rng.random() < 0.7 else None
    boxes = make.other("boxes", shape, any_numbers, dtype)
    if layout in SHARED or spec.places == "large":
        return boxes
    reach = rng.uniform(2, 40, (batch, anchors, 4)) * np.array([-1, -1, 1, 1])
    values = np.tile(pixels, 2)[None] + reach
    if len(objects):
        near = rng.random((batch, anchors)) < 0.6
        jitter = rng.normal(size=(batch, anchors, 4)) * rng.choice([0.0, 1.0, 5.0])
        values[near] = (objects[rng.integers(0, len(objects), (batch, anchors))] + jitter)[near]
    if spec.places == "special":
        bad = rng.random(values.shape) < 0.05
        values[bad] = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], int(bad.sum()))
    (boxes if rows else boxes.mT).copy_(torch.from_numpy(values))
    return boxes


def _indices(make: Maker, name: str, size: int) -> Tensor:
    """Labels or images, from 0 to size − 1, and in some cases beyond that."""
    rng = make.rng(name)
    wild = [-1, -(2**31), 2**31 - 1, size, size + 1]
    dtype = torch.int32 if rng.random() < 0.5 else torch.int64
    if dtype == torch.int64:
        wild += [2**32, -(2**63), 2**63 - 1]
    chance = rng.choice([0.0, 0.0, 0.3]) if size else 1.0

    def fill(count: int) -> np.ndarray:
        good = rng.integers(0, max(size, 1), count)
        bad = np.asarray([wild[i] for i in rng.integers(0, len(wild), count)], dtype=np.int64)
        return np.where(rng.random(count) < chance, bad, good)

    layout = make.spec.other_layout
    if layout in ("padded", "stepped", "offset"):  # what lies between integers cannot be NaN
        return torch.from_numpy(fill(2 * make.spec.objects + 1)).to(dtype)[1::2]
    return lay_out(rng, fill, (make.spec.objects,), dtype, layout)
