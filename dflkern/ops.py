"""The one registration file: schemas, implementations, fakes and autograd of every operator.

The operators live in the namespace `dflkern` (torch.ops.dflkern.*) and are private: call the
functions of `dflkern` instead. They return unreduced results in the compute dtype, contiguous, and
gradients in the logits' dtype with the strides of torch.empty_like(logits). The backend is a string
argument, so that a backward pass, which runs in another thread on CUDA, and a compiled graph see
what the caller asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import implementations
from .problem import compute_dtype

# What the operators on single distributions return
RESULTS = {
    "dfl_loss": ("loss",),
    "dfl_decode": ("position",),
    "dfl_loss_and_decode": ("loss", "position"),
}
# Their backwards, by the results whose upstream gradient is there
BACKWARD = {results: f"{op}_backward" for op, results in RESULTS.items()}

_POSITIONS = "Tensor? project, float[]? positions, int dim"
_ROWS = {
    "dfl_loss": f"Tensor logits, Tensor target, {_POSITIONS}, float margin, str backend",
    "dfl_decode": f"Tensor logits, {_POSITIONS}, str backend",
    "dfl_loss_and_decode": f"Tensor logits, Tensor target, {_POSITIONS}, float margin, str backend",
}
_BOXES = f"Tensor? stride, {_POSITIONS}, str box_format, str backend"
_BOX_LOSS = (
    "Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, Tensor normalizer, "
    f"Tensor? foreground, {_POSITIONS}, float margin, str iou, str backend"
)
_SCHEMAS = (
    f"dfl_loss({_ROWS['dfl_loss']}) -> Tensor",
    f"dfl_loss_backward(Tensor grad_loss, {_ROWS['dfl_loss']}) -> Tensor",
    f"dfl_decode({_ROWS['dfl_decode']}) -> Tensor",
    f"dfl_decode_backward(Tensor grad_position, {_ROWS['dfl_decode']}) -> Tensor",
    f"dfl_loss_and_decode({_ROWS['dfl_loss_and_decode']}) -> (Tensor, Tensor)",
    "dfl_loss_and_decode_backward(Tensor grad_loss, Tensor grad_position, "
    f"{_ROWS['dfl_loss_and_decode']}) -> Tensor",
    f"decode_boxes(Tensor logits, Tensor anchor_points, {_BOXES}) -> Tensor",
    f"decode_boxes_backward(Tensor grad_boxes, Tensor logits, {_BOXES}) -> Tensor",
    f"box_loss({_BOX_LOSS}) -> (Tensor, Tensor)",
    f"box_loss_backward(Tensor grad_iou, Tensor grad_dfl, {_BOX_LOSS}) -> Tensor",
)


def _own_library() -> torch.library.Library:
    """The registrations of this import; those of an earlier import of dflkern are taken back."""
    namespace = vars(torch.ops.dflkern)
    if "registrations" in namespace:
        namespace["registrations"]._destroy()
    namespace["registrations"] = library = torch.library.Library("dflkern", "FRAGMENT")
    return library


_library = _own_library()
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _register(op: str, implementation: Any, fake: Any) -> None:
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dflkern::{op}", fake, lib=_library)


def _register_autograd(op: str, setup_context: Any, autograd: Any) -> None:
    torch.library.register_autograd(
        f"dflkern::{op}", autograd, setup_context=setup_context, lib=_library
    )


def _empty_outputs(logits: Tensor, dim: int) -> Tensor:
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


# --- operators on single distributions ----------------------------------------------------------


def _split(op: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """(logits, target or None, project, positions, dim, margin, backend) of any of the three."""
    if op == "dfl_decode":
        logits, *others, backend = arguments
        return logits, None, *others, 0.0, backend
    return tuple(arguments)


def _register_distribution_op(op: str) -> None:
    results = RESULTS[op]
    count = len(results)

    def forward(*arguments: Any) -> Any:
        return implementations.distributions(op, {}, *_split(op, arguments))

    def forward_fake(*arguments: Any) -> Any:
        empty = [_empty_outputs(arguments[0], _split(op, arguments)[4]) for _ in results]
        return empty[0] if count == 1 else tuple(empty)

    def backward(*arguments: Any) -> Any:
        grads = {f"grad_{name}": arguments[i] for i, name in enumerate(results)}
        rest = _split(op, arguments[count:])
        return implementations.distributions(f"{op}_backward", grads, *rest)

    def backward_fake(*arguments: Any) -> Tensor:
        return torch.empty_like(arguments[count])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, project, *ctx.rest = _split(op, inputs)
        implementations.save_for_backward(ctx, logits, target, project)
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = 5 if op == "dfl_decode" else 7
        given = {name: grad for name, grad in zip(results, grads, strict=True) if grad is not None}
        if not given:
            return (None,) * inputs
        return gradient(given, *ctx.saved_tensors, *ctx.rest), *(None,) * (inputs - 1)

    _register(op, forward, forward_fake)
    _register(f"{op}_backward", backward, backward_fake)
    _register_autograd(op, setup_context, autograd)


def gradient(
    grads: dict[str, Tensor],
    logits: Tensor,
    target: Tensor | None,
    project: Tensor | None,
    positions: Sequence[float] | None,
    dim: int,
    margin: float,
    backend: str,
) -> Any:
    """The gradient of the logits, by the operator for those upstream gradients that are there."""
    op = BACKWARD[tuple(grads)]
    if "loss" not in grads:
        target = None
    if torch.is_grad_enabled():  # create_graph: the gradient must be differentiable in turn
        named = {f"grad_{name}": grad for name, grad in grads.items()}
        return implementations.distributions(
            op, named, logits, target, project, positions, dim, margin, None
        )
    upstream, operator = grads.values(), getattr(torch.ops.dflkern, op)
    if target is None:
        return operator(*upstream, logits, project, positions, dim, backend)
    return operator(*upstream, logits, target, project, positions, dim, margin, backend)


for _op in RESULTS:
    _register_distribution_op(_op)

# --- operators on boxes -------------------------------------------------------------------------


def _decode_boxes(*arguments: Any) -> Any:
    *tensors, project, positions, dim, box_format, backend = arguments
    return implementations.boxes(
        "decode_boxes", tensors, tensors[0], project, positions, dim, [box_format], backend
    )


def _decode_boxes_fake(*arguments: Any) -> Tensor:
    return _empty_outputs(arguments[0], arguments[5])


def decode_boxes_backward(*arguments: Any) -> Any:
    """The backward operator's implementation; with None as backend, differentiable."""
    *tensors, project, positions, dim, box_format, backend = arguments
    return implementations.boxes(
        "decode_boxes_backward", tensors, tensors[1], project, positions, dim, [box_format], backend
    )


def _decode_boxes_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, stride, project, *ctx.rest = inputs
    implementations.save_for_backward(ctx, logits, stride, project)


def _decode_boxes_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, stride, project = ctx.saved_tensors
    positions, dim, box_format, backend = ctx.rest
    if torch.is_grad_enabled():
        gradient = decode_boxes_backward(
            grad, logits, stride, project, positions, dim, box_format, None
        )
    else:
        gradient = torch.ops.dflkern.decode_boxes_backward(
            grad, logits, stride, project, positions, dim, box_format, backend
        )
    return gradient, *(None,) * 7


_register("decode_boxes", _decode_boxes, _decode_boxes_fake)
_register(
    "decode_boxes_backward",
    decode_boxes_backward,
    lambda grad_boxes, logits, *rest: torch.empty_like(logits),
)
_register_autograd("decode_boxes", _decode_boxes_setup, _decode_boxes_autograd)


def _box_loss(*arguments: Any) -> Any:
    *tensors, project, positions, dim, margin, iou, backend = arguments
    return implementations.boxes(
        "box_loss", tensors, tensors[0], project, positions, dim, [margin, iou], backend
    )


def _box_loss_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)


def box_loss_backward(*arguments: Any) -> Any:
    """The backward operator's implementation; with None as backend, differentiable."""
    *tensors, project, positions, dim, margin, iou, backend = arguments
    return implementations.boxes(
        "box_loss_backward", tensors, tensors[2], project, positions, dim, [margin, iou], backend
    )


def _box_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, positions, dim, margin, iou, ctx.backend = inputs
    implementations.save_for_backward(ctx, *tensors)
    ctx.rest = positions, dim, margin, iou


def _box_loss_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        gradient = box_loss_backward(*grads, *ctx.saved_tensors, *ctx.rest, None)
    else:
        gradient = torch.ops.dflkern.box_loss_backward(
            *grads, *ctx.saved_tensors, *ctx.rest, ctx.backend
        )
    return gradient, *(None,) * 11


_register("box_loss", _box_loss, _box_loss_fake)
_register(
    "box_loss_backward",
    box_loss_backward,
    lambda grad_iou, grad_dfl, logits, *rest: torch.empty_like(logits),
)
_register_autograd("box_loss", _box_loss_setup, _box_loss_autograd)
