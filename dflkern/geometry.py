"""Anchor points, DFL targets, and boxes from distances.

Plain, differentiable PyTorch on the last axis. Low-precision input is computed in fp32: in bf16 an
anchor point beyond column 128 is off by half a cell, and a distance of 14.99 becomes 15.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    check_box_format,
    check_boxes,
    check_broadcast,
    check_margin,
    check_number,
    check_tensor,
)
from .problem import compute_dtype, savable


def make_anchors(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    *,
    offset: float = 0.5,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The centres of all cells of the feature levels, level after level, row by row.

    The cell in column i and row j of a level has its anchor point at (i + offset, j + offset).

    Args:
        sizes: (height, width) of each level, in cells.
        strides: pixels per cell of each level.
        offset: 0.5 puts the point in the middle of its cell, 0 (NanoDet, DAMO-YOLO) on its corner.
        device: where to put the results.

    Returns:
        anchor_points, (A, 2) as (x, y) in cells, and stride, (A, 1) in pixels per cell; both fp32
        under every autocast, since bf16 cannot tell cells apart beyond column 128.

    Raises:
        ValueError: if the numbers of sizes and strides differ.
    """
    if len(sizes) != len(strides):
        raise ValueError(
            f"make_anchors: {len(sizes)} sizes and {len(strides)} strides were given; each level "
            "needs one (height, width) and one stride."
        )
    new = functools.partial(torch.full, dtype=torch.float32, device=device)
    points, steps = [new((0, 2), 0.0)], [new((0, 1), 0.0)]
    for size, stride in zip(sizes, strides, strict=True):
        height, width = _size(size)
        y = torch.arange(height, device=device, dtype=torch.float32) + offset
        x = torch.arange(width, device=device, dtype=torch.float32) + offset
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((columns, rows), -1).reshape(-1, 2))
        steps.append(new((height * width, 1), _stride("make_anchors", stride)))
    return torch.cat(points), torch.cat(steps)


def bbox2dist(
    anchor_points: Tensor, boxes: Tensor, max_dist: float | None = None, *, margin: float = 0.01
) -> Tensor:
    """Distances from anchor points to the sides of boxes: (x − x1, y − y1, x2 − x, y2 − y).

    Clamped to [0, max_dist − margin] unless max_dist is None. For K bins max_dist is K − 1.

    Args:
        anchor_points: (…, 2) as (x, y), in the unit of the boxes (cells, for DFL targets).
        boxes: (…, 4) as xyxy; leading axes broadcast against those of anchor_points.
        max_dist: the position of the last bin, K − 1; None: no clamp.
        margin: how far below max_dist the clamp sits, so that the bin to the right exists.

    Returns:
        (…, 4) distances left, top, right, bottom, fp64 if an input is fp64, else fp32. A NaN stays.

    Raises:
        TypeError: for an input that is no floating-point tensor.
        ValueError: for boxes without 4 numbers, or margin below 0 or not below max_dist.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    _check_anchors("bbox2dist", anchor_points)
    check_boxes("bbox2dist", "boxes", boxes)
    check_broadcast("bbox2dist", anchor_points=anchor_points.shape[:-1], boxes=boxes.shape[:-1])
    anchor_points, boxes = same_precision(anchor_points, boxes)
    x1y1, x2y2 = boxes.chunk(2, -1)
    distances = torch.cat(torch.broadcast_tensors(anchor_points - x1y1, x2y2 - anchor_points), -1)
    if max_dist is None:
        return distances
    check_number("bbox2dist", "max_dist", max_dist)
    check_number("bbox2dist", "margin", margin)
    if not 0 <= margin < max_dist:
        raise ValueError(
            f"bbox2dist: margin={margin} with max_dist={max_dist}; the margin must be at least 0 "
            "and below max_dist, which is num_bins − 1."
        )
    return distances.clamp(0, max_dist - margin)


def dist2bbox(distances: Tensor, anchor_points: Tensor, *, box_format: str = "xyxy") -> Tensor:
    """Boxes from distances: x1 = x − l, y1 = y − t, x2 = x + r, y2 = y + b.

    Args:
        distances: (…, 4) as left, top, right, bottom.
        anchor_points: (…, 2) as (x, y), in the unit of the distances; leading axes broadcast.
        box_format: "xyxy", or "cxcywh" for centre, width and height.

    Returns:
        (…, 4) boxes, fp64 if an input is fp64, else fp32, in the unit of the inputs.

    Raises:
        TypeError: for an input that is no floating-point tensor.
        ValueError: for distances without 4 numbers or an unknown box_format.
    """
    check_boxes("dist2bbox", "distances", distances)
    _check_anchors("dist2bbox", anchor_points)
    shapes = {"distances": distances.shape[:-1], "anchor_points": anchor_points.shape[:-1]}
    check_broadcast("dist2bbox", **shapes)
    check_box_format("dist2bbox", box_format)
    distances, anchor_points = same_precision(distances, anchor_points)
    left_top, right_bottom = distances.chunk(2, -1)
    x1y1, x2y2 = anchor_points - left_top, anchor_points + right_bottom
    if box_format == "xyxy":
        return torch.cat((x1y1, x2y2), -1)
    return torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), -1)


def dfl_targets(
    boxes: Tensor,
    anchor_points: Tensor,
    stride: Tensor | float,
    num_bins: int,
    *,
    margin: float = 0.01,
) -> Tensor:
    """DFL targets of assigned boxes: boxes in pixels, anchor points and targets in cells.

    The distances from the anchor point to the sides of box / stride, clamped to
    [0, num_bins − 1 − margin]:

        (x − x1 / stride, y − y1 / stride, x2 / stride − x, y2 / stride − y)

    Args:
        boxes: (…, 4) as xyxy in pixels, the box assigned to each anchor point.
        anchor_points: (…, 2) as (x, y) in cells, from `make_anchors`; leading axes broadcast
            against the boxes'.
        stride: pixels per cell of each anchor point: a number, or a tensor (A,) or (A, 1).
        num_bins: K, the number of channels a side has in the head (Ultralytics' reg_max; mmdet's
            reg_max + 1).
        margin: how far below the last bin the clamp sits; 0.01 as in Ultralytics.

    Returns:
        (…, 4) targets in cells, in the order left, top, right, bottom; fp64 if an input is fp64,
        else fp32, in which 14.99 stays below 15.

    Raises:
        TypeError: for boxes or anchor points that are no floating-point tensors.
        ValueError: for num_bins below 2 or margin outside [0, 1).

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    check_boxes("dfl_targets", "boxes", boxes)
    _check_anchors("dfl_targets", anchor_points)
    check_margin("dfl_targets", margin)
    if not isinstance(num_bins, int) or num_bins < 2:
        raise ValueError(
            f"dfl_targets: num_bins={num_bins}; a distribution has at least 2 bins, "
            "and a whole number of them."
        )
    boxes, anchor_points = same_precision(boxes, anchor_points)
    if isinstance(stride, Tensor):
        _check_strides(stride, boxes, anchor_points)
        stride = column(savable(stride)).to(boxes.dtype)
    else:
        stride = _stride("dfl_targets", stride)
    return bbox2dist(anchor_points, boxes / stride, num_bins - 1, margin=margin)


def column(stride: Tensor) -> Tensor:
    """A stride of shape (A,) as (A, 1); one of shape (A, 1), or a single number, as it is."""
    return stride.unsqueeze(-1) if stride.ndim == 1 else stride


def _size(size: tuple[int, int]) -> tuple[int, int]:
    """The height and width of a feature level, in cells."""
    try:  # an axis of a traced tensor is a SymInt, which a conversion would make a constant
        height, width = (n if isinstance(n, torch.SymInt) else operator.index(n) for n in size)
    except (TypeError, ValueError):
        height = width = -1
    if height < 0 or width < 0:
        raise ValueError(
            f"make_anchors: the size of a level is {size!r}; (height, width) is needed, two whole "
            "numbers of cells: those of the image divided by the stride."
        )
    return height, width


def _stride(op: str, stride: float) -> float:
    """Pixels per cell as a float."""
    try:
        value = float(stride)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            f"{op}: stride={stride!r}; pixels per cell are a finite number above 0, 8 for example."
        )
    return value


def _check_strides(stride: Tensor, boxes: Tensor, anchor_points: Tensor) -> None:
    shapes = {"boxes": boxes.shape[:-1], "anchor_points": anchor_points.shape[:-1]}
    check_broadcast("dfl_targets", **shapes)
    shape = column(stride).shape
    wanted = torch.broadcast_shapes(*shapes.values())
    fits = not shape or (
        shape[-1] == 1
        and len(shape) <= len(wanted) + 1
        and all(a in (1, b) for a, b in zip(shape[-2::-1], wanted[::-1], strict=False))
    )
    if not fits:
        raise ValueError(
            f"dfl_targets: stride has shape {tuple(stride.shape)}; a number, or one for each of "
            f"the anchor points {tuple(anchor_points.shape)}, as (A,) or (A, 1), is needed. "
            "make_anchors gives it."
        )


def _check_anchors(op: str, anchor_points: Tensor) -> None:
    check_tensor(op, "anchor_points", anchor_points)
    if anchor_points.ndim == 0 or anchor_points.shape[-1] != 2:
        raise ValueError(
            f"{op}: anchor_points have shape {tuple(anchor_points.shape)}; the last axis must hold "
            "x and y."
        )


def same_precision(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64 if one is, else both in fp32."""
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    return savable(a).to(dtype), savable(b).to(dtype)
