"""The short way to the CPU library for eager calls on boxes; see `eager`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .checks import IOU_KINDS
from .eager import operator_of, project_of


def decode_boxes(bound: tuple[Any, ...]) -> Tensor:
    """The boxes, from the operator's arguments but the backend."""
    logits, points, stride, project, positions, dim, box_format = bound
    w = project_of(logits, project, positions)
    if logits.requires_grad and torch.is_grad_enabled():
        boxes: Tensor = _DecodeBoxes.apply(logits, points, stride, w, dim, box_format)
        return boxes
    found: Tensor = operator_of("decode_boxes")(
        logits, points, stride, w, dim, box_format == "xywh"
    )
    return found


def box_loss(bound: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Both losses, from the operator's arguments but the backend."""
    *tensors, project, positions, dim, margin, iou = bound
    logits = tensors[0]
    w = project_of(logits, project, positions)
    kind = IOU_KINDS.index(iou)
    if logits.requires_grad and torch.is_grad_enabled():
        iou_loss, dfl_loss = _BoxLoss.apply(*tensors, w, dim, margin, kind)
    else:
        iou_loss, dfl_loss = operator_of("box_loss")(*tensors, w, dim, margin, kind)
    return iou_loss, dfl_loss


class _DecodeBoxes(torch.autograd.Function):
    """decode_boxes."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        points: Tensor,
        stride: Tensor | None,
        w: Tensor | None,
        dim: int,
        box_format: str,
    ) -> Tensor:
        """Save what the backward reads, and run."""
        ctx.save_for_backward(logits, stride, w)
        ctx.rest = dim, box_format
        boxes: Tensor = operator_of("decode_boxes")(
            logits, points, stride, w, dim, box_format == "xywh"
        )
        return boxes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the logits."""
        logits, stride, w = ctx.saved_tensors
        dim, box_format = ctx.rest
        if torch.is_grad_enabled():
            gradient = ops.decode_boxes_backward(
                grad, logits, stride, w, None, dim, box_format, None
            )
        else:
            backward = operator_of("decode_boxes_backward")
            gradient = backward(grad, logits, stride, w, dim, box_format == "xywh")
        return gradient, None, None, None, None, None


class _BoxLoss(torch.autograd.Function):
    """box_loss."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Save all tensors, and run."""
        *tensors, dim, margin, kind = arguments
        ctx.save_for_backward(*tensors)
        ctx.rest = dim, margin, kind
        return operator_of("box_loss")(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient of the logits."""
        tensors = ctx.saved_tensors
        dim, margin, kind = ctx.rest
        if torch.is_grad_enabled():
            gradient = ops.box_loss_backward(
                *grads, *tensors, None, dim, margin, IOU_KINDS[kind], None
            )
        else:
            gradient = operator_of("box_loss_backward")(*grads, *tensors, dim, margin, kind)
        return gradient, *(None,) * 9
