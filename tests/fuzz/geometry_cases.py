"""Cases of the functions on boxes and anchor points that are plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from . import box_model
from .bounds import PRECISIONS, Bounded
from .making import Case, broadcasting
from .tensors import DTYPES, exact, lay_out, numbers

KINDS = {"normal": "normal", "integers": "normal", "background": "normal", "special": "special"}


def _tensor(make, name, shape, dtype):
    spec, rng = make.spec, make.rng(name)
    kind = KINDS.get(spec.places, "wide")

    def fill(size):
        values = numbers(rng, size, kind, 8.0)
        return np.round(values) if spec.places == "integers" else values

    return lay_out(
        rng, fill, shape, DTYPES[dtype], spec.layout if name == "a" else spec.other_layout
    )


def _setting(make, *dtypes):
    """The precision and the type of the arithmetic: fp64 if any of the inputs is."""
    wide = "float64" if "float64" in dtypes else "float32"
    return PRECISIONS[wide], np.dtype(wide).type


def _columns(values, precision, arithmetic, shape):
    values = np.broadcast_to(values.astype(arithmetic), (*shape, values.shape[-1]))
    return [Bounded(values[..., i], precision) for i in range(values.shape[-1])]


def _stacked(columns):
    return Bounded(
        np.stack([c.value for c in columns], -1), columns[0].precision,
        np.stack([c.bound for c in columns], -1),
    )  # fmt: skip


def paired_box_iou(make):
    spec = make.spec
    precision, arithmetic = _setting(make, spec.dtype, spec.other_dtype)
    a = _tensor(make, "a", (*spec.shape, 4), spec.dtype)
    b = _tensor(make, "b", (*broadcasting(make.rng("broadcast"), spec.shape), 4), spec.other_dtype)
    value, _ = box_model.iou(
        _columns(exact(a), precision, arithmetic, spec.shape),
        _columns(exact(b), precision, arithmetic, spec.shape), spec.iou,
    )  # fmt: skip
    # Its gradient is autograd's; the one that the kernels write out is checked in box_loss
    return Case("paired_box_iou", {"b": b, "kind": spec.iou}, ("a", a), [value], ordered=False)


def dist2bbox(make):
    spec = make.spec
    precision, arithmetic = _setting(make, spec.dtype, spec.other_dtype)
    a = _tensor(make, "a", (*spec.shape, 4), spec.dtype)
    points = _tensor(
        make, "points", (*broadcasting(make.rng("broadcast"), spec.shape), 2), spec.other_dtype
    )
    boxes = box_model.boxes_of(
        _columns(exact(a), precision, arithmetic, spec.shape),
        _columns(exact(points), precision, arithmetic, spec.shape), spec.box_format,
    )  # fmt: skip
    arguments = {"anchor_points": points, "box_format": spec.box_format}
    return Case("dist2bbox", arguments, ("distances", a), [_stacked(boxes)], ordered=False)


def _distances(boxes, points, highest):
    """(x − x1, y − y1, x2 − x, y2 − y), clamped unless highest is None."""
    columns = [
        points[0] - boxes[0],
        points[1] - boxes[1],
        boxes[2] - points[0],
        boxes[3] - points[1],
    ]
    of = _stacked(columns)
    if highest is None:
        return of
    return Bounded(np.clip(of.value, 0, highest), of.precision, of.bound)


def bbox2dist(make):
    spec = make.spec
    precision, arithmetic = _setting(make, spec.dtype, spec.other_dtype)
    a = _tensor(make, "a", (*spec.shape, 4), spec.dtype)
    points = _tensor(
        make, "points", (*broadcasting(make.rng("broadcast"), spec.shape), 2), spec.other_dtype
    )
    highest = None if spec.project is None else spec.bins - 1
    expected = _distances(
        _columns(exact(a), precision, arithmetic, spec.shape),
        _columns(exact(points), precision, arithmetic, spec.shape),
        None if highest is None else float(arithmetic(highest - spec.margin)),
    )
    arguments = {"anchor_points": points, "max_dist": highest, "margin": spec.margin}
    return Case("bbox2dist", arguments, ("boxes", a), [expected], ordered=False)


def dfl_targets(make):
    spec = make.spec
    precision, arithmetic = _setting(make, spec.dtype, spec.other_dtype)
    a = _tensor(make, "a", (*spec.shape, 4), spec.dtype)
    shape = spec.shape[-1:]
    points = _tensor(make, "points", (*shape, 2), spec.other_dtype)
    rng = make.rng("stride")
    stride = torch.from_numpy(rng.choice([8.0, 16.0, 32.0], shape)) if spec.stride else 8.0
    if spec.stride == "(A, 1)" and shape:
        stride = stride.unsqueeze(-1)
    cells = exact(stride).reshape(shape) if spec.stride else 8.0
    cells = np.broadcast_to(cells, spec.shape)
    expected = _distances(
        [c / cells for c in _columns(exact(a), precision, arithmetic, spec.shape)],
        _columns(exact(points), precision, arithmetic, spec.shape),
        float(arithmetic(spec.bins - 1 - spec.margin)),
    )
    arguments = {
        "anchor_points": points, "stride": stride, "num_bins": spec.bins, "margin": spec.margin,
    }  # fmt: skip
    return Case("dfl_targets", arguments, ("boxes", a), [expected], ordered=False)


def make_anchors(make):
    rng = make.rng("levels")
    sizes = [(int(h), int(w)) for h, w in rng.integers(0, 9, (int(rng.integers(0, 4)), 2))]
    strides = [float(s) for s in rng.choice([4, 8.5, 16, 32], len(sizes))]
    points = [(x + 0.5, y + 0.5) for h, w in sizes for y in range(h) for x in range(w)]
    steps = [[s] for (h, w), s in zip(sizes, strides, strict=True) for _ in range(h * w)]
    precision = PRECISIONS["float32"]
    expected = [
        Bounded(np.asarray(values).reshape(-1, columns), precision)
        for values, columns in ((points, 2), (steps, 1))
    ]
    return Case("make_anchors", {"strides": strides}, ("sizes", sizes), expected)
