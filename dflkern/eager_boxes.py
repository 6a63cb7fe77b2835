"""The short way to the CPU library for eager calls on boxes; see `eager`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import implementations, ops
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
        implementations.save_for_backward(ctx, logits, stride, w)
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
    """box_loss, of whose targets it keeps those of the foreground alone."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Run, and save the logits and a few numbers of each anchor in the foreground."""
        logits, points, _, _, normalizer, _, w, dim, margin, kind = arguments
        iou_loss, dfl_loss, *kept = operator_of("box_loss_keep")(*arguments)
        implementations.save_for_backward(ctx, logits, points, *kept, normalizer, w)
        ctx.rest = dim, margin, kind
        return iou_loss, dfl_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient of the logits."""
        *tensors, w = ctx.saved_tensors
        dim, margin, kind = ctx.rest
        if torch.is_grad_enabled():
            gradient = _differentiable(grads, tensors, w, dim, margin, kind)
        else:
            backward = operator_of("box_loss_backward_kept")
            gradient = backward(*grads, *tensors, w, dim, margin, kind)
        return gradient, *(None,) * 9


def _differentiable(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    w: Tensor | None,
    dim: int,
    margin: float,
    kind: int,
) -> Any:
    """The gradient as an expression, with the targets spread over all anchors again."""
    logits, points, candidates, kept, normalizer = tensors
    batch, anchors = logits.shape[0], len(points)
    spread = kept.new_zeros(batch * anchors, kept.shape[1])
    weight, *box = spread.index_copy(0, candidates, kept).view(batch, anchors, -1).unbind(-1)
    foreground = weight != 0
    return ops.box_loss_backward(
        *grads, logits, points, torch.stack(box, -1), weight, normalizer, foreground, w, None, dim,
        margin, IOU_KINDS[kind], None,
    )  # fmt: skip
