"""Which kernels serve a call: `why_not`, `choose`, `report`, and the user's `use_backend`."""

from __future__ import annotations

import contextvars
import functools
import importlib.util
from types import TracebackType
from typing import NamedTuple

from .checks import check_choice
from .problem import Problem

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
DESCRIPTIONS = {
    "reference": "plain PyTorch operations, on every device",
    "cpu": "C++ kernels for CPUs",
    "triton": "Triton kernels for GPUs",
    "cuda": "CUDA C++ kernels for NVIDIA GPUs",
}

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("dflkern_backend", default="auto")


class use_backend:  # noqa: N801  (reads as a function, and is one to its users)
    """Choose the backend of the calls that follow: a function, or a context manager.

    `use_backend("triton")` holds from here on, in this thread and the tasks started from it;
    `with use_backend("triton"):` holds inside the block. A backward pass runs on the backend that
    its forward was asked for.

    Args:
        name: "auto" takes the first backend that can serve a call; "reference", "cpu", "triton" and
            "cuda" insist, and a call that they cannot serve raises a RuntimeError with the reasons.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str) -> None:
        check_choice("use_backend", "name", name, NAMES)
        self._token = _requested.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _requested.reset(self._token)


def requested() -> str:
    """The name last given to `use_backend` in this context."""
    return _requested.get()


class Choice(NamedTuple):
    """The backend that serves a call, and why each preferred one does not."""

    backend: str
    refusals: tuple[tuple[str, tuple[str, ...]], ...]


def unavailable(backend: str) -> list[str]:
    """Why a backend can serve nothing on this machine, as far as is known without a build."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (pip install triton; there are builds for Linux)"]
    if backend == "cpu":
        from . import native

        return native.refusals()
    if backend == "cuda":
        from . import cuda_library

        return cuda_library.refusals()
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
    reasons = why_not(backend, op, problem)
    if backend == "cpu" and not reasons:
        from . import native

        native.load()
        return native.refusals()
    if backend == "cuda" and not reasons:
        from . import cuda_library

        cuda_library.load()
        return cuda_library.refusals()
    return reasons


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
