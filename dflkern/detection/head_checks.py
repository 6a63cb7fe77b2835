"""The checks of `DetectionLoss`: its settings and the outputs of a head; see `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    IOU_KINDS,
    check_at_least,
    check_choice,
    check_count,
    check_device,
    check_number,
    check_other,
    check_shape,
    check_tensor,
)
from .losses import CLASS_KINDS

OP = "DetectionLoss"
Channels = dict[str, int]  # of "box_logits" and of "class_logits"


def check_settings(
    op: str,
    *,
    num_classes: int,
    num_bins: int,
    class_kind: str,
    topk: int,
    topk2: int | None,
    iou: str,
    **numbers: float,
) -> None:
    """Counts of at least 1, known words, and numbers of at least 0."""
    check_count(op, "num_classes", num_classes)
    check_count(op, "num_bins", num_bins, 256)
    check_count(op, "topk", topk)
    if topk2 is not None:
        check_count(op, "topk2", topk2, topk)
    check_choice(op, "iou", iou, IOU_KINDS)
    check_choice(op, "class_kind", class_kind, CLASS_KINDS)
    for name, value in numbers.items():
        check_at_least(op, name, value, 0, torch.float32)


def check_strides(op: str, strides: Any) -> tuple[float, ...]:
    """Pixels per cell of one level or more."""
    if isinstance(strides, Tensor):
        strides = strides.tolist()
    if not isinstance(strides, Sequence) or not strides:
        raise ValueError(
            f"{op}: strides={strides!r}; the pixels per cell of each level are needed, for example "
            "(8, 16, 32)."
        )
    for stride in strides:
        check_number(op, "a stride", stride, torch.float32)
        if not stride > 0:
            raise ValueError(f"{op}: strides={tuple(strides)}; each must be above 0.")
    return tuple(float(stride) for stride in strides)


def check_class_weight(op: str, class_weight: Any, num_classes: int) -> tuple[float, ...] | None:
    """A factor of each class as numbers."""
    if class_weight is None:
        return None
    values = class_weight.tolist() if isinstance(class_weight, Tensor) else class_weight
    if not isinstance(values, Sequence) or len(values) != num_classes:
        given = f"{len(values)} values" if isinstance(values, Sequence) else repr(class_weight)
        raise ValueError(
            f"{op}: class_weight is {given}; a factor of each of the {num_classes} classes is "
            "needed, as a list or a (C,) tensor."
        )
    for value in values:
        check_at_least(op, "a class weight", value, 0, torch.float32)
    return tuple(float(value) for value in values)


def check_outputs(
    box_logits: Tensor,
    class_logits: Any,
    anchor_points: Tensor | None,
    stride: Tensor | None,
    channels: Channels,
) -> tuple[Tensor, Tensor]:
    """(B, 4K, A) and (B, C, A) with anchor points and strides, which are returned."""
    check_tensor(OP, "box_logits", box_logits)
    check_tensor(OP, "class_logits", class_logits)
    check_device(OP, "box_logits", box_logits, class_logits)
    anchors = tuple(box_logits.shape[2:])
    for name, given in (("box_logits", box_logits), ("class_logits", class_logits)):
        count = channels[name]
        if len(anchors) != 1 or tuple(given.shape) != (len(box_logits), count, *anchors):
            raise ValueError(
                f"{OP}: {name} has shape {tuple(given.shape)}; {_needed(channels)} are needed, "
                f"with equal B and A. An output of shape (B, A, {count}) is {name}.mT; maps (B, "
                f"{count}, H, W) go in a list of all levels."
            )
    if anchor_points is None or stride is None:
        missing = "anchor_points" if anchor_points is None else "stride"
        raise ValueError(
            f"{OP}: {missing} is missing; outputs of shape (B, channels, A) do not tell where "
            "their anchors are. Pass both results of make_anchors(sizes, strides), or lists of the "
            "maps of all levels."
        )
    check_other(OP, "stride", stride, class_logits)
    check_shape(OP, "stride", stride, (*anchors, 1), anchors)
    return anchor_points, stride


def check_maps(
    box_logits: Any,
    class_logits: Any,
    anchor_points: Tensor | None,
    stride: Tensor | None,
    channels: Channels,
    strides: tuple[float, ...],
) -> tuple[tuple[int, int], ...]:
    """A map of each level in both outputs: return the levels' (H, W)."""
    for name, given in (("box_logits", box_logits), ("class_logits", class_logits)):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(
                f"{OP}: {name} is a {type(given).__name__}; {_needed(channels)} are needed, or two "
                "lists of the maps of all levels."
            )
        if len(given) != len(strides):
            raise ValueError(
                f"{OP}: {name} has {len(given)} maps; one for each of strides={strides} is needed."
            )
    if anchor_points is not None or stride is not None:
        raise ValueError(
            f"{OP}: anchor_points and stride follow from the maps and strides={strides}. Leave "
            f"them out, or pass {_needed(channels)}."
        )
    sizes = []
    for level, maps in enumerate(zip(box_logits, class_logits, strict=True)):
        sizes.append(_check_level(level, *maps, len(box_logits[0]), channels))
    return tuple(sizes)


def _check_level(
    level: int, boxes: Any, classes: Any, batch: int, channels: Channels
) -> tuple[int, int]:
    found = []
    for name, given in (("box_logits", boxes), ("class_logits", classes)):
        check_tensor(OP, f"{name}[{level}]", given)
        found.append(tuple(given.shape))
        size = found[0][2:]
        if len(size) != 2 or found[-1] != (batch, channels[name], *size):
            raise ValueError(
                f"{OP}: {name}[{level}] has shape {found[-1]}; (B, {channels[name]}, H, W) is "
                "needed, with equal B in all maps and equal H and W in both outputs of a level."
            )
    check_device(OP, f"box_logits[{level}]", boxes, classes)
    height, width = found[0][2:]
    return height, width


def _needed(channels: Channels) -> str:
    return (
        f"box_logits (B, {channels['box_logits']}, A), 4 · num_bins channels, and class_logits "
        f"(B, {channels['class_logits']}, A), num_classes channels,"
    )
