"""Which modules are DFL losses, and which of their arguments is what, whatever they are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

# What is recorded, and the names under which dflkern, Ultralytics and mmdet pass it.
NAMES = {
    "logits": ("logits", "pred_dist", "pred_distri", "pred"),
    "targets": ("target", "targets", "label"),
    "boxes": ("target_boxes", "target_bboxes"),
    "anchor_points": ("anchor_points",),
    "weight": ("weight", "target_scores"),
    "normalizer": ("normalizer", "target_scores_sum", "avg_factor"),
    "foreground": ("foreground", "fg_mask"),
    "stride": ("stride", "stride_tensor"),
}


def roles(function: Callable[..., Any]) -> dict[str, str] | None:
    """{role: parameter} of a method that computes DFL, None for any other."""
    try:
        return _roles(function)
    except (TypeError, ValueError):  # it has no signature
        return None


@functools.lru_cache(maxsize=1024)
def _roles(function: Callable[..., Any]) -> dict[str, str] | None:
    parameters = inspect.signature(function).parameters
    found = {
        role: name
        for role, names in NAMES.items()
        if (name := next((n for n in names if n in parameters), None))
    }
    complete = "targets" in found or {"boxes", "anchor_points"} <= found.keys()
    return found if "logits" in found and complete else None


def arguments(
    function: Callable[..., Any], module: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """{role: value} of a call."""
    known = roles(function) or {}
    bound = inspect.signature(function).bind(module, *args, **kwargs).arguments
    return {role: bound[name] for role, name in known.items() if bound.get(name) is not None}


def forward(module: nn.Module) -> Any:
    """The class's forward; None where it has none of Python's, as in TorchScript."""
    return getattr(type(module), "forward", None)


def method(module: nn.Module) -> Callable[..., Any]:
    """What computes the module's output: forward, or a `__call__` of its own, past all hooks."""
    kind = type(module)
    return kind.__call__ if kind.__call__ is not nn.Module.__call__ else forward(module)


def losses_in(thing: object, depth: int = 3) -> Iterator[nn.Module]:
    """The DFL losses in a model, or in a criterion, which need not be a module itself."""
    if isinstance(thing, nn.Module):
        yield from (module for module in thing.modules() if roles(method(module)))
    if depth:
        for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
            if callable(value) and not isinstance(value, type):
                yield from losses_in(value, depth - 1)
