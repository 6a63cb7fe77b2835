"""The one registration file: schemas, implementations, fakes and autograd of every operator.

The operators live in the namespace `dflkern` (torch.ops.dflkern.*) and are private: call the functions
of `dflkern` instead. They return unreduced results in the compute dtype, contiguous, and gradients in
the logits' dtype with the strides of torch.empty_like(logits). The backend is a string argument, so
that a backward pass, which runs in another thread on CUDA, and a compiled graph see what the caller
asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .problem import compute_dtype, describe_tensor

DISTRIBUTION_OPS = ("dfl_loss", "dfl_decode", "dfl_loss_and_decode")

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

_library = torch.library.Library("dflkern", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# --- what the implementations share -------------------------------------------------------------


def resolve_project(
    project: Tensor | None, positions: Sequence[float] | None, logits: Tensor
) -> Tensor | None:
    """The bins' positions in the compute dtype, contiguous; None for 0, 1, …, K − 1."""
    dtype = compute_dtype(logits.dtype)
    if project is not None:
        return project.to(dtype).contiguous()
    if positions is not None:
        return _positions_on(tuple(positions), dtype, logits.device)
    return None


@functools.lru_cache(maxsize=64)
def _positions_on(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _like_logits(gradient: Tensor, logits: Tensor) -> Tensor:
    result = torch.empty_like(logits)
    if gradient.stride() == result.stride():
        return gradient
    return result.copy_(gradient)


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


def _run(op: str, name: str, grads: dict[str, Tensor], arguments: Sequence[Any]) -> Any:
    """Run `name`, which is op or its backward, on the backend that serves it."""
    logits, target, project, positions, dim, margin, backend = _split(op, arguments)
    with _without_autocast(logits.device):
        w = resolve_project(project, positions, logits)
        problem = describe_tensor(logits, dim, margin=margin, project=w is not None)
        choice = backends.choose(name, problem, backend)
        dtype = problem.compute_dtype
        small = {key: value.to(dtype) for key, value in grads.items()}
        if target is not None:
            small["target"] = target.to(dtype)
        if choice.backend == "reference":
            if target is not None:
                small["margin"] = margin
            return getattr(reference, name)(logits=logits, project=w, dim=dim, **small)
        from .kernels import launch

        return launch.run(name, problem, choice.backend, logits, dim, small, w)


def _register_distribution_op(op: str) -> None:
    outputs = 2 if op == "dfl_loss_and_decode" else 1
    names = [name for name in ("loss", "position") if _has_output(op, name)]

    def forward(*arguments: Any) -> Any:
        result = _run(op, op, {}, arguments)
        if outputs == 1:
            return result.contiguous()
        return tuple(value.contiguous() for value in result)

    def forward_fake(*arguments: Any) -> Any:
        logits, dim = arguments[0], _split(op, arguments)[4]
        empty = [_empty_outputs(logits, dim) for _ in range(outputs)]
        return empty[0] if outputs == 1 else tuple(empty)

    def backward(*arguments: Any) -> Tensor:
        grads = {f"grad_{name}": arguments[i] for i, name in enumerate(names)}
        gradient: Tensor = _run(op, f"{op}_backward", grads, arguments[outputs:])
        return _like_logits(gradient, arguments[outputs])

    def backward_fake(*arguments: Any) -> Tensor:
        return torch.empty_like(arguments[outputs])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, project, *ctx.rest = _split(op, inputs)
        ctx.save_for_backward(logits, target, project)
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = 5 if op == "dfl_decode" else 7
        given = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
        if not given:
            return (None,) * count
        return _gradient(given, *ctx.saved_tensors, *ctx.rest), *(None,) * (count - 1)

    _register(op, forward, forward_fake)
    _register(f"{op}_backward", backward, backward_fake)
    torch.library.register_autograd(
        f"dflkern::{op}", autograd, setup_context=setup_context, lib=_library
    )


def _has_output(op: str, name: str) -> bool:
    return name in op or (name == "position" and "decode" in op)


def _gradient(
    grads: dict[str, Tensor],
    logits: Tensor,
    target: Tensor | None,
    project: Tensor | None,
    positions: Sequence[float] | None,
    dim: int,
    margin: float,
    backend: str,
) -> Tensor:
    """The gradient of the logits for the upstream gradients that are there."""
    op = {
        ("loss",): "dfl_loss",
        ("position",): "dfl_decode",
        ("loss", "position"): "dfl_loss_and_decode",
    }[tuple(grads)]
    if torch.is_grad_enabled():  # create_graph: the gradient must be differentiable in turn
        dtype = compute_dtype(logits.dtype)
        small: dict[str, Any] = {f"grad_{name}": grad.to(dtype) for name, grad in grads.items()}
        if op != "dfl_decode":
            assert target is not None
            small |= {"target": target.to(dtype), "margin": margin}
        with _without_autocast(logits.device):
            w = resolve_project(project, positions, logits)
            differentiable = getattr(reference, f"{op}_backward")
            result: Tensor = differentiable(logits=logits, project=w, dim=dim, **small)
            return result
    arguments = [*grads.values(), logits, project, positions, dim, backend]
    if op != "dfl_decode":
        arguments = [*grads.values(), logits, target, project, positions, dim, margin, backend]
    gradient: Tensor = getattr(torch.ops.dflkern, f"{op}_backward")(*arguments)
    return gradient


# --- operators on boxes -------------------------------------------------------------------------


def _check_backend(op: str, logits: Tensor, dim: int, backend: str) -> None:
    backends.choose(op, describe_tensor(logits, dim), backend)


def _decode_boxes(
    logits: Tensor,
    anchor_points: Tensor,
    stride: Tensor | None,
    project: Tensor | None,
    positions: Sequence[float] | None,
    dim: int,
    box_format: str,
    backend: str,
) -> Tensor:
    _check_backend("decode_boxes", logits, dim, backend)
    with _without_autocast(logits.device):
        w = resolve_project(project, positions, logits)
        return reference.decode_boxes(logits, anchor_points, stride, w, dim, box_format)


def _decode_boxes_fake(
    logits: Tensor, anchor_points: Tensor, stride: Tensor | None, *rest: Any
) -> Tensor:
    return _empty_outputs(logits, rest[2])


def _decode_boxes_backward(
    grad_boxes: Tensor,
    logits: Tensor,
    stride: Tensor | None,
    project: Tensor | None,
    positions: Sequence[float] | None,
    dim: int,
    box_format: str,
    backend: str,
) -> Tensor:
    _check_backend("decode_boxes_backward", logits, dim, backend)
    with _without_autocast(logits.device):
        w = resolve_project(project, positions, logits)
        gradient = reference.decode_boxes_backward(grad_boxes, logits, stride, w, dim, box_format)
        return _like_logits(gradient, logits)


def _decode_boxes_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, stride, project, *ctx.rest = inputs
    ctx.save_for_backward(logits, stride, project)


def _decode_boxes_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, stride, project = ctx.saved_tensors
    positions, dim, box_format, backend = ctx.rest
    if torch.is_grad_enabled():
        with _without_autocast(logits.device):
            w = resolve_project(project, positions, logits)
            gradient = reference.decode_boxes_backward(grad, logits, stride, w, dim, box_format)
    else:
        gradient = torch.ops.dflkern.decode_boxes_backward(
            grad, logits, stride, project, positions, dim, box_format, backend
        )
    return gradient, *(None,) * 7


def _box_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, project, positions, dim, margin, iou, backend = arguments
    logits = tensors[0]
    _check_backend("box_loss", logits, dim, backend)
    with _without_autocast(logits.device):
        w = resolve_project(project, positions, logits)
        return reference.box_loss(*tensors, w, dim, margin, iou)


def _box_loss_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scalar = functools.partial(logits.new_empty, (), dtype=compute_dtype(logits.dtype))
    return scalar(), scalar()


def _box_loss_backward(*arguments: Any) -> Tensor:
    *tensors, project, positions, dim, margin, iou, backend = arguments
    logits = tensors[2]
    _check_backend("box_loss_backward", logits, dim, backend)
    with _without_autocast(logits.device):
        w = resolve_project(project, positions, logits)
        return _like_logits(reference.box_loss_backward(*tensors, w, dim, margin, iou), logits)


def _box_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.positions, ctx.dim, ctx.margin, ctx.iou, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _box_loss_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, project = ctx.saved_tensors
    if torch.is_grad_enabled():
        logits = tensors[0]
        with _without_autocast(logits.device):
            w = resolve_project(project, ctx.positions, logits)
            gradient = reference.box_loss_backward(
                *grads, *tensors, w, ctx.dim, ctx.margin, ctx.iou, create_graph=True
            )
    else:
        gradient = torch.ops.dflkern.box_loss_backward(
            *grads, *tensors, project, ctx.positions, ctx.dim, ctx.margin, ctx.iou, ctx.backend
        )
    return gradient, *(None,) * 11


# --- registration -------------------------------------------------------------------------------


def _register(op: str, implementation: Any, fake: Any) -> None:
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dflkern::{op}", fake, lib=_library)


for _op in DISTRIBUTION_OPS:
    _register_distribution_op(_op)

_register("decode_boxes", _decode_boxes, _decode_boxes_fake)
_register(
    "decode_boxes_backward",
    _decode_boxes_backward,
    lambda grad_boxes, logits, *rest: torch.empty_like(logits),
)
torch.library.register_autograd(
    "dflkern::decode_boxes",
    _decode_boxes_autograd,
    setup_context=_decode_boxes_setup,
    lib=_library,
)

_register("box_loss", _box_loss, _box_loss_fake)
_register(
    "box_loss_backward",
    _box_loss_backward,
    lambda grad_iou, grad_dfl, logits, *rest: torch.empty_like(logits),
)
torch.library.register_autograd(
    "dflkern::box_loss", _box_loss_autograd, setup_context=_box_loss_setup, lib=_library
)
