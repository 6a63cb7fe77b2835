"""What a GPU kernel on boxes needs to know about a call, beyond the `Problem` of its logits."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, describe, strides_like


class Strides(NamedTuple):
    """In elements, of logits (B, A, 4, K) or (B, 4, K, A), or of their gradient."""

    batch: int
    anchor: int
    side: int
    bin: int


class Weight(NamedTuple):
    """Of box_loss: weights (B, A), with None for classes, or class scores (B, A, classes)."""

    dtype: torch.dtype
    classes: int | None
    batch: int
    anchor: int
    score: int  # the stride of the classes
    aligned: bool  # whether it begins at a multiple of 16 bytes


@dataclass(frozen=True, kw_only=True)
class BoxProblem(Problem):
    """The Problem of the logits with its axes named, and what else the call is given.

    Boxes are (B, A, 4) if `sides_last`, else (B, 4, A). Anchor points, strides, boxes, upstream
    gradients and the foreground are contiguous, and all but the foreground in the compute dtype.
    """

    batch: int
    anchors: int
    logits: Strides
    gradient: Strides
    sides_last: bool
    # decode_boxes
    stride: bool = False
    box_format: str = "xyxy"
    # box_loss
    iou: str = "ciou"
    foreground: bool = False
    weight: Weight | None = None
    keep: bool = False  # whether box_loss also writes the weight of each anchor

    __hash__ = Problem.__hash__


def describe_boxes(
    logits: Tensor,
    dim: int,
    *,
    project: bool = False,
    margin: float = 0.0,
    stride: bool = False,
    box_format: str = "xyxy",
    iou: str = "ciou",
    foreground: bool = False,
    weight: Tensor | None = None,
    keep: bool = False,
) -> BoxProblem:
    """The BoxProblem of checked arguments: logits and class scores, and facts of the others."""
    scores = None
    if weight is not None:
        classes, score = (weight.shape[2], weight.stride(2)) if weight.ndim == 3 else (None, 0)
        aligned = weight.data_ptr() % 16 == 0
        scores = Weight(weight.dtype, classes, weight.stride(0), weight.stride(1), score, aligned)
    return _describe(
        tuple(logits.shape), logits.stride(), logits.dtype, logits.device, dim,
        logits.data_ptr() % 16 == 0, project, margin, stride, box_format, iou, foreground, scores,
        keep,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _describe(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    dim: int,
    aligned: bool,
    project: bool,
    margin: float,
    with_stride: bool,
    box_format: str,
    iou: str,
    foreground: bool,
    weight: Weight | None,
    keep: bool,
) -> BoxProblem:
    problem = describe(
        shape, stride, dtype, device, dim, aligned=aligned, margin=margin, project=project
    )
    gradient = strides_like(shape, stride)
    order = (0, 1, 2, 3) if dim == 3 else (0, 3, 1, 2)
    return BoxProblem(
        **{field.name: getattr(problem, field.name) for field in fields(Problem)},
        batch=shape[0],
        anchors=shape[order[1]],
        logits=Strides(*(stride[axis] for axis in order)),
        gradient=Strides(*(gradient[axis] for axis in order)),
        sides_last=dim == 3,
        stride=with_stride,
        box_format=box_format,
        iou=iou,
        foreground=foreground,
        weight=weight,
        keep=keep,
    )
