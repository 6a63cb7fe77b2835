"""Running launch plans: which devices Triton can serve, preparation, and the launches."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .launch_plan import LaunchPlan, steps
from .plans import plan


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
    return not hasattr(_kernel("columns", "columns_forward_kernel"), "cache_key")


def kernel_of(launch_plan: LaunchPlan) -> Any:
    """The Triton kernel of a plan; the first one imports Triton."""
    return _kernel(launch_plan.module, launch_plan.kernel)


@functools.cache
def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f".triton.{module}", __package__), name)


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
    if launch_plan.backend == "cuda":
        _launch_cuda(launch_plan, tensors)
    else:
        _launch_triton(launch_plan, tensors)


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


def _launch_triton(launch_plan: LaunchPlan, tensors: dict[str, Tensor]) -> None:
    kernel = kernel_of(launch_plan)
    arguments: dict[str, Any] = {
        argument.name: tensors[argument.value]
        if isinstance(argument.value, str)
        else argument.value
        for argument in launch_plan.arguments
    }
    arguments |= dict(launch_plan.constants)
    device = next(iter(tensors.values())).device
    if device.type == "cpu":
        kernel[launch_plan.grid](**arguments)
        return
    with torch.cuda.device(device):
        _warm_up(launch_plan, device)
        kernel[launch_plan.grid](
            **arguments, num_warps=launch_plan.num_warps, enable_fp_fusion=False
        )


_warm: set[tuple[Any, ...]] = set()


def _warm_up(launch_plan: LaunchPlan, device: torch.device) -> None:
    """A kernel cannot be compiled while a CUDA graph is being captured: say so."""
    signature = tuple((a.name, a.type, a.divisible) for a in launch_plan.arguments)
    key = (device.index, launch_plan.kernel, launch_plan.constants, signature)
    if key in _warm:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{launch_plan.op}: the kernel for this call is not compiled yet, and it cannot be "
            "compiled while a CUDA graph is being captured. Run the call once before the capture."
        )
    _warm.add(key)
