"""What the operators do when they are called: the way from an operator to a backend.

Every implementation runs with autocast off, converts targets and upstream gradients to the compute
dtype, and returns gradients with the strides of torch.empty_like(logits).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import CInterpreter
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backends, native, reference
from .box_problem import BoxProblem, describe_boxes
from .checks import IOU_KINDS
from .problem import compute_dtype, describe_tensor, savable

Positions = Sequence[float] | None


def resolve_project(
    project: Tensor | None, positions: Positions, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The bins' positions, contiguous in a compute dtype; None for 0, 1, …, K − 1."""
    if project is not None:
        return project.to(dtype).contiguous()
    if positions is None:
        return None
    if observed():  # the tensor belongs to whoever observes
        return torch.tensor(positions, dtype=dtype, device=device)
    return _cached_positions(tuple(positions), dtype, device)


def observed() -> bool:
    """Whether a dispatch mode, torch.jit.trace or a transform sees the operations of a call."""
    return (
        is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or transformed()
    )


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work.

    Both need the derivative of every operation of a call, which the reference has.
    """
    # By its type, since torch.compile traces this line and cannot compare it with None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or isinstance(interpreter, CInterpreter)


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, which refuses tensors made in inference mode: copies of those."""
    for t in tensors:
        if t is not None and t.is_inference():
            tensors = tuple(None if t is None else savable(t) for t in tensors)
            break
    ctx.save_for_backward(*tensors)


@functools.lru_cache(maxsize=64)
def _cached_positions(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor that any later call may use, whatever the mode of the call that made it.

    Modes (inference, FakeTensorMode, a memory pool of torch.compile's CUDA graphs) hold for a
    thread, so the tensor is made in a thread of its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dflkern: the project given as numbers is not on the device yet, and it cannot be "
            "copied there while a CUDA graph is being captured. Run the call once before the "
            "capture, or pass project as a tensor."
        )
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(torch.tensor, values, dtype=dtype, device=device).result()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, at no cost where it is off already."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def like_logits(gradient: Tensor, logits: Tensor) -> Tensor:
    """The gradient with the strides of torch.empty_like(logits)."""
    result = torch.empty_like(logits)
    if gradient.stride() == result.stride():
        return gradient
    return result.copy_(gradient)


def serves_cpu(logits: Tensor, backend: str) -> bool:
    """Whether the CPU library, which takes any logits, is what was asked for, and there."""
    return (
        backend in ("auto", "cpu")
        and logits.device.type == "cpu"
        and native.load()
        and _traceable()
    )


@functools.cache
def _traceable() -> bool:
    """Let compiled autograd trace the backward of an eager call, which calls the C++ operators."""
    for name, logits in (
        ("dfl_loss_backward", 1), ("dfl_decode_backward", 1), ("dfl_loss_and_decode_backward", 2),
        ("decode_boxes_backward", 1), ("box_loss_backward", 2), ("box_loss_backward_kept", 2),
    ):  # fmt: skip
        torch.library.register_fake(
            f"dflkern::_cpu_{name}",
            lambda *arguments, logits=logits: torch.empty_like(arguments[logits]),
            allow_override=True,
        )
    return True


def distributions(
    op: str,
    grads: dict[str, Tensor],
    logits: Tensor,
    target: Tensor | None,
    project: Tensor | None,
    positions: Positions,
    dim: int,
    margin: float,
    backend: str | None,
) -> Any:
    """One of the operators on single distributions, or the backward of one.

    Args:
        op: the operator's name, with "_backward" for its gradient.
        grads: upstream gradients by the name of their parameter; empty in forward.
        logits: as the operator's, like all that follow.
        target: None for dfl_decode.
        project: a tensor of positions, or None.
        positions: floats, or None.
        dim: counted from the front.
        margin: 0 for dfl_decode.
        backend: what was asked for; None for the bare, differentiable reference.
    """
    with without_autocast(logits.device):
        dtype = compute_dtype(logits.dtype)
        w = resolve_project(project, positions, dtype, logits.device)
        if backend is not None and serves_cpu(logits, backend):
            operator = getattr(torch.ops.dflkern, f"_cpu_{op}")
            if target is None:
                return operator(*grads.values(), logits, w, dim)
            return operator(*grads.values(), logits, target, w, dim, margin)
        small = {name: grad.to(dtype) for name, grad in grads.items()}
        if target is not None:
            small["target"] = target.to(dtype)
        if backend is not None:
            problem = describe_tensor(logits, dim, margin=margin, project=w is not None)
            chosen = backends.choose(op, problem, backend).backend
            if chosen != "reference":
                from .kernels import launch

                return launch.run(op, problem, chosen, logits, dim, small, w)
        function: Callable[..., Any] = getattr(reference, op)
        if target is not None:
            function = functools.partial(function, margin=margin)
        result = function(logits=logits, project=w, dim=dim, **small)
        if backend is None:
            return result
        if grads:
            return like_logits(result, logits)
        if isinstance(result, tuple):
            return tuple(value.contiguous() for value in result)
        return result.contiguous()


_LOSS = ("logits", "anchor_points", "target_boxes", "weight", "normalizer", "foreground")
# What stands before the project in the operators' schemas
BOX_TENSORS = {
    "decode_boxes": ("logits", "anchor_points", "stride"),
    "decode_boxes_backward": ("grad_boxes", "logits", "stride"),
    "box_loss": _LOSS,
    "box_loss_backward": ("grad_iou", "grad_dfl", *_LOSS),
}


def box_problem(
    op: str,
    tensors: Mapping[str, Tensor | None],
    dim: int,
    settings: Sequence[Any],
    *,
    project: bool,
) -> BoxProblem:
    """The BoxProblem of an operator's tensors by role and its settings."""
    logits = tensors["logits"]
    assert logits is not None
    if op.startswith("decode_boxes"):
        stride = tensors["stride"] is not None
        return describe_boxes(logits, dim, project=project, stride=stride, box_format=settings[0])
    margin, iou = settings
    foreground = tensors["foreground"] is not None
    return describe_boxes(
        logits, dim, project=project, margin=margin, iou=iou, foreground=foreground,
        weight=tensors["weight"],
    )  # fmt: skip


def boxes(
    op: str,
    tensors: Sequence[Tensor | None],
    logits: Tensor,
    project: Tensor | None,
    positions: Positions,
    dim: int,
    settings: Sequence[Any],
    backend: str | None,
) -> Any:
    """One of the operators on boxes, or the backward of one.

    Args:
        op: the operator's name, with "_backward" for its gradient.
        tensors: all that stands before the project in its schema.
        logits: the one of the tensors that holds the logits.
        project: a tensor of positions, or None.
        positions: floats, or None.
        dim: 2 or 3.
        settings: what stands between dim and backend in its schema.
        backend: what was asked for; None for the bare, differentiable reference.
    """
    with without_autocast(logits.device):
        w = resolve_project(project, positions, compute_dtype(logits.dtype), logits.device)
        if backend is not None:
            if serves_cpu(logits, backend):
                operator = getattr(torch.ops.dflkern, f"_cpu_{op}")
                return operator(*tensors, w, dim, *_coded(settings))
            named = dict(zip(BOX_TENSORS[op], tensors, strict=True))
            problem = box_problem(op, named, dim, settings, project=w is not None)
            chosen = backends.choose(op, problem, backend).backend
            if chosen != "reference":
                from .kernels import box_launch

                return box_launch.run(op, problem, chosen, {**named, "project": w})
        result = getattr(reference, op)(*tensors, w, dim, *settings)
        backward = op.endswith("_backward")
        return like_logits(result, logits) if backward and backend is not None else result


def _coded(settings: Sequence[Any]) -> list[Any]:
    """Settings of an operator on boxes as the C++ one takes them: words as numbers."""
    if len(settings) == 1:
        return [settings[0] == "xywh"]
    margin, iou = settings
    return [margin, IOU_KINDS.index(iou)]
