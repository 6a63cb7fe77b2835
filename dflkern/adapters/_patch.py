"""What every adapter needs: look at a framework's functions, replace them, put them back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dflkern

Function = Callable[..., Any]
Trial = Callable[[Mapping[str, Function]], Sequence[Tensor]]


@dataclass(frozen=True)
class Replacement:
    """A function of a class, and what stands in for it."""

    owner: type
    name: str
    original: Function
    function: Function

    @property
    def label(self) -> str:
        """`Class.function`."""
        return f"{self.owner.__name__}.{self.name}"


class Patch:
    """Replaced functions of a framework, until `undo()` or the end of a `with` block.

    The functions are replaced on their classes, so existing and later instances use them, and no
    instance holds anything of dflkern.
    """

    def __init__(self, framework: str, replacements: Sequence[Replacement]) -> None:
        if not replacements:
            raise RuntimeError(f"dflkern found nothing to replace in {framework}.")
        self._framework = framework
        self._replacements = tuple(replacements)
        self.active = True
        for each in self._replacements:
            setattr(each.owner, each.name, each.function)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of what was replaced, as `Class.function`."""
        return tuple(each.label for each in self._replacements)

    def undo(self) -> None:
        """Put the very same functions back. A second call does nothing.

        A function that something else has replaced since is left as it is, with a warning.
        """
        if not self.active:
            return
        self.active = False
        for each in self._replacements:
            if vars(each.owner)[each.name] is each.function:
                setattr(each.owner, each.name, each.original)
            else:
                warnings.warn(
                    f"dflkern: {each.label} of {self._framework} was replaced once more after "
                    "patch(), so undo() leaves it; undo the later replacement first.",
                    RuntimeWarning,
                    stacklevel=2,
                )

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
) -> Replacement:
    """A replacement for a function whose parameters are known.

    Args:
        framework: its name and version, for the error.
        owner: the class that defines the function.
        name: the function's name.
        signatures: the names of the parameters that are known to mean what function takes them for.
        function: called with the original, then with the arguments of the call. Traced or exported
            calls go to the original, whose graph other tools know.

    Raises:
        RuntimeError: if the class has no such function, or one with other parameters.
    """
    original = vars(owner).get(name)
    found = tuple(inspect.signature(original).parameters) if inspect.isfunction(original) else None
    if original is None or found not in signatures:
        given = "no such function" if found is None else f"({', '.join(found)})"
        known = " or ".join(f"({', '.join(each)})" for each in signatures)
        raise RuntimeError(
            f"dflkern does not know {owner.__name__}.{name} of {framework}: it expects {known} and "
            f"found {given}. Nothing was replaced."
        )

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if _traced(args):
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    return Replacement(owner, name, original, stand_in)


def _traced(args: Sequence[Any]) -> bool:
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.compiler.is_exporting()
        or any(isinstance(arg, torch.fx.Proxy) for arg in args)
    )


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
    functions = {each.label: each.function for each in replacements}
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
