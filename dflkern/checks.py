"""The checks of user input, and the words of every error a user can cause.

They read metadata only (shapes, dtypes, devices), never a value of a tensor: nothing waits for the
device. Each sentence says what was given, what is accepted, and the way out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Project: TypeAlias = Sequence[float] | Tensor | None

MIN_BINS, MAX_BINS = 2, 256
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "sum", "mean", "side_mean")
BOX_FORMATS = ("xyxy", "cxcywh")
IOU_KINDS = ("iou", "giou", "diou", "ciou")


def check_tensor(op: str, name: str, value: object) -> None:
    """A dense tensor of one of FLOAT_DTYPES, or a TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} is a {type(value).__name__}; a floating-point torch.Tensor is needed. "
            f"Convert it with torch.as_tensor({name}, dtype=torch.float32)."
        )
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {value.dtype}; float16, bfloat16, float32 and float64 are "
            f"accepted. Convert it with {name}.{'dequantize' if value.is_quantized else 'float'}()."
        )
    if value.is_nested or value.layout is not torch.strided:
        kind, way = f"of layout {value.layout}", f"{name}.to_dense()"
        if value.is_nested:
            kind, way = "a nested tensor", f"torch.nested.to_padded_tensor({name}, 0.0)"
        raise TypeError(f"{op}: {name} is {kind}; a dense tensor is needed. Convert it with {way}.")


def check_number(op: str, name: str, value: Any, dtype: torch.dtype = torch.float64) -> None:
    """A Python number that a dtype can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} is {value!r}; a number is needed.")
    size: Any = abs(value)
    if math.inf > size > torch.finfo(dtype).max:
        raise ValueError(
            f"{op}: {name} is too large a number for {dtype}, in which the call is computed. Scale "
            "it, or pass fp64 logits."
        )


def check_at_least(
    op: str, name: str, value: Any, least: float, dtype: torch.dtype = torch.float64
) -> None:
    """A finite Python number that a dtype can hold, and not below least."""
    check_number(op, name, value, dtype)
    if not least <= value < math.inf:
        raise ValueError(f"{op}: {name}={value}; a finite number of at least {least} is needed.")


def check_count(op: str, name: str, value: object, most: int | None = None) -> None:
    """A whole number from 1 to most."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {value!r}; a whole number of at least 1 is needed.")
    if value < 1 or (most is not None and value > most):
        bound = "a whole number of at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{op}: {name}={value}; {bound} is needed.")


def check_broadcast(op: str, **shapes: tuple[int, ...]) -> None:
    """Leading axes that broadcast against each other."""
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        given = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{op}: the shapes without their last axis are those of {given}, which do not "
            "broadcast. Give each box one partner, or an axis of size 1 where one is shared."
        ) from None


def check_no_grad(op: str, name: str, value: Tensor) -> None:
    """Only the first tensor gets a gradient; silently dropping another one would be wrong."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, but only the first tensor gets a gradient. "
            f"Pass {name}.detach()."
        )


def check_device(op: str, name: str, value: Tensor, main: Tensor) -> None:
    """Same device as the first tensor of the call."""
    if value.device != main.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} and the first tensor is on {main.device}; all "
            f"tensors of a call must be on one device. Move it with {name}.to('{main.device}')."
        )


def check_other(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    """All that is asked of a tensor beside the logits, its shape apart."""
    check_tensor(op, name, value)
    check_device(op, name, value, logits)
    check_no_grad(op, name, value)


def check_logits(op: str, logits: Tensor, dim: int) -> int:
    """Check logits and dim; return dim counted from the front."""
    check_tensor(op, "logits", logits)
    if logits.ndim == 0:
        raise ValueError(
            f"{op}: logits have no dimension; at least one is needed, holding the bins of a "
            "distribution. A single distribution is a tensor of shape (num_bins,)."
        )
    check_dim(op, dim)
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(
            f"{op}: dim={dim} is out of range for logits of shape {tuple(logits.shape)}; "
            f"{-logits.ndim} to {logits.ndim - 1} are accepted. It names the axis of the bins."
        )
    dim %= logits.ndim
    num_bins = logits.shape[dim]
    if not MIN_BINS <= num_bins <= MAX_BINS:
        raise ValueError(
            f"{op}: logits of shape {tuple(logits.shape)} have {num_bins} bins along dim={dim}; "
            f"{MIN_BINS} to {MAX_BINS} are accepted. If the bins lie along another axis, pass that "
            "axis as dim; a head's (B, 4*K, A) needs logits.view(B, 4, K, A) and dim=2; a model "
            "with one bin a side (reg_max: 1) has no DFL."
        )
    return dim


def check_dim(op: str, dim: object, *accepted: int) -> None:
    """An integer; one of a few, if those are given."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim is {dim!r}; an integer is needed, as in torch.softmax.")
    if accepted and dim not in accepted:
        raise ValueError(
            f"{op}: dim={dim} names no axis of bins; {accepted[0]} or {accepted[1]} are accepted: "
            "-1 for logits (B, A, 4, K), 2 for a head's (B, 4, K, A)."
        )


def check_target(op: str, target: Tensor, logits: Tensor, dim: int) -> None:
    """Target has exactly the shape of logits without dim."""
    check_other(op, "target", target, logits)
    expected = list(logits.shape)
    del expected[dim]
    if list(target.shape) != expected:
        raise ValueError(
            f"{op}: target has shape {tuple(target.shape)}, but logits of shape "
            f"{tuple(logits.shape)} with dim={dim} need a target of shape {tuple(expected)}: one "
            "value per distribution. Reshape the target, or pass the axis of the bins as dim."
        )


def check_weight(op: str, weight: Tensor, logits: Tensor, shape: torch.Size) -> None:
    """Weight broadcasts to shape, without enlarging it."""
    check_other(op, "weight", weight, logits)
    fits = weight.ndim <= len(shape) and all(
        w in (1, s) for w, s in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, which does not broadcast to the "
            f"target's shape {tuple(shape)}. Give it that shape, or size 1 where it is shared: a "
            "weight per anchor for (N, 4) targets has shape (N, 1)."
        )


def check_reduction(
    op: str, reduction: str, sides: int, logits: Tensor, normalizer: object = None
) -> None:
    """One of REDUCTIONS; "side_mean" needs an axis of sides, and a normalizer needs "sum"."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if reduction == "side_mean" and sides < 0:
        raise ValueError(
            f'{op}: reduction="side_mean" is a mean over the axis before the bins, and logits of '
            f"shape {tuple(logits.shape)} have none there. Pass logits of shape (N, 4, num_bins), "
            'or reduction="mean".'
        )
    if normalizer is not None and reduction != "sum":
        raise ValueError(
            f'{op}: normalizer divides a sum and is given with reduction="{reduction}". Pass '
            'reduction="sum" with it, or leave it out.'
        )


def check_margin(op: str, margin: float, *, bounded: bool = True) -> None:
    """At least 0; below 1, the width of a bin, if bounded."""
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"{op}: margin is {margin!r}; a float is needed, 0.01 for example.")
    if not margin >= 0 or (bounded and not margin < 1):
        raise ValueError(
            f"{op}: margin={margin}; it must be at least 0 and, without project, below 1. "
            "0.01 is Ultralytics' value, 0.1 that of GFL, 0 that of D-FINE."
        )


def check_project(
    op: str, project: Project, margin: float, logits: Tensor, num_bins: int
) -> tuple[Tensor | None, list[float] | None]:
    """Check project and margin; return project as (tensor, None), (None, floats) or (None, None).

    Positions 0, 1, …, K−1 given as floats come back as (None, None): they are the default.
    """
    check_margin(op, margin, bounded=project is None)
    if project is None:
        return None, None
    if isinstance(project, Tensor):
        check_other(op, "project", project, logits)
        if project.shape != (num_bins,):
            raise ValueError(
                f"{op}: project has shape {tuple(project.shape)}; ({num_bins},) is needed: a "
                "position for each bin of the logits."
            )
        return project, None
    values = check_positions(op, project, margin, logits.dtype)
    if len(values) != num_bins:
        raise ValueError(
            f"{op}: project has {len(values)} positions for {num_bins} bins; one position for each "
            "bin is needed."
        )
    return None, None if values == list(range(num_bins)) else values


def check_positions(
    op: str, project: object, margin: float, dtype: torch.dtype = torch.float64
) -> list[float]:
    """Finite, increasing in the compute dtype, and wider than margin; as a list of floats."""
    try:
        values = [float(value) for value in project]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        words = f"{op}: project is {project!r}; increasing floats, one for each bin, are needed."
        raise TypeError(words) from None
    if len(values) < MIN_BINS:
        raise ValueError(
            f"{op}: project has {len(values)} positions; one for each bin is needed, 2 at least."
        )
    _check_increasing(op, tuple(values), margin, dtype)
    return values


@functools.lru_cache(maxsize=256)
def _check_increasing(
    op: str, values: tuple[float, ...], margin: float, dtype: torch.dtype
) -> None:
    for k, value in enumerate(values):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{op}: project[{k}] is {value}; finite positions are needed.")
        if k and not values[k - 1] < value:
            raise ValueError(
                f"{op}: project[{k}]={value} does not lie above project[{k - 1}]={values[k - 1]}; "
                "positions must increase strictly. Sort them, and the head's channels with them."
            )
    if not margin < values[-1] - values[0]:
        raise ValueError(
            f"{op}: margin={margin} is not below the width of project, {values[-1] - values[0]}; "
            "no target would be left. The margin is in the units of project."
        )
    if dtype != torch.float64 and not _distinct_in_fp32(values):
        raise ValueError(
            f"{op}: positions of project are equal or infinite in float32, in which the call is "
            "computed. Shift or scale them, or pass fp64 logits."
        )


def _distinct_in_fp32(values: Sequence[float]) -> bool:
    """Whether rounding to fp32 keeps them apart: by a unit in the last place of the larger."""
    largest = max(abs(values[0]), abs(values[-1]))
    return largest <= torch.finfo(torch.float32).max and all(
        b - a >= max(abs(a), abs(b)) * 2**-23 for a, b in itertools.pairwise(values)
    )


def check_choice(op: str, name: str, value: object, accepted: Sequence[str]) -> None:
    """A word out of a few."""
    if value not in accepted:
        raise ValueError(
            f"{op}: {name}={value!r} is not known; accepted are "
            + ", ".join(repr(a) for a in accepted)
            + "."
        )


def check_box_format(op: str, box_format: object) -> None:
    """One of the known formats. "xywh" is refused, since it has two meanings."""
    if box_format == "xywh":
        raise ValueError(
            f'{op}: box_format="xywh" means corner and size in some libraries, centre and size in '
            'others. Write "cxcywh" for centre, width and height; for corner and size, convert '
            '"xyxy" boxes: torchvision.ops.box_convert(boxes, "xyxy", "xywh").'
        )
    check_choice(op, "box_format", box_format, BOX_FORMATS)


def check_box_logits(op: str, logits: Tensor, dim: int) -> int:
    """(B, A, 4, K) with the bins last, or (B, 4, K, A) with the bins at 2: return dim, 3 or 2."""
    check_tensor(op, "logits", logits)
    if logits.ndim != 4 or dim not in (-1, 3, 2, -2):
        raise ValueError(
            f"{op}: logits have shape {tuple(logits.shape)} with dim={dim}; boxes need 4-D logits, "
            "(B, A, 4, K) with dim=-1 or (B, 4, K, A) with dim=2. A head's (B, 4*K, A) is "
            "logits.view(B, 4, K, A), without a copy."
        )
    dim = check_logits(op, logits, dim)
    if logits.shape[dim - 1] != 4:
        raise ValueError(
            f"{op}: logits of shape {tuple(logits.shape)} with dim={dim} have "
            f"{logits.shape[dim - 1]} sides along axis {dim - 1}; 4 are needed (left, top, right, "
            "bottom), on the axis just before the bins."
        )
    return dim


def check_anchor_points(op: str, anchor_points: Tensor, logits: Tensor, num_anchors: int) -> None:
    """(A, 2), in cells."""
    check_other(op, "anchor_points", anchor_points, logits)
    if tuple(anchor_points.shape) != (num_anchors, 2):
        raise ValueError(
            f"{op}: anchor_points have shape {tuple(anchor_points.shape)}; ({num_anchors}, 2) is "
            "needed: x and y, in cells, of each anchor. make_anchors gives them."
        )


def check_shape(op: str, name: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    """One of the shapes."""
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}; "
            + " or ".join(str(shape) for shape in shapes)
            + " is needed."
        )


def check_mask(op: str, name: str, value: object, logits: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of bool, of that shape."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        given = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"{op}: {name} is {given}; a bool tensor of shape {shape} is needed. Convert it with "
            f"{name}.bool()."
        )
    check_device(op, name, value, logits)
    check_shape(op, name, value, shape)


def check_boxes(op: str, name: str, value: Any) -> None:
    """A floating-point tensor of four numbers a box."""
    check_tensor(op, name, value)
    if value.ndim == 0 or value.shape[-1] != 4:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}; the last axis must hold the 4 numbers "
            "of a box."
        )
