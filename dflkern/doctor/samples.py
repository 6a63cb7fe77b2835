"""Even samples of what a loss was called with: a row for each foreground anchor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import MAX_BINS, MIN_BINS
from ..geometry import bbox2dist, column

Rows = dict[str, Tensor]


def thinned(rows: Rows, most: int) -> Rows:
    """At most that many rows, evenly spaced, so that no random number is drawn; copies."""
    count = len(next(iter(rows.values())))
    step = max(1, -(-count // most))
    return {name: values.detach()[::step].clone() for name, values in rows.items()}


def rows_of_call(call: dict[str, Any], dim: int, stride: Tensor | float | None) -> Rows | None:
    """The rows of a call by roles (see `signatures`); None if it is no DFL after all."""
    if not has_values(call["logits"]):
        return None
    rows = _of_boxes(call, dim, stride) if "boxes" in call else _of_targets(call, dim)
    return rows if rows and MIN_BINS <= rows["logits"].shape[-1] <= MAX_BINS else None


def has_values(value: object) -> bool:
    """A tensor of PyTorch's own; subclasses are for tracing, among other things."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta  # type: ignore[attr-defined]


def kind(rows: Rows) -> tuple[Any, ...]:
    """Rows of the same kind can be joined: same names, widths and dtypes."""
    return tuple((name, values.shape[1:], values.dtype) for name, values in rows.items())


def _of_targets(call: dict[str, Any], dim: int) -> Rows | None:
    """DFLoss: logits with bins along dim, and a target for each distribution."""
    logits, targets = call["logits"], call["targets"]
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or not targets.numel():
        return None
    if logits.ndim == 4 and dim in (2, -2):  # (B, 4, K, A) and (B, 4, A)
        logits, targets = logits.permute(0, 3, 1, 2), targets.transpose(1, 2)
    else:
        logits = logits.movedim(dim, -1)
    num_bins, rest = divmod(logits.numel(), targets.numel())
    if rest or num_bins < 2 or logits.shape[-1] % num_bins:
        return None
    sides = targets.shape[-1] if targets.ndim > 1 and targets.shape[-1] == 4 else 1
    rows = {
        "logits": logits.reshape(-1, sides, num_bins),
        "targets": targets.reshape(-1, sides),
    }
    weight = call.get("weight")
    if isinstance(weight, Tensor) and weight.numel() == len(rows["targets"]):
        rows["weight"] = weight.reshape(-1)
    return rows


def _of_boxes(call: dict[str, Any], dim: int, stride: Tensor | float | None) -> Rows | None:
    """BoxLoss: every anchor of a batch, boxes in cells, and which anchors are foreground."""
    logits, boxes, points = call["logits"], call["boxes"], call["anchor_points"]
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        return None
    if logits.ndim == 4 and dim in (2, -2):
        logits = logits.permute(0, 3, 1, 2)
    elif logits.shape[:2] == boxes.shape[:2]:
        logits = logits.reshape(*boxes.shape[:2], 4, -1)
    foreground = call.get("foreground")
    if not isinstance(foreground, Tensor) or foreground.dtype != torch.bool:
        foreground = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    image, anchor = foreground.nonzero(as_tuple=True)
    if not len(anchor) or logits.shape[:2] != boxes.shape[:2]:
        return None
    steps = call.get("stride", stride)
    rows = {"logits": logits[image, anchor], "anchor_points": points[anchor]}
    cells = boxes[image, anchor].float()
    if steps is None:
        rows["targets"] = bbox2dist(points[anchor].float(), cells)
    else:
        steps = torch.as_tensor(steps, device=boxes.device).float()
        rows["stride"] = column(steps).reshape(-1).expand(boxes.shape[1])[anchor]
        rows["boxes"] = cells * rows["stride"][:, None]
    weight = call.get("weight")
    if isinstance(weight, Tensor) and weight.shape[:2] == boxes.shape[:2]:
        weight = weight[image, anchor]
        rows["weight"] = weight.sum(-1) if weight.ndim > 1 else weight
    return rows
