"""The short way to the CPU library for eager calls on plain tensors.

A registered operator with its autograd costs some 60 µs a call and its backward, more than the
kernels themselves take for a few thousand distributions. An eager call on a plain CPU tensor needs
nothing of it: an autograd.Function calls the C++ operators. Everything that looks at operators
(torch.compile, export, dispatch modes, torch.func, tensor subclasses) gets the registered ones; the
suite runs on both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import implementations, ops, reductions
from .problem import compute_dtype

ENABLED = True  # for tests of the other way


def serves(logits: Tensor, backend: str) -> bool:
    """Whether a call may go the short way."""
    return (
        not torch.compiler.is_compiling()
        and ENABLED
        and type(logits) is Tensor
        and implementations.serves_cpu(logits, backend)
        and not implementations.observed()
    )


def dfl_loss(bound: tuple[Any, ...], weight: Tensor | None, reduction: str) -> Tensor:
    """The loss, weighted and reduced, from the operator's arguments but the backend."""
    logits, target, project, positions, dim, margin = bound
    w = project_of(logits, project, positions)
    if logits.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Loss.apply(logits, target, w, dim, margin, weight, reduction)
        return result
    return _loss(logits, target, w, dim, margin, weight, reduction)


def dfl_decode(bound: tuple[Any, ...]) -> Tensor:
    """The expected position, from the operator's arguments but the backend."""
    logits, project, positions, dim = bound
    w = project_of(logits, project, positions)
    if logits.requires_grad and torch.is_grad_enabled():
        position: Tensor = _Decode.apply(logits, w, dim)
        return position
    expected: Tensor = operator_of("dfl_decode")(logits, w, dim)
    return expected


def dfl_loss_and_decode(bound: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Both, from the operator's arguments but the backend."""
    logits, target, project, positions, dim, margin = bound
    w = project_of(logits, project, positions)
    if logits.requires_grad and torch.is_grad_enabled():
        loss, position = _LossAndDecode.apply(logits, target, w, dim, margin)
    else:
        loss, position = operator_of("dfl_loss_and_decode")(logits, target, w, dim, margin)
    return loss, position


def project_of(logits: Tensor, project: Tensor | None, positions: Any) -> Tensor | None:
    """The bins' positions as the C++ operators take them."""
    if project is None and positions is None:
        return None
    return implementations.resolve_project(
        project, positions, compute_dtype(logits.dtype), logits.device
    )


def operator_of(name: str) -> Callable[..., Any]:
    """The C++ operator of that name."""
    found = _operators.get(name)
    if found is None:
        found = _operators[name] = getattr(torch.ops.dflkern, f"_cpu_{name}").default
    return found


_operators: dict[str, Callable[..., Any]] = {}


def _takes_mean(logits: Tensor, dim: int, weight: Tensor | None, reduction: str) -> bool:
    """Whether the C++ operator itself takes the mean over the sides."""
    return (
        reduction == "sides"
        and weight is None
        and 0 < dim == logits.ndim - 1
        and logits.shape[dim - 1] == 4
    )


def _loss(
    logits: Tensor,
    target: Tensor,
    w: Tensor | None,
    dim: int,
    margin: float,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    mean = _takes_mean(logits, dim, weight, reduction)
    loss: Tensor = operator_of("dfl_loss")(logits, target, w, dim, margin, mean)
    return loss if mean else reductions.reduce(loss, weight, reduction, dim - 1)


class _Loss(torch.autograd.Function):
    """dfl_loss with its weight and reduction."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        w: Tensor | None,
        dim: int,
        margin: float,
        weight: Tensor | None,
        reduction: str,
    ) -> Tensor:
        """Save logits, target and weight, and run."""
        implementations.save_for_backward(ctx, logits, target, w, weight)
        ctx.rest = dim, margin, reduction
        return _loss(logits, target, w, dim, margin, weight, reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the logits."""
        logits, target, w, weight = ctx.saved_tensors
        dim, margin, reduction = ctx.rest
        mean = _takes_mean(logits, dim, weight, reduction) and not torch.is_grad_enabled()
        if not mean and (weight is not None or reduction != "none"):
            grad = reductions.upstream(grad, weight, reduction, dim - 1, target.shape)
        if torch.is_grad_enabled():
            gradient = ops.gradient({"loss": grad}, logits, target, w, None, dim, margin, "cpu")
        else:
            backward = operator_of("dfl_loss_backward")
            gradient = backward(grad, logits, target, w, dim, margin, mean)
        return gradient, None, None, None, None, None, None


class _Decode(torch.autograd.Function):
    """dfl_decode."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, w: Tensor | None, dim: int) -> Tensor:
        """Save the logits, and run."""
        implementations.save_for_backward(ctx, logits, w)
        ctx.dim = dim
        position: Tensor = operator_of("dfl_decode")(logits, w, dim)
        return position

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the logits."""
        logits, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradient = ops.gradient({"position": grad}, logits, None, w, None, ctx.dim, 0.0, "cpu")
        else:
            gradient = operator_of("dfl_decode_backward")(grad, logits, w, ctx.dim)
        return gradient, None, None


class _LossAndDecode(torch.autograd.Function):
    """dfl_loss_and_decode."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, w: Tensor | None, dim: int, margin: float
    ) -> Any:
        """Save logits and target, and run."""
        implementations.save_for_backward(ctx, logits, target, w)
        ctx.set_materialize_grads(False)
        ctx.rest = dim, margin
        return operator_of("dfl_loss_and_decode")(logits, target, w, dim, margin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient of the logits by the upstream gradients that are there."""
        logits, target, w = ctx.saved_tensors
        dim, margin = ctx.rest
        named = zip(ops.RESULTS["dfl_loss_and_decode"], grads, strict=True)
        given = {name: grad for name, grad in named if grad is not None}
        if not given:
            gradient = None
        elif torch.is_grad_enabled():
            gradient = ops.gradient(given, logits, target, w, None, dim, margin, "cpu")
        else:
            operator = operator_of(ops.BACKWARD[tuple(given)])
            if "loss" in given:
                gradient = operator(*given.values(), logits, target, w, dim, margin)
            else:
                gradient = operator(*given.values(), logits, w, dim)
        return gradient, None, None, None, None
