"""Who looks at the operations of a call: nobody, or one of PyTorch's modes and transforms."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import CInterpreter
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FAST_PATH = True  # tests of the registered operators turn it off


def is_plain(logits: Tensor) -> bool:
    """Whether nobody looks at a call on these logits, which may bypass the registered operator."""
    return (
        not torch.compiler.is_compiling()
        and FAST_PATH
        and type(logits) is Tensor
        and not is_in_torch_dispatch_mode()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_observed() -> bool:
    """Whether a dispatch mode, torch.jit.trace or a transform sees the operations of a call."""
    return (
        is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_transformed()
    )


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work.

    Both need the derivative of every operation of a call, which the reference has.
    """
    # By its type, since torch.compile traces this line and cannot compare it with None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or isinstance(interpreter, CInterpreter)


def needs_plain_operations() -> bool:
    """Whether PyTorch's own operations are wanted: by a transform, an exporter or torch.jit.trace.

    Exporters, and the runtimes that match patterns in what they write, know no others.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_transformed()
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, at no cost where it is off already, or where there is none."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
