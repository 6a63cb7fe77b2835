"""Checks what `examine` is given, and brings it into rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import MAX_BINS, MIN_BINS, Project, check_margin, check_positions
from ..geometry import bbox2dist
from .evidence import Evidence, Geometry
from .values import Numbers, numbers, tensor, whole

MAX_LOGITS = 4_000_000  # a sample this large says as much as all of them
HEAD_CHANNELS = 4 * 8  # as many as four sides of the fewest bins in use have


def gather(
    targets: Tensor | None,
    num_bins: int | None,
    logits: Tensor | None,
    boxes: Tensor | None,
    anchor_points: Tensor | None,
    stride: Tensor | float | None,
    losses: Numbers | None,
    gradients: Mapping[str, Any] | Numbers | None,
    project: Project,
    margin: float,
    weight: Tensor | None,
    normalizer: Numbers | float | None,
    foreground: Tensor | None,
    dim: int,
) -> Evidence:
    """Check what `examine` was given, and bring it into rows.

    Raises:
        TypeError: for what is no tensor or number, and for tensors without plain real values.
        ValueError: for shapes that do not fit, in a sentence with the way out.
    """
    things = (targets, logits, boxes, anchor_points, losses, gradients, weight, normalizer)
    if all(thing is None for thing in things):
        raise ValueError(
            "examine: nothing was given; pass at least one of targets, logits, boxes, "
            "anchor_points, losses, gradients, weight and normalizer."
        )
    check_margin("examine", margin, bounded=project is None)
    targets, logits, boxes, anchor_points, weight, foreground = (
        None if value is None else tensor(name, value)
        for name, value in (
            ("targets", targets), ("logits", logits), ("boxes", boxes),
            ("anchor_points", anchor_points), ("weight", weight), ("foreground", foreground),
        )
    )  # fmt: skip
    positions = _positions(project, margin)
    if num_bins is not None:
        num_bins = whole("num_bins", num_bins)
    elif positions is not None:
        num_bins = len(positions)
    if logits is not None:
        sides = next((t for t in (targets, boxes) if t is not None and _has_sides(t)), None)
        anchors_shape = None if sides is None else sides.shape[:-1]
        logits = _bins_last(logits, whole("dim", dim), num_bins, anchors_shape)
        num_bins = logits.shape[-1] if num_bins is None else num_bins
    _check_bins(num_bins, positions, needed=targets is not None or boxes is not None)

    anchors = _anchors(targets, boxes, foreground)
    if targets is not None and not _has_sides(targets):
        targets = targets.unsqueeze(-1)
    points = None if anchor_points is None else _pairs(anchor_points)
    steps = None
    if anchors is not None:
        if targets is not None:
            targets = anchors.rows("targets", targets, targets.shape[-1])
        boxes = None if boxes is None else anchors.rows("boxes", boxes, 4)
        points = None if points is None else anchors.rows("anchor_points", points, 2)
        steps = None if stride is None else _steps(stride, anchors)
    return Evidence(
        num_bins=num_bins,
        margin=margin,
        project=positions,
        given=targets,
        geometry=_geometry(boxes, points, steps),
        boxes=boxes,
        anchor_points=points,
        raw_anchor_points=anchor_points,
        stride=steps,
        logits=None if logits is None else _logit_rows(logits, anchors),
        weight=None if weight is None else _weights(weight, anchors),
        normalizer=None if normalizer is None else numbers("normalizer", normalizer),
        losses=None if losses is None else numbers("losses", losses),
        gradients={} if gradients is None else _norms(gradients),
    )


@dataclass(frozen=True)
class _Anchors:
    """The shape that numbers the anchors, and the rows of those that count."""

    shape: tuple[int, ...]
    chosen: Tensor

    def rows(self, name: str, values: Tensor, width: int) -> Tensor:
        """(…, width) as a row for each anchor that counts."""
        if values.ndim == 0 or values.shape[-1] != width:
            raise ValueError(
                f"examine: {name} have shape {tuple(values.shape)}; the last axis must hold "
                f"{width} numbers: " + ("x and y." if width == 2 else "x1, y1, x2 and y2.")
            )
        return self.broadcast(name, values, (*self.shape, width)).reshape(-1, width)[self.chosen]

    def broadcast(self, name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Values for all anchors, whether they count or not."""
        try:
            return values.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"examine: {name} of shape {tuple(values.shape)} do not fit the {shape} that the "
                "targets or boxes ask for. For the foreground only, index them with it, as in "
                f"{name}[anchor]."
            ) from error


def _anchors(
    targets: Tensor | None, boxes: Tensor | None, foreground: Tensor | None
) -> _Anchors | None:
    """From the targets or boxes without their sides; None without both."""
    if targets is not None:
        if targets.ndim == 0:
            raise ValueError(
                "examine: targets have no dimension; (N, 4), (B, A, 4) or (N,) is needed."
            )
        shape = tuple(targets.shape[:-1] if _has_sides(targets) else targets.shape)
    elif boxes is not None:
        shape = tuple(boxes.shape[:-1])
    else:
        return None
    if foreground is None:
        return _Anchors(shape, torch.arange(math.prod(shape)))
    if tuple(foreground.shape) != shape:
        raise ValueError(
            f"examine: foreground has shape {tuple(foreground.shape)}; {shape} is needed: one bool "
            "for each anchor of the targets or boxes."
        )
    return _Anchors(shape, foreground.flatten().nonzero()[:, 0])


def _positions(project: Project, margin: float) -> Tensor | None:
    if project is None:
        return None
    positions = numbers("project", project)
    check_positions("examine", positions.tolist(), margin)
    return positions


def _check_bins(num_bins: int | None, positions: Tensor | None, *, needed: bool) -> None:
    if num_bins is None and needed:
        raise ValueError(
            "examine: targets and boxes need num_bins, the number of bins a side has in the head "
            "(Ultralytics' reg_max; mmdet's reg_max + 1), or the logits that show it."
        )
    if num_bins is not None and not MIN_BINS <= num_bins <= MAX_BINS:
        given = num_bins if abs(num_bins) < 10**18 else "10**18 or more"
        raise ValueError(
            f"examine: num_bins={given}; a distribution has at least {MIN_BINS} bins, and at most "
            f"{MAX_BINS} here."
        )
    if positions is not None and len(positions) != num_bins:
        raise ValueError(f"examine: project has {len(positions)} positions for {num_bins} bins.")


def _geometry(
    boxes: Tensor | None, points: Tensor | None, stride: Tensor | None
) -> Geometry | None:
    if boxes is None or points is None or stride is None:
        return None
    boxes, points, stride = boxes.double(), points.double(), stride[:, None]
    return Geometry(boxes, points, stride, bbox2dist(points, boxes / stride))


def _has_sides(targets: Tensor) -> bool:
    return targets.ndim > 1 and targets.shape[-1] == 4


def _pairs(points: Tensor) -> Tensor:
    if points.ndim == 0 or points.shape[-1] != 2:
        raise ValueError(
            f"examine: anchor_points have shape {tuple(points.shape)}; the last axis must hold x "
            "and y, in cells, as make_anchors gives them."
        )
    return points


def _steps(stride: Tensor | float, anchors: _Anchors) -> Tensor:
    values = numbers("stride", stride)
    if isinstance(stride, Tensor):
        values = values.reshape(stride.shape)
    if values.ndim > len(anchors.shape) or (values.ndim > 1 and values.shape[-1] == 1):
        values = values.squeeze(-1)
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError("examine: stride must be above 0 and finite: the pixels of a cell.")
    return anchors.broadcast("stride", values, anchors.shape).reshape(-1)[anchors.chosen]


def _bins_last(
    logits: Tensor, dim: int, num_bins: int | None, anchors: tuple[int, ...] | None
) -> Tensor:
    """(…, K); 4·K channels along dim become (…, 4, K)."""
    shape = tuple(logits.shape)
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(
            f"examine: dim={dim} is out of range for logits of shape {shape}; it names the axis of "
            "the bins, 2 for a head's (B, 4, K, A)."
        )
    if logits.ndim == 4 and dim in (2, -2):
        return logits.permute(0, 3, 1, 2)
    rows = logits.ndim == 2 and dim in (-1, 1)  # a distribution in each
    logits = logits.movedim(dim, -1)
    logits = logits.unsqueeze(0) if logits.ndim == 1 else logits
    size = logits.shape[-1]
    if size < MIN_BINS:
        raise ValueError(
            f"examine: logits of shape {shape} have {size} bins; at least {MIN_BINS} are needed. A "
            "model with one bin a side (reg_max: 1) has no DFL."
        )
    if num_bins is not None:
        four = size in (4 * num_bins, 4 * (num_bins + 1), 4 * (num_bins - 1))
    else:
        four = size % 4 == 0 and tuple(logits.shape[:-1]) == anchors
        sides = logits.ndim > 2 and logits.shape[-2] == 4
        if size >= HEAD_CHANNELS and not (four or size % 4 or rows or sides):
            raise ValueError(
                f"examine: logits of shape {shape} with dim={dim} have {size} channels: 4 sides of "
                f"{size // 4} bins, or {size} bins? Pass num_bins={size // 4} or num_bins={size}."
            )
    return logits.unflatten(-1, (4, size // 4)) if four else logits


def _logit_rows(logits: Tensor, anchors: _Anchors | None) -> Tensor:
    """(N, S, K) where the logits follow the targets; else an even sample, (M, 4, K) or (M, K)."""
    if anchors is not None:
        depth = len(anchors.shape)
        if tuple(logits.shape[:-2]) == anchors.shape:
            return logits.flatten(0, depth - 1)[anchors.chosen]
        if tuple(logits.shape[:-1]) == anchors.shape:
            return logits.flatten(0, depth - 1)[anchors.chosen].unsqueeze(1)
        if logits.ndim == 3 and len(logits) == len(anchors.chosen):
            return logits  # already of the foreground only
    sides = logits.ndim > 2 and logits.shape[-2] == 4
    rows = logits.flatten(0, -3 if sides else -2)
    return rows[:: max(1, rows.numel() // MAX_LOGITS)]


def _weights(weight: Tensor, anchors: _Anchors | None) -> Tensor:
    every = weight.double().flatten()
    if anchors is None or tuple(weight.shape) != anchors.shape:
        return every
    return every[anchors.chosen]


def _norms(gradients: Mapping[str, Any] | Numbers) -> dict[str, Tensor]:
    if not isinstance(gradients, Mapping):
        return {"": numbers("gradients", gradients)}
    return {
        name: numbers(f"gradients[{name!r}]", value).norm().reshape(1)
        if isinstance(value, Tensor)
        else numbers(f"gradients[{name!r}]", value)
        for name, value in gradients.items()
        if value is not None
    }
