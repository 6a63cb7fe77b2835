"""Running the launch plans of the operators on boxes: what is allocated, and the launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..box_problem import BoxProblem
from .launch import launch, packed
from .plans import plan

IN_PLACE = ("logits", "weight")  # read where they are, whatever their strides


def run(op: str, problem: BoxProblem, backend: str, tensors: Mapping[str, Tensor | None]) -> Any:
    """Launch op and return its results.

    Args:
        op: the operator's name.
        problem: of these tensors.
        backend: "triton" or "cuda".
        tensors: the operator's and the bins' positions by role; None for what is not given.

    Returns:
        The boxes, both losses, or the gradient.
    """
    held = {
        role: value if role in IN_PLACE else _prepared(value, problem.compute_dtype)
        for role, value in tensors.items()
        if value is not None
    }
    if op.endswith("_backward"):
        return _fill(op, problem, backend, held, "grad_logits", torch.empty_like(held["logits"]))
    if op == "decode_boxes":
        shape = (problem.batch, problem.anchors, 4)
        if not problem.sides_last:
            shape = (problem.batch, 4, problem.anchors)
        boxes = held["logits"].new_empty(shape, dtype=problem.compute_dtype)
        return _fill(op, problem, backend, held, "boxes", boxes)
    return _box_loss(problem, backend, held)


def _prepared(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == torch.bool:
        return value.contiguous().view(torch.uint8)
    return packed(value.to(dtype))


def _fill(
    op: str, problem: BoxProblem, backend: str, held: dict[str, Tensor], role: str, result: Tensor
) -> Tensor:
    if problem.count:
        launch(plan(op, problem, backend), {**held, role: result})
    return result


def _box_loss(problem: BoxProblem, backend: str, held: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    new = held["logits"].new_empty
    dtype = problem.compute_dtype
    if not problem.count:
        return new((), dtype=dtype).zero_(), new((), dtype=dtype).zero_()
    first, second = plan("box_loss", problem, backend), plan("box_loss_sums", problem, backend)
    programs = first.grid[0] * first.grid[1]
    held["partials"] = new((3, programs), dtype=dtype)
    launch(first, held)
    held |= {"iou_loss": new((), dtype=dtype), "dfl_loss": new((), dtype=dtype)}
    launch(second, held)
    return held["iou_loss"], held["dfl_loss"]
