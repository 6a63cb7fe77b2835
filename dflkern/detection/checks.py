"""The checks of the detection losses' arguments; see `checks`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_dim,
    check_mask,
    check_number,
    check_other,
    check_shape,
    check_tensor,
)

BOX_REDUCTIONS = ("sum", "none")
INTEGER_DTYPES = (torch.int32, torch.int64)


def check_layout(op: str, name: str, value: Tensor, dim: int, last: str) -> int:
    """(B, A, x) with dim=-1, or a head's (B, x, A) with dim=1: return dim, 2 or 1.

    `last` names the axis x in messages.
    """
    check_tensor(op, name, value)
    check_dim(op, dim)
    if value.ndim != 3 or dim not in (-1, 2, 1, -2):
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} with dim={dim}; (B, A, {last}) with "
            f"dim=-1 or a head's (B, {last}, A) with dim=1 is needed. A map (B, {last}, H, W) is "
            f"{name}.flatten(2) with dim=1."
        )
    return dim % 3


def check_class_logits(op: str, class_logits: Tensor, dim: int) -> int:
    """(B, A, C) with dim=-1 or (B, C, A) with dim=1, of at least one class: return dim, 2 or 1."""
    dim = check_layout(op, "class_logits", class_logits, dim, "C")
    if class_logits.shape[dim] == 0:
        raise ValueError(
            f"{op}: class_logits of shape {tuple(class_logits.shape)} have no class along "
            f"dim={dim}; one at least is needed. If the classes lie along another axis, pass that "
            "axis as dim."
        )
    return dim


def check_integers(op: str, name: str, value: object, like: Tensor) -> None:
    """A tensor of one of INTEGER_DTYPES on the device of `like`."""
    if not isinstance(value, Tensor) or value.dtype not in INTEGER_DTYPES:
        given = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"{op}: {name} is {given}; an int32 or int64 tensor is needed. Convert it with "
            f"{name}.long()."
        )
    check_device(op, name, value, like)


def check_matched(op: str, matched: object, like: Tensor, shape: tuple[int, ...]) -> None:
    """Integers of shape (B, A): the index of each anchor's object."""
    check_integers(op, "matched", matched, like)
    assert isinstance(matched, Tensor)
    check_shape(op, "matched", matched, shape)


def check_target_boxes(
    op: str,
    target_boxes: Tensor,
    weight: Tensor,
    foreground: Tensor | None,
    matched: Tensor | None,
    like: Tensor,
    anchors: tuple[int, int],
) -> None:
    """What a box loss is given for each anchor, `anchors` being (B, A)."""
    check_other(op, "target_boxes", target_boxes, like)
    if matched is None:
        check_shape(op, "target_boxes", target_boxes, (*anchors, 4))
    else:
        check_matched(op, matched, like, anchors)
        check_shape(op, "target_boxes", target_boxes, (*target_boxes.shape[:1], 4))
    check_other(op, "weight", weight, like)
    classes = weight.shape[2:] if weight.ndim == 3 else ()
    check_shape(op, "weight", weight, (*anchors, *classes))
    if foreground is None:
        return
    check_mask(op, "foreground", foreground, like, anchors)
    if matched is not None:
        raise ValueError(
            f"{op}: foreground and matched are both given, and matched tells the foreground. "
            "Leave foreground out, or set matched to -1 where an anchor is background."
        )


def check_box_reduction(op: str, reduction: str, normalizer: object) -> None:
    """A known reduction, without a normalizer if it is not a sum."""
    check_choice(op, "reduction", reduction, BOX_REDUCTIONS)
    if reduction == "none" and normalizer is not None:
        raise ValueError(
            f'{op}: normalizer={normalizer!r} divides a sum, and reduction="none" makes none. Pass '
            "normalizer=None and divide the losses."
        )


def check_vector(op: str, name: str, value: Tensor, meaning: str) -> None:
    """One axis."""
    if value.ndim != 1:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}; one axis is needed: {meaning}."
        )


def check_not_negative(op: str, name: str, value: Any) -> None:
    """A finite number, at least 0."""
    check_number(op, name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name}={value}; it must be finite and at least 0.")


def check_image_size(op: str, image_size: Any) -> list[float]:
    """Height and width, both positive."""
    if isinstance(image_size, Tensor) or not isinstance(image_size, Sequence):
        raise TypeError(
            f"{op}: image_size has type {type(image_size).__name__}; two numbers (height, width) "
            "in pixels are needed, for example images.shape[-2:]."
        )
    if len(image_size) == 2:
        for side in image_size:
            check_number(op, "a side of image_size", side)
        height, width = image_size
        if 0 < height < math.inf and 0 < width < math.inf:
            return [float(height), float(width)]
    raise ValueError(
        f"{op}: image_size is {tuple(image_size)}; (height, width) in pixels is needed, both above "
        "0 and finite."
    )


def check_targets(targets: Any) -> None:
    """The form of torchvision's targets: a dictionary with boxes and labels for each image."""
    form = 'a list of {"boxes": (n, 4) tensor, "labels": (n,) tensor}, one for each image'
    if isinstance(targets, (dict, Tensor, str)) or not isinstance(targets, Sequence):
        raise TypeError(f"pack_targets: targets are a {type(targets).__name__}; {form} is needed.")
    if not targets:
        raise ValueError(
            "pack_targets: targets are empty, so that nothing says on which device the results "
            f"belong; {form} is needed. An image without objects has boxes of shape (0, 4) and "
            "labels of shape (0,)."
        )
    for image, target in enumerate(targets):
        _check_target(image, target, form, targets[0])


def _check_target(image: int, target: Any, form: str, first: Any) -> None:
    if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
        given = sorted(map(str, target)) if isinstance(target, dict) else type(target).__name__
        raise TypeError(f"pack_targets: targets[{image}] is {given}; {form} is needed.")
    op, boxes, labels = f"pack_targets: targets[{image}]", target["boxes"], target["labels"]
    check_tensor(op, "boxes", boxes)
    check_integers(op, "labels", labels, boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"{op}: boxes have shape {tuple(boxes.shape)}; (n, 4) is needed, as xyxy in pixels, "
            "(0, 4) for an image without objects."
        )
    check_shape(op, "labels", labels, (len(boxes),))
    for name in ("boxes", "labels"):
        given, expected = target[name], first[name]
        if (given.dtype, given.device) != (expected.dtype, expected.device):
            raise ValueError(
                f"{op}: {name} are {given.dtype} on {given.device}, those of the first image "
                f"{expected.dtype} on {expected.device}; one dtype and device for all images is "
                f"needed. Convert them with {name}.to(...)."
            )
