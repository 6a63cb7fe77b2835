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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import implementations, ops
from .problem import compute_dtype

ENABLED = True  # for tests of the other way


def serves(op: str, logits: Tensor, backend: str) -> bool:
    """Whether a call of op may go the short way."""
    return (
        not torch.compiler.is_compiling()
        and ENABLED
        and type(logits) is Tensor
        and op in ops.RESULTS
        and implementations.serves_cpu(logits, backend)
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def call(op: str, bound: tuple[Any, ...]) -> Any:
    """Run op, one of the three on single distributions; differentiable, once and twice.

    Args:
        op: the operator's name.
        bound: its arguments but the backend.
    """
    target, margin = None, 0.0
    if op == "dfl_decode":
        logits, project, positions, dim = bound
    else:
        logits, target, project, positions, dim, margin = bound
    w = implementations.resolve_project(
        project, positions, compute_dtype(logits.dtype), logits.device
    )
    if logits.requires_grad and torch.is_grad_enabled():
        return _Function.apply(op, logits, target, w, dim, margin)
    return _forward(op, logits, target, w, dim, margin)


def _operator(name: str) -> Callable[..., Any]:
    found = _operators.get(name)
    if found is None:
        found = _operators[name] = getattr(torch.ops.dflkern, f"_cpu_{name}").default
    return found


_operators: dict[str, Callable[..., Any]] = {}


def _forward(
    op: str, logits: Tensor, target: Tensor | None, w: Tensor | None, dim: int, margin: float
) -> Any:
    if target is None:
        return _operator(op)(logits, w, dim)
    return _operator(op)(logits, target, w, dim, margin)


class _Function(torch.autograd.Function):
    """The three operators; which one is the first argument."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        logits: Tensor,
        target: Tensor | None,
        w: Tensor | None,
        dim: int,
        margin: float,
    ) -> Any:
        """Save logits and target, and run."""
        ctx.save_for_backward(logits, target, w)
        ctx.set_materialize_grads(False)
        ctx.rest = op, dim, margin
        return _forward(op, logits, target, w, dim, margin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient of the logits by the upstream gradients that are there."""
        op, dim, margin = ctx.rest
        logits, target, w = ctx.saved_tensors
        named = zip(ops.RESULTS[op], grads, strict=True)
        given = {name: grad for name, grad in named if grad is not None}
        if not given:
            gradient = None
        elif torch.is_grad_enabled():
            gradient = ops.gradient(given, logits, target, w, None, dim, margin, "cpu")
        else:
            operator = _operator(ops.BACKWARD[tuple(given)])
            if "loss" in given:
                gradient = operator(*given.values(), logits, target, w, dim, margin)
            else:
                gradient = operator(*given.values(), logits, w, dim)
        return None, gradient, None, None, None, None
