"""Running launch plans: which problems Triton can serve, allocation, and the launches."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .plans import LaunchPlan, beyond_grid, plan


def why_not(problem: Problem) -> list[str]:
    """Why the Triton kernels cannot serve a problem on its device; empty if they can."""
    reasons = []
    device = problem.device.type
    if device == "cpu" and not interpreted():
        reasons.append(
            "the logits are on the CPU, where Triton runs only in its interpreter "
            "(TRITON_INTERPRET=1, set before the first use, for tests)"
        )
    elif device not in ("cpu", "cuda"):
        reasons.append(f'there is no Triton for the device type "{device}"')
    return reasons + beyond_grid(problem)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not hasattr(_kernel("columns", "columns_forward_kernel"), "cache_key")


@functools.cache
def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f".{module}", __package__), name)


def run(
    op: str,
    problem: Problem,
    backend: str,
    logits: Tensor,
    dim: int,
    small: dict[str, Tensor],
    project: Tensor | None,
) -> Any:
    """Launch op and return its results.

    Args:
        op: the operator's name.
        problem: of these logits.
        backend: "triton" or "cuda".
        logits: of any strides.
        dim: the axis of the bins, counted from the front.
        small: target and upstream gradients by role, in the compute dtype.
        project: the bins' positions in the compute dtype, or None.

    Returns:
        The loss, the position, both, or the gradient.
    """
    backward = op.endswith("_backward")
    if problem.copied:
        logits = logits.contiguous()
    tensors = {"logits": logits, **{role: packed(value) for role, value in small.items()}}
    if project is not None:
        tensors["project"] = packed(project)
    if backward:
        results = [torch.empty_like(logits)]
        tensors["grad_logits"] = results[0]
    else:
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        roles = [role for role, word in (("loss", "loss"), ("position", "decode")) if word in op]
        results = [logits.new_empty(shape, dtype=problem.compute_dtype) for _ in roles]
        tensors |= dict(zip(roles, results, strict=True))
    if problem.count:
        launch(plan(op, problem, backend), tensors)
    return results[0] if len(results) == 1 else tuple(results)


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
    kernel = _kernel(launch_plan.module, launch_plan.kernel)
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
