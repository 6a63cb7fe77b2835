"""The positions of the bins as a tensor, made once for all calls with the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .modes import is_transformed

Made = TypeVar("Made")


def resolve(
    project: Tensor | None,
    positions: Sequence[float] | None,
    dtype: torch.dtype,
    logits: Tensor,
) -> Tensor | None:
    """The bins' positions, contiguous in a compute dtype; None for 0, 1, …, K − 1.

    Dispatch modes alone do not matter: torch.compile records a CUDA graph under one, in which
    nothing can be copied to the device.
    """
    if project is not None:
        return project.to(dtype).contiguous()
    if positions is None:
        return None
    if type(logits) is not Tensor or is_transformed() or torch._C._is_tracing():
        # The tensor belongs to whoever observes the call
        return torch.tensor(positions, dtype=dtype, device=logits.device)
    return cached(tuple(positions), dtype, logits.device)


@functools.lru_cache(maxsize=64)
def cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers that any later call may use."""
    words = "the project given as numbers", "pass project as a tensor"
    make = functools.partial(torch.tensor, values, dtype=dtype, device=device)
    return outside_modes(make, device, words)


def outside_modes(make: Callable[[], Made], device: torch.device, words: tuple[str, str]) -> Made:
    """What `make` returns, made in no mode of the caller, so that later calls may use it.

    Modes (inference, FakeTensorMode, a memory pool of torch.compile's CUDA graphs) hold for a
    thread, so it is made in a thread of its own.

    Args:
        make: makes tensors.
        device: where they are.
        words: what they are, and what else a caller who captures a CUDA graph can do.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        what, way = words
        raise RuntimeError(
            f"dflkern: {what} is not on the device yet, and it cannot be copied there while a CUDA "
            f"graph is being captured. Run the call once before the capture, or {way}."
        )
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()
