"""Which kernels serve a call: `why_not`, `choose`, `report`, and the user's `use_backend`."""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from .checks import check_choice
from .problem import Problem

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
DESCRIPTIONS = {
    "reference": "plain PyTorch operations, on every device",
    "cpu": "C++ kernels for CPUs",
    "triton": "Triton kernels for GPUs",
    "cuda": "CUDA C++ kernels for NVIDIA GPUs",
}

P = ParamSpec("P")
R = TypeVar("R")

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("dflkern_backend", default="auto")
# What the open `with` blocks return to, the innermost last
_outer: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "dflkern_outer", default=()
)


class use_backend:  # noqa: N801  (reads as a function, and is one to its users)
    """Choose the backend of the calls that follow: a function, a context manager or a decorator.

    `use_backend("triton")` holds from here on, in this thread and the tasks started from it;
    `with use_backend("triton"):` holds inside the block, and `@use_backend("triton")` inside the
    calls of a function. A backward pass runs on the backend that its forward was asked for.

    Args:
        name: "auto" takes the first backend that can serve a call; "reference", "cpu", "triton" and
            "cuda" insist, and a call that they cannot serve raises a RuntimeError with the reasons.

    Raises:
        ValueError: for an unknown name.
        TypeError: when it decorates a coroutine function or a generator function.
    """

    def __init__(self, name: str) -> None:
        check_choice("use_backend", "name", name, NAMES)
        self._name = name
        self._before: str | None = requested()  # until a block or a decorated function takes over
        _requested.set(name)

    def _take_over(self) -> str:
        """The backend to return to when a block ends."""
        before, self._before = self._before, None
        return requested() if before is None else before

    def __enter__(self) -> use_backend:
        _outer.set((*_outer.get(), self._take_over()))
        _requested.set(self._name)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        *outer, before = _outer.get()
        _outer.set(tuple(outer))
        _requested.set(before)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function."""
        _requested.set(self._take_over())
        for kind in (
            inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction,
        ):  # fmt: skip
            if kind(function):
                raise TypeError(
                    f"use_backend: {function.__qualname__} is a coroutine or a generator function, "
                    "whose body runs after the call has returned. Write "
                    f'`with use_backend("{self._name}"):` inside it.'
                )

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> R:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return decorated


def requested() -> str:
    """The name last given to `use_backend` in this context."""
    return _requested.get()


class Choice(NamedTuple):
    """The backend that serves a call, and why each preferred one does not."""

    backend: str
    refusals: tuple[tuple[str, tuple[str, ...]], ...]


def unavailable(backend: str) -> list[str]:
    """Why a backend can serve nothing on this machine, as far as is known without a build."""
    if backend == "triton":
        return _without_triton()
    if backend == "cpu":
        from . import native

        return native.refusals()
    if backend == "cuda":
        from . import cuda_library

        return cuda_library.refusals()
    return []


def _without_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (pip install triton; there are builds for Linux)"]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return ["Triton is installed, but its kernels need a GPU, and none is visible"]
    return []


def preference(problem: Problem) -> tuple[str, ...]:
    """The backends that "auto" tries, the better ones for a problem first."""
    if problem.device.type != "cuda":
        return ("cpu", "reference") if problem.device.type == "cpu" else ("reference",)
    from .kernels import prefers_triton

    if prefers_triton(problem):
        return ("triton", "cuda", "reference")
    return ("cuda", "triton", "reference")


def why_not(backend: str, op: str, problem: Problem) -> list[str]:
    """Why a backend cannot serve op on problem; empty if it can."""
    if backend == "reference":
        return []
    reasons = unavailable(backend)
    if reasons:
        return reasons
    if backend == "cpu" and problem.device.type != "cpu":
        return [f"the logits are on {problem.device}"]
    if backend == "cuda":
        from . import cuda_library
        from .kernels import beyond_grid

        return cuda_library.why_not(problem.device) + beyond_grid(problem)
    if backend == "triton":
        from .kernels import launch

        return launch.why_not(problem)
    return []


def _refusals(backend: str, op: str, problem: Problem) -> list[str]:
    """`why_not`, after loading the library, which the first call on a CPU builds."""
    if backend == problem.device.type == "cpu":
        from . import native

        native.load()
    if backend == problem.device.type == "cuda":
        from . import cuda_library

        cuda_library.load()
    return why_not(backend, op, problem)


@functools.lru_cache(maxsize=4096)
def choose(op: str, problem: Problem, name: str) -> Choice:
    """The backend for op on problem, given the requested name.

    Raises:
        RuntimeError: if a backend other than "auto" was asked for and cannot serve the call.
    """
    if name != "auto":
        reasons = _refusals(name, op, problem)
        if reasons:
            raise RuntimeError(
                f'{op}: the backend "{name}" was asked for and cannot serve this call: '
                f'{"; ".join(reasons)}. The call: {summary(problem)}. use_backend("auto") takes '
                "the best backend that can."
            )
        return Choice(name, ())
    refusals: list[tuple[str, tuple[str, ...]]] = []
    for backend in preference(problem):
        reasons = _refusals(backend, op, problem)
        if not reasons:
            return Choice(backend, tuple(refusals))
        refusals.append((backend, tuple(reasons)))
    raise AssertionError("the reference serves every call")


def summary(problem: Problem) -> str:
    """One line on a problem."""
    axes = " × ".join(f"{axis.size} (stride {axis.logits})" for axis in problem.axes) or "1"
    dtype = str(problem.dtype).removeprefix("torch.")
    line = (
        f"{problem.count} distributions of {problem.num_bins} bins, {dtype} on {problem.device}, "
        f"{problem.layout} layout: {axes}, bins with stride {problem.bin_stride}"
    )
    if problem.copied:
        line += "; the logits are copied, since more than three of their axes cannot be merged"
    return line


def report(op: str, problem: Problem, name: str) -> str:
    """What `explain` prints."""
    lines = [f"{op}: {summary(problem)}"]
    backends = preference(problem) if name == "auto" else (name,)
    chosen = False
    for backend in backends:
        reasons = why_not(backend, op, problem)
        if reasons:
            lines.append(f"  {backend}: no, {'; '.join(reasons)}")
        elif chosen:
            lines.append(f"  {backend}: could serve it{_second(backend)}")
        else:
            chosen = True
            lines.append(f"  {backend}: serves it ({DESCRIPTIONS[backend]}{state(backend)})")
            lines += _plans(op, problem, backend)
    if not chosen:
        lines.append('  the call would raise; use_backend("auto") takes a backend that can serve')
    return "\n".join(lines)


def state(backend: str) -> str:
    """Where a backend's library is, if it has one of its own, after a comma."""
    if backend not in ("cpu", "cuda"):
        return ""
    from . import cuda_library, native

    library = native if backend == "cpu" else cuda_library
    return f", {library.describe()}"


def _second(backend: str) -> str:
    if backend != "cuda":
        return ""
    return ", with more instructions than Triton for this number of bins and these strides"


def _plans(op: str, problem: Problem, backend: str) -> list[str]:
    if backend not in ("triton", "cuda") or not problem.count:
        return []
    from .kernels import plan, steps

    lines = []
    for direction, name in (("forward", op), ("backward", f"{op}_backward")):
        launches = [plan(step, problem, backend) for step in steps(name)]
        words = [f"{one.kernel}, grid {one.grid}, block {one.block[0]}" for one in launches]
        lines.append(f"    {direction}: {', then '.join(words)}")
    return lines
