"""Cases of class_loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import class_model
from .bounds import Bounded
from .making import Case, Maker, weights
from .tensors import DTYPES, exact, lay_out

KINDS = ("bce", "varifocal", "quality")
INTEGERS = (torch.int32, torch.int64)
COUNTS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65, 80, 130)


def class_loss(make: Maker) -> Case:
    spec, rng = make.spec, make.rng("settings")
    batch, anchors = spec.shape
    classes = int(rng.choice(COUNTS))
    rows = spec.dim == 2
    logits = make.logits((batch, anchors, classes) if rows else (batch, classes, anchors))
    settings = class_model.Settings(
        str(rng.choice(KINDS)), float(rng.choice([0.75, 0.25, 1.0, 0.0])),
        float(rng.choice([2.0, 2.0, 1.0, 1.5, 3.0])), bool(rng.random() < 0.3),
    )  # fmt: skip
    matched, labels = _assignment(make, classes)
    score = make.other("score", spec.shape, _scores(spec.weight))
    weight = None
    if rng.random() < 0.4:
        weight = make.other("class weight", (classes,), lambda r, n: r.choice([0, 0.5, 1, 3], n))
    normalizer = _normalizer(make)
    arguments = {
        "matched": matched, "score": score, "gt_labels": labels, "normalizer": normalizer,
        "dim": spec.dim - (3 if rows or rng.random() < 0.5 else 0), "kind": settings.kind,
        "alpha": settings.alpha, "gamma": settings.gamma, "class_weight": weight,
        "detach_modulation": settings.detached,
    }  # fmt: skip
    values = exact(logits) if rows else exact(logits).transpose(0, 2, 1)
    positive, target = class_model.target_of(
        values.shape, matched.numpy(), exact(score).astype(make.arithmetic), labels.numpy()
    )
    upstream = make.upstream("first", ())
    n = normalizer if isinstance(normalizer, float) else exact(normalizer)
    loss, gradient = class_model.class_loss(
        values, positive, target, None if weight is None else exact(weight),
        np.float64(make.arithmetic(n)), settings, exact(upstream), make.precision,
    )  # fmt: skip
    if not rows:
        gradient = gradient.transpose(0, 2, 1)
    return Case(spec.op, arguments, ("class_logits", logits), [_scalar(loss)], [upstream], gradient)


def _scalar(total: Bounded) -> Bounded:
    return Bounded(np.asarray(total.value), total.precision, np.asarray(total.bound))


def _assignment(make: Maker, classes: int) -> tuple[Tensor, Tensor]:
    """Objects of anchors and labels of objects, some of them out of range."""
    rng, layout = make.rng("assignment"), make.spec.other_layout
    count = int(rng.choice([0, 1, 3, 9]))
    hostile = [-1, -(2**31), 2**31 - 1, count]

    def objects(size: int) -> np.ndarray:
        inside = rng.integers(0, max(count, 1), size)
        return np.where(rng.random(size) < 0.6, rng.choice(hostile, size), inside)

    def labels(size: int) -> np.ndarray:
        outside = rng.choice([-1, classes, 2**31 - 1, -(2**31)], size)
        return np.where(rng.random(size) < 0.2, outside, rng.integers(0, classes, size))

    dtypes = [INTEGERS[int(i)] for i in rng.integers(0, 2, 2)]
    if layout in ("padded", "stepped", "offset"):  # whose gaps hold NaN, which no integer does
        layout = "permuted"
    return (
        lay_out(rng, objects, make.spec.shape, dtypes[0], layout),
        lay_out(rng, labels, (count,), dtypes[1], "contiguous"),
    )


def _scores(kind: str | None):
    def fill(rng: np.random.Generator, size: int) -> np.ndarray:
        if kind == "special":
            return np.where(rng.random(size) < 0.1, np.nan, rng.random(size))
        if kind in ("ones", "zeros"):
            return weights(rng, size, kind)
        return rng.random(size)

    return fill


def _normalizer(make: Maker) -> Tensor | float:
    kind, rng = make.spec.normalizer, make.rng("normalizer")
    value = {"zero": 0.0, "tiny": 1e-30, "negative": -2.0, "nan": float("nan")}.get(kind, 7.5)
    if rng.random() < 0.5:
        return value
    dtype = DTYPES[make.spec.other_dtype]
    return lay_out(rng, lambda size: np.full(size, value), (), dtype, "offset")
