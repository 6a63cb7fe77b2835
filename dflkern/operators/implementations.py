"""What an operator does on each backend.

Results are contiguous in the compute dtype; a gradient has the dtype of the logits and the strides
of torch.empty_like(logits).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import operators as cpu
from ..gpu import launch
from ..problem import Problem, compute_dtype
from ..reference import reductions
from . import backends, positions
from .modes import without_autocast
from .table import Arguments, Operator

Run = Callable[[Operator, Arguments], Any]


def compute(op: Operator, arguments: Arguments) -> Any:
    """The results of an operator, or the gradient, on the backend that serves the call."""
    return RUNS[backends.decide(op, arguments)](op, arguments)


def on_cpu(op: Operator, arguments: Arguments) -> Any:
    """The results of the C++ kernels, which know no autocast."""
    if op.bins and (arguments["project"] is not None or arguments["positions"] is not None):
        arguments = with_project(arguments)
    return cpu.run(op.name, arguments)


def on_triton(op: Operator, arguments: Arguments) -> Any:
    """The results of the Triton kernels, which do all that an operator is asked for."""
    if op.bins and (arguments["project"] is not None or arguments["positions"] is not None):
        arguments = with_project(arguments)
    if op.known_to_gpus is not None:
        arguments = op.known_to_gpus(arguments)
    return _launch("triton", op, arguments)


def on_cuda(op: Operator, arguments: Arguments) -> Any:
    """The results of the CUDA kernels."""
    launched = functools.partial(_launch, "cuda")
    with without_autocast(arguments[op.main].device):
        arguments = with_project(arguments) if op.bins else arguments
        if op.known_to_gpus is not None:
            arguments = op.known_to_gpus(arguments)
        if op.reduced:
            return _reduced(launched, op, arguments)
        return launched(op, arguments)


def on_reference(op: Operator, arguments: Arguments) -> Any:
    """The results of the reference, laid out as those of the kernels."""
    results = differentiable(op, arguments)
    if op.is_gradient:
        return _like(arguments[op.main], results)
    if isinstance(results, Tensor):
        return results.contiguous()
    return tuple(result.contiguous() for result in results)


RUNS: dict[str, Run] = {
    "cpu": on_cpu,
    "reference": on_reference,
    "triton": on_triton,
    "cuda": on_cuda,
}
ON_GPU = (RUNS["triton"], RUNS["cuda"])


def differentiable(op: Operator, arguments: Arguments) -> Any:
    """The results of the reference, in operations of PyTorch that can be differentiated."""
    with without_autocast(arguments[op.main].device):
        return op.evaluate(with_project(arguments) if op.bins else arguments)


def with_project(arguments: Arguments) -> Arguments:
    """The arguments, with the positions of the bins as a tensor if any are given."""
    logits, project = arguments["logits"], arguments["project"]
    dtype = compute_dtype(logits.dtype)
    found = positions.resolve(project, arguments["positions"], dtype, logits)
    return {**arguments, "project": found}


def _reduced(run: Run, op: Operator, arguments: Arguments) -> Any:
    """The results of kernels that know neither weight nor reduction, which PyTorch adds."""
    weight, normalizer = arguments["weight"], arguments["normalizer"]
    reduction, sides = arguments["reduction"], arguments["dim"] - 1
    each = {**arguments, "weight": None, "normalizer": None, "reduction": "none"}
    if op.is_gradient:
        shape = arguments["target"].shape
        each["grad_loss"] = reductions.upstream(
            arguments["grad_loss"], weight, normalizer, reduction, sides, shape
        )
        return run(op, each)
    return reductions.reduce(run(op, each), weight, normalizer, reduction, sides)


def _launch(backend: str, op: Operator, arguments: Arguments) -> Any:
    results, describe = empty_results(op, arguments), op.problem
    assert describe is not None
    tensors = arguments.copy()
    for name, result in zip(op.results, results, strict=True):
        tensors[name] = result
    if not (
        op.rows and backend == "triton" and launch.run_distributions(op.name, tensors, describe)
    ):
        _launch_any(backend, op, describe(arguments), tensors, results)
    return results[0] if len(results) == 1 else tuple(results)


def _launch_any(
    backend: str, op: Operator, problem: Problem, tensors: Arguments, results: list[Tensor]
) -> None:
    if problem.copied:
        tensors[op.main] = tensors[op.main].contiguous()
        if op.is_gradient:
            tensors[op.results[0]] = torch.empty_like(tensors[op.main])
    if problem.count:
        launch.run(op.name, problem, backend, tensors, op.results)
    else:
        for result in results:
            result.zero_()  # sums over nothing; the others have no elements
    if problem.copied and op.is_gradient:
        results[0].copy_(tensors[op.results[0]])


def empty_results(op: Operator, arguments: Arguments) -> list[Tensor]:
    """Memory for what an operator returns."""
    main: Tensor = arguments[op.main]
    if op.is_gradient:
        return [torch.empty_like(main)]
    if op.allocate is not None:
        return list(op.allocate(**arguments))
    assert op.shape is not None
    shape, dtype = op.shape(**arguments), compute_dtype(main.dtype)
    if main.dtype is dtype:
        return [main.new_empty(shape) for _ in op.results]
    return [main.new_empty(shape, dtype=dtype) for _ in op.results]


def _like(main: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of torch.empty_like(main)."""
    result = torch.empty_like(main)
    if gradient.stride() == result.stride():
        return gradient
    return result.copy_(gradient)
