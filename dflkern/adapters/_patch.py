"""What every adapter needs: check a framework's functions, replace them, put them back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dflkern

from ..interception import Function, intercept, original

Trial = Callable[[Mapping[str, Function]], Sequence[Tensor]]
SILENTLY = ""  # a reason that needs no warning
lock = threading.RLock()  # held while anything is replaced or put back


@dataclass(frozen=True)
class Replacement:
    """A function of a class, and what runs instead of it for the calls that are known.

    Attributes:
        owner: the class that defines the function.
        name: the function's name.
        original: the function.
        function: called with the original, then with the arguments of the call.
        unknown: called with the arguments; None if function computes what the original would,
            else why not, in words that follow "because" in the warning, or SILENTLY. It reads no
            value on a device.
    """

    owner: type
    name: str
    original: Function
    function: Function
    unknown: Callable[..., str | None]

    @property
    def label(self) -> str:
        """`Class.function`."""
        return f"{self.owner.__name__}.{self.name}"


class Replacements:
    """Functions of a framework that are replaced for as long as one handle is active.

    They are replaced on their classes, so existing and later instances use them, and no instance
    holds anything of dflkern.
    """

    def __init__(self, framework: str, replacements: Sequence[Replacement]) -> None:
        if not replacements:
            raise RuntimeError(f"dflkern found nothing to replace in {framework}.")
        self._framework = framework
        self._replacements = tuple(replacements)
        self._handles: set[Patch] = set()
        self._said: set[str] = set()
        self._interceptions = [
            intercept(each.owner, each.name, self._dispatch(each), innermost=True)
            for each in self._replacements
        ]

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of what is replaced, as `Class.function`."""
        return tuple(each.label for each in self._replacements)

    @property
    def in_use(self) -> bool:
        """Whether a handle is active."""
        return bool(self._handles)

    def handle(self) -> Patch:
        """A new handle."""
        handle = Patch(self._framework, self)
        with lock:
            self._handles.add(handle)
        return handle

    def holds(self, handle: Patch) -> bool:
        """Whether the handle is active."""
        return handle in self._handles

    def release(self, handle: Patch) -> None:
        """End a handle; with the last one, the classes get their own functions back."""
        with lock:
            self._handles.discard(handle)
            if not self._handles:
                for each in self._interceptions:
                    each.remove()

    def _dispatch(self, replacement: Replacement) -> Function:
        """Decide for each call who runs it."""
        function, unknown = replacement.function, replacement.unknown
        module = sys.modules[replacement.original.__module__]
        names = set(replacement.original.__code__.co_names) & set(vars(module))
        used = [(name, getattr(module, name)) for name in sorted(names)]

        def dispatch(call: Function, *args: Any, **kwargs: Any) -> Any:
            if _traced(args):
                return call(*args, **kwargs)
            for name, value in used:
                if getattr(module, name, None) is not value:
                    reason: str | None = f"{module.__name__}.{name} has been replaced"
                    break
            else:
                reason = unknown(*args, **kwargs)
            if reason is None:
                return function(call, *args, **kwargs)
            self._say(replacement.label, reason)
            return call(*args, **kwargs)

        return dispatch

    def _say(self, label: str, reason: str) -> None:
        if reason and not torch.compiler.is_compiling() and reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"dflkern: {self._framework}'s own {label} runs, because {reason}. "
                "This is said once.",
                stacklevel=4,
            )


class Patch:
    """A handle on a framework's replaced functions, until `undo()` or the end of a `with` block."""

    def __init__(self, framework: str, replacements: Replacements) -> None:
        self._framework = framework
        self._replacements = replacements

    @property
    def active(self) -> bool:
        """True until this handle is undone."""
        return self._replacements.holds(self)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of what was replaced, as `Class.function`."""
        return self._replacements.replaced

    def undo(self) -> None:
        """Give this handle up; with the last active one, the very same functions are put back.

        A second call does nothing. The order of several handles does not matter, nor does what
        other libraries have done to the functions since: if one has wrapped a function, it wraps
        the framework's own from now on.
        """
        self._replacements.release(self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "replaced" if self.active else "undone"
        return f"<dflkern in {self._framework}, {state}: {', '.join(self.replaced)}>"


def replacement(
    framework: str,
    owner: type,
    name: str,
    signatures: Sequence[tuple[str, ...]],
    function: Function,
    unknown: Callable[..., str | None],
) -> Replacement:
    """A replacement for a function whose parameters are known.

    Args:
        framework: its name and version, for the error.
        owner: the class that defines the function.
        name: the function's name.
        signatures: the names of the parameters that are known to mean what function takes them for.
        function: see `Replacement`. Traced or exported calls go to the original, whose graph other
            tools know, and so do all calls once a global that the original reads is replaced.
        unknown: see `Replacement`.

    Raises:
        RuntimeError: if the class has no such function, or one with other parameters.
    """
    own = original(owner, name)
    found = tuple(inspect.signature(own).parameters) if inspect.isfunction(own) else None
    if own is None or found not in signatures:
        given = "no such function" if found is None else f"({', '.join(found)}) of {_origin(own)}"
        known = " or ".join(f"({', '.join(each)})" for each in signatures)
        raise RuntimeError(
            f"dflkern does not know {owner.__name__}.{name} of {framework}: it expects {known} and "
            f"found {given}. Nothing was replaced."
        )
    return Replacement(owner, name, own, function, unknown)


def check_own(framework: str, package: str, replacements: Sequence[Replacement]) -> None:
    """Each function is the framework's own: a wrapper around it would no longer be called.

    Raises:
        RuntimeError: if a function was defined outside the framework's package.
    """
    for each in replacements:
        if each.original.__globals__["__name__"].split(".")[0] != package:
            raise RuntimeError(
                f"dflkern found {_origin(each.original)} in the place of {each.label} of "
                f"{framework}, and would bypass it. Call patch() first, so that it wraps dflkern's "
                "function, or restore the original. Nothing was replaced."
            )


def _origin(function: Function) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return f"{name} from {function.__code__.co_filename}"


def _traced(args: Sequence[Any]) -> bool:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        return True
    return any(isinstance(arg, torch.fx.Proxy) for arg in args)


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Gradients on the CPU in fp32, any backend, and random numbers that the caller keeps."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        dflkern.use_backend("auto"),
    ):
        yield


def check_same(
    framework: str,
    replacements: Sequence[Replacement],
    trials: Callable[[], Mapping[str, Trial]],
    tolerance: float,
) -> None:
    """Run each trial on the original functions and on their replacements, and compare.

    Args:
        framework: its name and version, for the error.
        replacements: not applied yet.
        trials: makes them, by the name of what they try; each takes the functions by their labels
            and returns values and gradients.
        tolerance: the largest difference, in units of the largest value of the original's result.

    Raises:
        RuntimeError: with the numbers, if a result differs by more.
    """
    originals = {each.label: each.original for each in replacements}
    functions = {
        each.label: functools.partial(each.function, each.original) for each in replacements
    }
    with _neutral():
        results = {
            what: list(zip(trial(originals), trial(functions), strict=True))
            for what, trial in trials().items()
        }
    for what, pairs in results.items():
        for expected, actual in pairs:
            scale = float(expected.abs().max())
            difference = float((actual.double() - expected.double()).abs().max())
            if not difference <= tolerance * scale:
                raise RuntimeError(
                    f"dflkern's {what} differs from that of {framework} by {difference:.3g} on "
                    f"random rows, where {tolerance * scale:.3g} is allowed and values reach "
                    f"{scale:.3g}. Has the framework been edited? Nothing was replaced."
                )
