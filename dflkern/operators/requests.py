"""The backend that the user asks for: `use_backend`."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from ..checks import check_choice

NAMES = ("auto", "reference", "cpu", "triton", "cuda")

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
