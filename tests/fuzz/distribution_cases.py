"""Cases of dfl_loss, dfl_decode and dfl_loss_and_decode."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from . import model
from .bounds import Bounded
from .making import Case, Maker, broadcasting, weights
from .tensors import exact


class _Values(NamedTuple):
    """What the model needs of a call."""

    of: model.Distributions
    w: np.ndarray
    y: model.TwoBins | None
    weight: np.ndarray | None


def distributions(make: Maker) -> Case:
    spec = make.spec
    shape = (*spec.shape[: spec.dim], spec.bins, *spec.shape[spec.dim :])
    logits = make.logits(shape)
    project, positions = make.project()
    arguments: dict[str, Any] = {"dim": spec.dim - len(shape), "project": project}
    y = weight = None
    if spec.op != "dfl_decode":
        target = make.target(spec.shape, positions)
        arguments.update(target=target, margin=spec.margin)
        y = model.two_bins(
            exact(target).reshape(-1), positions, spec.bins, spec.margin, make.arithmetic
        )
    if spec.op == "dfl_loss":
        weight = _weight(make)
        arguments.update(weight=weight, reduction=spec.reduction)
    if spec.project == "descending":
        return Case(spec.op, arguments, ("logits", logits), [], raises=ValueError)
    flat = np.moveaxis(exact(logits), spec.dim, -1).reshape(-1, spec.bins)
    values = _Values(
        model.distributions(flat, make.precision),
        model.positions(positions, spec.bins, make.arithmetic),
        y,
        None if weight is None else exact(weight).astype(make.arithmetic),
    )
    results, upstream, gradient = _expected(make, values)
    axes = list(range(len(spec.shape)))
    axes.insert(spec.dim, len(spec.shape))
    gradient = gradient.reshape((*spec.shape, spec.bins)).transpose(*axes)
    return Case(spec.op, arguments, ("logits", logits), results, upstream, gradient)


def _expected(make: Maker, values: _Values) -> tuple[list[Bounded], list[Tensor | None], Bounded]:
    """Results, upstream gradients, and the gradient (N, K)."""
    spec = make.spec
    of, w, y, weight = values
    reduction = spec.reduction if spec.op == "dfl_loss" else "none"
    names = {"dfl_loss": ["loss"], "dfl_decode": ["position"]}.get(spec.op, ["loss", "position"])
    results: list[Bounded] = []
    upstream: list[Tensor | None] = []
    by = {}
    for name in names:
        per_one = model.loss(of, y) if name == "loss" else model.expected(of, w)
        if name == "loss" and spec.project == "unsorted":
            per_one = per_one.unknown_where(True)
        result = model.reduce(per_one, weight, reduction, spec.shape, spec.dim - 1)
        given = make.upstream("second" if results else "first", result.value.shape)
        results.append(result)
        upstream.append(given)
        if given is not None:
            by[name] = model.reduce_gradient(
                exact(given), weight, reduction, spec.shape, spec.dim - 1, make.precision
            )
    if len(by) == 2:
        gradient = model.both_gradients(of, y, w, by["loss"], by["position"])
    elif "loss" in by:
        gradient = model.loss_gradient(of, y, by["loss"])
    else:
        gradient = model.expected_gradient(of, w, by["position"])
    if "loss" in by and spec.project == "unsorted":
        gradient = gradient.unknown_where(True)
    return results, upstream, gradient


def _weight(make: Maker) -> Tensor | None:
    """A weight that broadcasts to the targets."""
    kind = make.spec.weight
    if kind is None:
        return None
    shape = broadcasting(make.rng("weight shape"), make.spec.shape)
    return make.other("weight", shape, lambda rng, size: weights(rng, size, kind))
