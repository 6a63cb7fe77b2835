"""The positions of the bins as a tensor, made once for all calls with the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .modes import is_observed


def resolve(
    project: Tensor | None,
    positions: Sequence[float] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """The bins' positions, contiguous in a compute dtype; None for 0, 1, …, K − 1."""
    if project is not None:
        return project.to(dtype).contiguous()
    if positions is None:
        return None
    if is_observed():  # the tensor belongs to whoever observes
        return torch.tensor(positions, dtype=dtype, device=device)
    return cached(tuple(positions), dtype, device)


@functools.lru_cache(maxsize=64)
def cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
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
