"""Running launch plans: which devices Triton can serve, preparation, and the launches."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .launch_plan import LaunchPlan, Start, steps
from .plans import plan
from .triton import kernel_of


def why_not(device: torch.device) -> list[str]:
    """Why the Triton kernels cannot serve a device; empty if they can."""
    if device.type == "cpu" and not interpreted():
        return [
            "the logits are on the CPU, where Triton runs only in its interpreter "
            "(TRITON_INTERPRET=1, set before the first use, for tests)"
        ]
    if device.type not in ("cpu", "cuda"):
        return [f'there is no Triton for the device type "{device.type}"']
    return []


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not hasattr(kernel_of("columns_forward_kernel"), "cache_key")


def run(
    op: str, problem: Problem, backend: str, tensors: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    """Launch op, which writes its results.

    Args:
        op: the operator's name.
        problem: of these logits; if it says that they are copied, they are the copy.
        backend: "triton" or "cuda".
        tensors: what the operator is given, by role, of any dtype and strides.
        results: memory for what it returns, by role.
    """
    if not problem.count:
        for result in results.values():
            result.zero_()  # sums over nothing; the others have no elements
        return
    launches = [plan(step, problem, backend) for step in steps(op)]
    held = {
        role: value if role in IN_PLACE else _prepared(value, problem.compute_dtype)
        for role, value in tensors.items()
    }
    if len(launches) > 1:  # sums in stages: one part for each program of the first launch
        programs = launches[0].grid[0] * launches[0].grid[1]
        held["partials"] = held["logits"].new_empty((3, programs), dtype=problem.compute_dtype)
    for each in launches:
        launch(each, {**held, **results})


IN_PLACE = ("logits", "weight")  # read where they are, whatever their strides


def _prepared(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == torch.bool:
        return value.contiguous().view(torch.uint8)
    return packed(value.to(dtype))


def packed(value: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, as plans assume of everything but the logits."""
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def launch(launch_plan: LaunchPlan, tensors: dict[str, Tensor]) -> None:
    """Run a plan on tensors by role, on their device and the current stream."""
    device = next(iter(tensors.values())).device
    if launch_plan.backend == "cuda":
        _launch_cuda(launch_plan, tensors)
    elif device.type == "cpu":
        arguments = {
            argument.name: tensors[argument.value]
            if isinstance(argument.value, str)
            else argument.value
            for argument in launch_plan.arguments
        }
        kernel_of(launch_plan.kernel)[launch_plan.grid](**arguments, **dict(launch_plan.constants))
    else:
        with torch.cuda.device(device):
            start = loaded(launch_plan, device.index)
            values = [
                tensors[argument.value].data_ptr()
                if isinstance(argument.value, str)
                else argument.value
                for argument in launch_plan.arguments
            ]
            start(*launch_plan.grid, current_stream(device.index), *values)


def current_stream(device: int) -> int:
    """The handle of PyTorch's current stream, as Triton reads it, too."""
    return torch._C._cuda_getCurrentRawStream(device)


_loaded: dict[tuple[Any, ...], Start] = {}


def loaded(launch_plan: LaunchPlan, device: int) -> Start:
    """The plan's kernel on a device, which is the current one; compiled at the first call."""
    key = (device, launch_plan.signature)
    start = _loaded.get(key)
    if start is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{launch_plan.op}: the kernel for this call is not compiled yet, and it cannot be "
                "compiled while a CUDA graph is being captured. Run the call once before the "
                "capture."
            )
        loading = importlib.import_module(f".{launch_plan.backend}.loading", __package__)
        start = _loaded[key] = loading.load(launch_plan)
    return start


def _launch_cuda(launch_plan: LaunchPlan, tensors: dict[str, Tensor]) -> None:
    """Pointers, the bound of the targets and numbers stand in the kernel's order."""
    names = [argument.name for argument in launch_plan.arguments]
    values = [argument.value for argument in launch_plan.arguments]
    bound = names.index("bound")
    torch.ops.dflkern._cuda_launch(
        launch_plan.kernel,
        launch_plan.grid,
        launch_plan.block[0],
        launch_plan.shared,
        [tensors[role] if isinstance(role, str) else None for role in values[:bound]],
        values[bound + 1 :],
        values[bound],
    )
