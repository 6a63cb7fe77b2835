"""See every call of a DFL loss, also one that raises, without ever raising into it."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..interception import intercept
from .samples import Rows
from .signatures import arguments, forward, method, roles

Function = Callable[..., Any]


@dataclass
class Call:
    """A loss that is running or has run, and what was read of it."""

    module: nn.Module
    samples: list[Rows] = field(default_factory=list)
    loss: Tensor | None = None
    normalizer: Tensor | float | None = None
    inner: list[Call] = field(default_factory=list)  # losses within this one


class Reader(Protocol):
    """What the calls are shown to."""

    def read(self, call: Call, given: dict[str, Any]) -> None:
        """The arguments of a call by role: before it for classes that replace `__call__`."""

    def keep(self, call: Call, outer: Call | None, output: object) -> None:
        """The call's output, None if it has raised, and the loss that it is part of."""


def harmless(function: Function) -> Function:
    """Keep the watch's own exceptions out of the training; they become a warning."""

    @functools.wraps(function)
    def hook(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            with contextlib.suppress(Exception):  # where warnings are errors
                words = f"dflkern.doctor.watch could not look at a step: {error!r}"
                warnings.warn(words, RuntimeWarning, stacklevel=2)

    return hook


class Observer:
    """Shows a reader the calls that this thread makes of DFL losses, until `undo` is closed."""

    def __init__(
        self, reader: Reader, losses: Iterable[nn.Module], undo: contextlib.ExitStack
    ) -> None:
        """Begin.

        Args:
            reader: what the calls are shown to.
            losses: the modules to see; none: all.
            undo: takes what ends it.
        """
        losses = list(losses)
        self._reader, self._undo = reader, undo
        self._only = {id(module) for module in losses}
        self._thread = threading.get_ident()
        self._running: list[Call] = []  # the outermost first
        self._intercepted: set[type] = set()
        for module in losses:
            self._intercept(module)
        for handle in (
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ):
            undo.callback(handle.remove)

    def _wanted(self, module: nn.Module) -> bool:
        return (
            threading.get_ident() == self._thread
            and (not self._only or id(module) in self._only)
            and not torch.compiler.is_compiling()
            # Reading a value would end the capture of a CUDA graph.
            and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        )

    @harmless
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if roles(forward(module)) and self._wanted(module):
            for inner in module.modules():
                self._intercept(inner)
            self._open(module)

    @harmless
    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        call = self._close(module)
        if call is None:
            return
        *kwargs, output = rest  # PyTorch leaves the keywords out where forward has raised
        self._read(call, forward(module), args, kwargs[0] if kwargs else {})
        self._keep(call, output)

    def _intercept(self, module: nn.Module) -> None:
        """See the calls of a class that replaces `__call__`, and with it all hooks."""
        owner, function = type(module), method(module)
        if owner not in self._intercepted and roles(function) and not roles(forward(module)):
            self._intercepted.add(owner)
            self._undo.callback(intercept(owner, "__call__", self._around(function)).remove)

    def _around(self, function: Function) -> Function:
        @harmless
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._wanted(module):  # read now, since Ultralytics' DFLoss clamps its argument
                self._read(self._open(module), function, args, kwargs)

        @harmless
        def after(module: nn.Module, output: object) -> None:
            if call := self._close(module):
                self._keep(call, output)

        def seen(call: Function, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before(module, args, kwargs)
            output = None
            try:
                output = call(module, *args, **kwargs)
                return output
            finally:
                after(module, output)

        return seen

    def _open(self, module: nn.Module) -> Call:
        self._close(module)  # left open by Ctrl-C, for which PyTorch calls no hook
        self._running.append(Call(module))
        return self._running[-1]

    def _close(self, module: nn.Module) -> Call | None:
        if threading.get_ident() == self._thread:
            for index, call in enumerate(self._running):
                if call.module is module:
                    del self._running[index:]
                    return call
        return None

    def _read(
        self, call: Call, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        with contextlib.suppress(Exception):  # arguments of another meaning, or too few
            self._reader.read(call, arguments(function, call.module, args, kwargs))

    def _keep(self, call: Call, output: object) -> None:
        outer = self._running[-1] if self._running else None
        self._reader.keep(call, outer, output)
