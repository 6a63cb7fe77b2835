"""From a public function to the results: a call's way, and that of its gradient.

`call` gives an eager call on plain tensors to an autograd.Function (`_FastPath`): the dispatcher
and a registered operator's autograd cost some 50 µs a call and its backward, more than the kernels
of a few thousand distributions. torch.compile, dispatch modes and tensor subclasses get the
registered operator, and transforms and exporters the reference. Both ways run the same
`implementations`, `setup_context` and `gradient`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import operators as cpu
from ..problem import savable
from . import backends
from .implementations import ON_GPU, RUNS, Run, differentiable, on_cpu, with_project
from .modes import is_plain, is_transformed, needs_plain_operations
from .table import Arguments, Operator

_binding: contextvars.ContextVar[bool] = contextvars.ContextVar("dflkern_binding", default=False)


class _Bound(Exception):  # noqa: N818  (no error: it ends a call that computes nothing)
    """Carries the arguments of an operator to `bind`."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments


def call(op: Operator, **arguments: Any) -> Any:
    """The results of an operator for checked arguments, all but the backend."""
    if _binding.get():
        raise _Bound(arguments)
    arguments["backend"] = backends.requested()
    main = arguments[op.main]
    if not is_plain(main):
        return observed(op, arguments)
    run = RUNS[backends.decide(op, arguments)]
    if main.requires_grad and torch.is_grad_enabled() and op.gradient is not None:
        return _FastPath.apply(main, op, arguments, run)
    return run(op, arguments)


def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Arguments:
    """What a public function passes to its operator, but the backend; nothing is computed."""
    token = _binding.set(True)
    try:
        function(*args, **kwargs)
    except _Bound as bound:
        return bound.arguments
    finally:
        _binding.reset(token)
    raise TypeError(f"{function.__name__} calls no operator")


def observed(op: Operator, arguments: Arguments) -> Any:
    """The results in a form that whoever looks at a call can follow."""
    if needs_plain_operations():
        return differentiable(op, arguments)
    return getattr(torch.ops.dflkern, op.name)(*[arguments[name] for name in op.names])


def setup_context(
    ctx: Any, op: Operator, arguments: Arguments, kept: Arguments | None = None
) -> None:
    """Save what the gradient reads: arguments, or also what the CPU kernels kept of them."""
    names, given = op.saved, arguments
    if kept is not None:
        names, given = op.saved_on_cpu, {**arguments, **kept}
    tensors = [given[name] for name in names]
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():  # which autograd refuses to save
            tensors = [None if each is None else savable(each) for each in tensors]
            break
    ctx.save_for_backward(*tensors)
    ctx.op, ctx.names, ctx.others = op, names, {**arguments, **op.absent}
    if op.parts:
        ctx.set_materialize_grads(False)


def gradient(ctx: Any, grads: Sequence[Tensor | None], run: Run) -> Any:
    """The gradient of the first tensor, by its operator; None without upstream gradients."""
    op, arguments = ctx.op, ctx.others.copy()
    for name, tensor in zip(ctx.names, ctx.saved_tensors, strict=True):
        arguments[name] = tensor
    for name, grad in zip(op.upstream, grads, strict=True):
        arguments[name] = grad
    if op.parts:
        given = [part for part, grad in zip(op.parts, grads, strict=True) if grad is not None]
        if not given:
            return None
        if len(given) == 1:
            op = given[0]
            arguments = {**op.defaults, **arguments}
    if torch.is_grad_enabled():  # create_graph: the gradient must be differentiable in turn
        run = differentiable
    if "kept" in arguments and run is not on_cpu:
        arguments = cpu.spread(arguments)
    return run(op.gradient, arguments)


class _FastPath(torch.autograd.Function):
    """An operator on plain tensors, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, main: Tensor, op: Operator, arguments: Arguments, run: Run) -> Any:
        """Run, and save what the gradient reads."""
        ctx.run = run
        if op.saved_on_cpu and run is on_cpu:
            found, count = cpu.run(f"{op.name}_keep", with_project(arguments)), len(op.results)
            kept = [name for name in op.saved_on_cpu if name not in op.names]
            setup_context(ctx, op, arguments, dict(zip(kept, found[count:], strict=True)))
            return found[:count]
        if op.condensed and run in ON_GPU:
            written, saved = op.condensed(arguments)
            results = run(op, {**arguments, **written})
            setup_context(ctx, op, {**arguments, **saved})
            return results
        results = run(op, arguments)
        setup_context(ctx, op, arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient of the first tensor; a compiler or transform sees its operations."""
        traced = torch.compiler.is_compiling() or is_transformed()
        return gradient(ctx, grads, observed if traced else ctx.run), None, None, None
