"""Which backend serves a call: decided here, once for each kind of call, and explained here."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..cpu import library as cpu_library
from ..gpu import beyond_grid, launch, plan, prefers_triton, steps
from ..gpu.cuda import loading as cuda
from ..gpu.launch_plan import GRID_LIMIT
from ..problem import Problem
from .requests import requested as requested
from .requests import use_backend as use_backend
from .table import Operator

DESCRIPTIONS = {
    "reference": "plain PyTorch operations, on every device",
    "cpu": "C++ kernels for CPUs",
    "triton": "Triton kernels for GPUs",
    "cuda": "CUDA C++ kernels for NVIDIA GPUs",
}


class Kind(NamedTuple):
    """All that the choice depends on: no sizes, which change from step to step.

    `kernels` are the backends that have kernels of the operator, `limits` those of them that cannot
    serve its settings, and why. `prefers_triton` sums up the number of bins and their stride. It
    and `beyond_grid` have one value on CPUs.
    """

    device: torch.device
    kernels: tuple[str, ...]
    prefers_triton: bool = False
    beyond_grid: tuple[str, ...] = ()
    limits: tuple[tuple[str, str], ...] = ()


class Choice(NamedTuple):
    """The backend that serves a kind of call, or None, and why each preferred one does not."""

    backend: str | None
    refusals: tuple[tuple[str, tuple[str, ...]], ...]


def decide(op: Operator, arguments: Mapping[str, Any]) -> str:
    """The backend that serves a call.

    Raises:
        RuntimeError: if a backend other than "auto" was asked for and cannot serve the call.
    """
    name, main = arguments["backend"], arguments[op.main]
    if main.is_cpu and name in ("auto", "cpu", "reference"):
        choice = _choose_on_cpu(op.kernels, name)
    elif op.problem is not None and not _may_be_beyond_grid(op, main):
        dim = arguments["dim"]
        limits = tuple(op.limits(arguments).items()) if op.limits is not None else ()
        key = op, name, main.device, main.shape[dim], main.stride(dim) == 1, limits
        found = _choices.get(key)
        if found is None:
            found = _choices[key] = choose(kind_of(op, arguments), name)
        choice = found
    else:
        choice = choose(kind_of(op, arguments), name)
    if choice.backend is not None:
        return choice.backend
    reasons = "; ".join(reason for _, found in choice.refusals for reason in found)
    raise RuntimeError(
        f'{op.name}: the backend "{name}" was asked for and cannot serve this call: {reasons}. The '
        f'call: {summary(op, arguments)}. use_backend("auto") takes the best backend that can.'
    )


_choices: dict[tuple[Any, ...], Choice] = {}


def _may_be_beyond_grid(op: Operator, main: torch.Tensor) -> bool:
    """Whether the sizes have to be looked at: two long axes, or of boxes many images."""
    return main.numel() >= 1 << 32 if op.rows else main.shape[0] > GRID_LIMIT


def kind_of(op: Operator, arguments: Mapping[str, Any]) -> Kind:
    """The kind of a call."""
    main = arguments[op.main]
    limits = tuple(op.limits(arguments).items()) if op.limits is not None else ()
    if op.problem is None or main.device.type != "cuda":
        return Kind(main.device, op.kernels, limits=limits)
    dim = arguments["dim"]
    prefers = prefers_triton(main.shape[dim], main.stride(dim) == 1)
    beyond = beyond_grid(op.problem(arguments)) if _may_be_beyond_grid(op, main) else ()
    return Kind(main.device, op.kernels, prefers, tuple(beyond), limits)


@functools.cache
def choose(kind: Kind, name: str) -> Choice:
    """The choice for a kind of call, given the requested name; the first call loads libraries."""
    refusals: list[tuple[str, tuple[str, ...]]] = []
    for backend in preference(kind) if name == "auto" else (name,):
        if backend == kind.device.type == "cpu" and backend in kind.kernels:
            cpu_library.load()
        reasons = why_not(backend, kind)
        if not reasons:
            return Choice(backend, tuple(refusals))
        refusals.append((backend, tuple(reasons)))
    return Choice(None, tuple(refusals))


@functools.cache
def _choose_on_cpu(kernels: tuple[str, ...], name: str) -> Choice:
    return choose(Kind(torch.device("cpu"), kernels), name)


def forget() -> None:
    """Decide anew, after what the choices depend on has changed."""
    choose.cache_clear()
    _choices.clear()
    _choose_on_cpu.cache_clear()


def preference(kind: Kind) -> tuple[str, ...]:
    """The backends that "auto" tries, the better ones for a kind of call first."""
    if kind.device.type != "cuda":
        return ("cpu", "reference") if kind.device.type == "cpu" else ("reference",)
    if kind.prefers_triton:
        return ("triton", "cuda", "reference")
    return ("cuda", "triton", "reference")


def unavailable(backend: str) -> list[str]:
    """Why a backend can serve nothing on this machine, as far as is known without a build."""
    if backend == "triton":
        return _without_triton()
    if backend == "cpu":
        return cpu_library.refusals()
    return cuda.refusals() if backend == "cuda" else []


def _without_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (pip install triton; there are builds for Linux)"]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return ["Triton is installed, but its kernels need a GPU, and none is visible"]
    return []


def why_not(backend: str, kind: Kind) -> list[str]:
    """Why a backend cannot serve a kind of call; empty if it can."""
    reasons = unavailable(backend)
    if reasons or backend == "reference":
        return reasons
    if backend not in kind.kernels:
        return ["it has no kernel of this operator"]
    if backend == "cpu":
        return [] if kind.device.type == "cpu" else [f"the logits are on {kind.device}"]
    limits = [reason for limited, reason in kind.limits if limited == backend]
    device = cuda.why_not if backend == "cuda" else launch.why_not
    return [*device(kind.device), *limits, *kind.beyond_grid]


def summary(op: Operator, arguments: Mapping[str, Any]) -> str:
    """One line on a call."""
    main = arguments[op.main]
    dtype = str(main.dtype).removeprefix("torch.")
    if op.problem is None:
        return f"{op.main} of shape {tuple(main.shape)}, {dtype} on {main.device}"
    problem = op.problem(arguments)
    axes = " × ".join(f"{axis.size} (stride {axis.logits})" for axis in problem.axes) or "1"
    line = (
        f"{problem.count} distributions of {problem.num_bins} bins, {dtype} on {problem.device}, "
        f"{problem.layout} layout: {axes}, bins with stride {problem.bin_stride}"
    )
    if problem.copied:
        line += "; the logits are copied, since more than three of their axes cannot be merged"
    return line


def report(op: Operator, arguments: Mapping[str, Any], name: str) -> str:
    """What `explain` prints."""
    lines = [f"{op.name}: {summary(op, arguments)}"]
    kind = kind_of(op, arguments)
    backends = preference(kind) if name == "auto" else (name,)
    chosen = False
    for backend in backends:
        reasons = why_not(backend, kind)
        if reasons:
            lines.append(f"  {backend}: no, {'; '.join(reasons)}")
        elif chosen:
            lines.append(f"  {backend}: could serve it{_second(backend)}")
        else:
            chosen = True
            lines.append(f"  {backend}: serves it ({DESCRIPTIONS[backend]}{state(backend)})")
            if op.problem is not None:
                lines += _plans(op, op.problem(arguments), backend)
    if not chosen:
        lines.append('  the call would raise; use_backend("auto") takes a backend that can serve')
    return "\n".join(lines)


def state(backend: str) -> str:
    """Where a backend's library is, if it has one of its own, after a comma."""
    if backend not in ("cpu", "cuda"):
        return ""
    return f", {cpu_library.describe() if backend == 'cpu' else cuda.describe()}"


def _second(backend: str) -> str:
    if backend != "cuda":
        return ""
    return ", with more instructions than Triton for this number of bins and these strides"


def _plans(op: Operator, problem: Problem, backend: str) -> list[str]:
    if backend not in ("triton", "cuda") or not problem.count:
        return []
    lines = []
    for direction, each in (("forward", op), ("backward", op.gradient)):
        assert each is not None
        reduction = problem.beside.reduction if backend == "triton" else "none"
        launches = [plan(step, problem, backend) for step in steps(each.name, reduction)]
        words = [f"{one.kernel}, grid {one.grid}, block {one.block[0]}" for one in launches]
        lines.append(f"    {direction}: {', then '.join(words)}")
    return lines
