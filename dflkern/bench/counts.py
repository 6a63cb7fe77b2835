"""What a call launches and keeps: kernels by torch.profiler, bytes by saved-tensor hooks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .contenders import Function
from .timing import Work

KERNELS = (
    "torch.profiler's events of aten and dflkern that do work and have no such event inside; views "
    "and allocations are no work; on CUDA, the kernels, copies and fills that ran there"
)
SAVED = "bytes of the storages that the graph keeps, beyond that of the logits"
_NO_WORK = frozenset(
    f"aten::{name}"
    for name in (
        "_has_compatible_shallow_copy_type", "_nnpack_available", "_reshape_alias", "_unsafe_view",
        "alias", "as_strided", "as_strided_", "chunk", "contiguous", "detach", "detach_", "empty",
        "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_nonzero",
        "lift_fresh", "mT", "movedim", "narrow", "new_empty", "new_empty_strided", "numpy_T",
        "permute", "reshape", "resize_", "resize_as_", "resolve_conj", "resolve_neg",
        "result_type", "select", "set_", "slice", "split", "squeeze", "squeeze_", "stride", "t",
        "to", "transpose", "unbind", "unflatten", "unsqueeze", "unsqueeze_", "view", "view_as",
    )
)  # fmt: skip


def count_kernels(work: Work, device: str) -> int:
    """How many kernels one call launches."""
    cuda = torch.device(device).type == "cuda"
    os.environ["KINETO_LOG_LEVEL"] = "6"  # silence; Ultralytics sets a level that lets lines out
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with work.context():
        state = () if work.prepare is None else (work.prepare(),)
        with profile(activities=activities) as profiler:
            work.call(*state)
            if cuda:
                torch.cuda.synchronize(device)
    events: Any = profiler.events()
    if cuda:
        return sum(event.device_type.name == "CUDA" for event in events)
    return sum(_leaves(event) for event in events if event.cpu_parent is None)


def _leaves(event: Any) -> int:
    """Working events under this one that contain no other; 1 for itself if there is none."""
    inside = sum(_leaves(child) for child in event.cpu_children)
    works = event.name.startswith(("aten::", "dflkern::")) and event.name not in _NO_WORK
    return inside or int(works)


def saved_bytes(function: Function, leaf: Tensor) -> int:
    """What a forward call keeps for its backward, in bytes, beyond the logits."""
    leaf = leaf.detach().clone().requires_grad_()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(leaf)  # alive until the end, so that no address is used twice
    storages.pop(leaf.untyped_storage().data_ptr(), None)
    del results
    return sum(storages.values())
