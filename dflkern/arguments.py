"""From the arguments of a public function to those of its operator: every check, then a tuple.

The functions here are named after the public ones and take the same arguments; `NAMES` gives what
stands where in the tuple.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import (
    BOX_FORMATS,
    IOU_KINDS,
    Project,
    check_anchor_points,
    check_box_logits,
    check_choice,
    check_device,
    check_logits,
    check_number,
    check_other,
    check_project,
    check_shape,
    check_target,
)
from .problem import compute_dtype

_LOSS = ("logits", "target", "project", "positions", "dim", "margin")
NAMES = {
    "dfl_loss": _LOSS,
    "dfl_decode": ("logits", "project", "positions", "dim"),
    "dfl_loss_and_decode": _LOSS,
    "decode_boxes": (
        "logits", "anchor_points", "stride", "project", "positions", "dim", "box_format",
    ),
    "box_loss": (
        "logits", "anchor_points", "target_boxes", "weight", "normalizer", "foreground",
        "project", "positions", "dim", "margin", "iou",
    ),
}  # fmt: skip


def dfl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    project: Project = None,
    margin: float = 0.01,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> tuple[Any, ...]:
    """Bind `dflkern.dfl_loss`, whose weight and reduction come after its operator."""
    return _loss("dfl_loss", logits, target, dim, project, margin)


def dfl_loss_and_decode(
    logits: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    project: Project = None,
    margin: float = 0.01,
) -> tuple[Any, ...]:
    """Bind `dflkern.dfl_loss_and_decode`."""
    return _loss("dfl_loss_and_decode", logits, target, dim, project, margin)


def _loss(
    op: str, logits: Tensor, target: Tensor, dim: int, project: Project, margin: float
) -> tuple[Any, ...]:
    dim = check_logits(op, logits, dim)
    check_target(op, target, logits, dim)
    w, positions = check_project(op, project, margin, logits, logits.shape[dim])
    return logits, target, w, positions, dim, float(margin)


def dfl_decode(logits: Tensor, *, dim: int = -1, project: Project = None) -> tuple[Any, ...]:
    """Bind `dflkern.dfl_decode`."""
    dim = check_logits("dfl_decode", logits, dim)
    w, positions = check_project("dfl_decode", project, 0.0, logits, logits.shape[dim])
    return logits, w, positions, dim


def _filled(op: str, name: str, value: float, shape: tuple[int, ...], logits: Tensor) -> Tensor:
    """A number as a tensor: by a fill, where torch.tensor would be a copy from the host."""
    dtype = compute_dtype(logits.dtype)
    check_number(op, name, value, dtype)
    return torch.full(shape, value, dtype=dtype, device=logits.device)


def decode_boxes(
    logits: Tensor,
    anchor_points: Tensor,
    stride: Tensor | float | None = None,
    *,
    dim: int = -1,
    project: Project = None,
    box_format: str = "xyxy",
) -> tuple[Any, ...]:
    """Bind `dflkern.decode_boxes`."""
    op = "decode_boxes"
    dim = check_box_logits(op, logits, dim)
    anchors = logits.shape[1 if dim == 3 else 3]
    check_anchor_points(op, anchor_points, logits, anchors)
    if isinstance(stride, Tensor):
        check_other(op, "stride", stride, logits)
        check_shape(op, "stride", stride, (anchors, 1), (anchors,))
    elif stride is not None:
        stride = _filled(op, "stride", stride, (anchors,), logits)
    check_choice(op, "box_format", box_format, BOX_FORMATS)
    w, positions = check_project(op, project, 0.0, logits, logits.shape[dim])
    return logits, anchor_points, stride, w, positions, dim, box_format


def box_loss(
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | float,
    *,
    dim: int = -1,
    foreground: Tensor | None = None,
    project: Project = None,
    margin: float = 0.01,
    iou: str = "ciou",
) -> tuple[Any, ...]:
    """Bind `dflkern.box_loss`."""
    op = "box_loss"
    dim = check_box_logits(op, logits, dim)
    batch, anchors = logits.shape[0], logits.shape[1 if dim == 3 else 3]
    check_anchor_points(op, anchor_points, logits, anchors)
    check_other(op, "target_boxes", target_boxes, logits)
    check_shape(op, "target_boxes", target_boxes, (batch, anchors, 4))
    check_other(op, "weight", weight, logits)
    if weight.ndim != 3:
        check_shape(op, "weight", weight, (batch, anchors))
    else:
        check_shape(op, "weight", weight, (batch, anchors, weight.shape[-1]))
    if isinstance(normalizer, Tensor):
        check_other(op, "normalizer", normalizer, logits)
        check_shape(op, "normalizer", normalizer, ())
    else:
        normalizer = _filled(op, "normalizer", normalizer, (), logits)
    if foreground is not None:
        if not isinstance(foreground, Tensor) or foreground.dtype != torch.bool:
            given = getattr(foreground, "dtype", type(foreground).__name__)
            raise TypeError(
                f"{op}: foreground is {given}; a bool tensor of shape ({batch}, {anchors}) is "
                "needed. Convert it with foreground.bool()."
            )
        check_device(op, "foreground", foreground, logits)
        check_shape(op, "foreground", foreground, (batch, anchors))
    check_choice(op, "iou", iou, IOU_KINDS)
    w, positions = check_project(op, project, margin, logits, logits.shape[dim])
    return (
        logits, anchor_points, target_boxes, weight, normalizer, foreground, w, positions, dim,
        float(margin), iou,
    )  # fmt: skip
