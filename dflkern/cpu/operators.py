"""Calls of the C++ operators `_cpu_<name>`, whose schemas say by name what they take."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

Arguments = dict[str, Any]


@functools.cache
def _registered(name: str) -> tuple[Callable[..., Any], Callable[[Arguments], tuple[Any, ...]]]:
    """The C++ operator of that name, and what picks its arguments from named ones."""
    found = getattr(torch.ops.dflkern, f"_cpu_{name}").default
    return found._op, operator.itemgetter(*(argument.name for argument in found._schema.arguments))


def run(name: str, arguments: Arguments) -> Any:
    """The results of an operator; of a gradient perhaps from what `box_loss_keep` kept."""
    function, pick = _registered(f"{name}_kept" if "kept" in arguments else name)
    return function(*pick(arguments))


def spread(arguments: Arguments) -> Arguments:
    """The arguments of box_loss's gradient, from what its CPU kernels kept of the foreground."""
    logits, anchors = arguments["logits"], len(arguments["anchor_points"])
    candidates, kept = arguments["candidates"], arguments["kept"]
    batch = logits.shape[0]
    everywhere = kept.new_zeros(batch * anchors, kept.shape[1]).index_copy(0, candidates, kept)
    weight, *box = everywhere.view(batch, anchors, -1).unbind(-1)
    targets = {
        "target_boxes": torch.stack(box, -1), "weight": weight, "foreground": weight != 0,
        "matched": None, "stride": None,
    }  # fmt: skip
    others = {name: arguments[name] for name in arguments if name not in ("candidates", "kept")}
    return {**others, **targets}
