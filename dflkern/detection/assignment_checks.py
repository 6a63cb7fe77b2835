"""The checks of class logits and of the objects of a batch, in the manner of `checks`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_device, check_tensor


def check_class_logits(op: str, class_logits: Tensor, dim: int) -> int:
    """(B, A, C) with the classes last, or (B, C, A) with the classes at 1: return dim, 2 or 1."""
    check_tensor(op, "class_logits", class_logits)
    if class_logits.ndim != 3:
        raise ValueError(
            f"{op}: class_logits have shape {tuple(class_logits.shape)}; three axes are needed, "
            "(B, A, C) with dim=-1 or (B, C, A) with dim=1. Join the levels of a head with "
            "torch.cat([level.flatten(2) for level in levels], 2) and dim=1."
        )
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim is {dim!r}; an integer is needed, as in torch.softmax.")
    if dim not in (-2, -1, 1, 2):
        raise ValueError(
            f"{op}: dim={dim} is not an axis of classes; -1 for class_logits (B, A, C) and 1 for "
            "(B, C, A) are accepted."
        )
    return dim % 3


def check_indices(op: str, name: str, value: object, logits: Tensor, count: int) -> None:
    """A tensor of int32 or int64, (count,), on the device of the class logits."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        given = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(
            f"{op}: {name} is {given}; a tensor of int32 or int64 is needed. Convert it with "
            f"{name}.long()."
        )
    check_device(op, name, value, logits)
    if tuple(value.shape) != (count,):
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}; ({count},) is needed: one number for "
            "each object."
        )


def check_objects(
    op: str, gt_boxes: Tensor, gt_labels: Tensor, gt_image: Tensor, logits: Tensor
) -> None:
    """Boxes (N, 4), labels (N,) and images (N,) of the objects of a batch."""
    if gt_boxes.ndim != 2 or gt_boxes.shape[1] != 4:
        raise ValueError(
            f"{op}: gt_boxes have shape {tuple(gt_boxes.shape)}; (N, 4) is needed: the boxes of "
            "all objects of the batch, one after another. gt_image says which image each is in."
        )
    check_indices(op, "gt_labels", gt_labels, logits, len(gt_boxes))
    check_indices(op, "gt_image", gt_image, logits, len(gt_boxes))
