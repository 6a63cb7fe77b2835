"""Fuzzing: random calls with hostile values, strides and masks, against a model in NumPy.

`python -m tests.fuzz --seconds 600 --seed 1` runs from the root of a clone; `tests/test_fuzz.py` is
the part of it that every test run does.

`specs` draws what a case is, `tensors` and `cases` make its tensors, `model` and `box_model` say
what its results are and `bounds` how close they must be, and `check` runs it.
"""

from __future__ import annotations

from typing import Any

from .check import check
from .specs import BACKENDS, OPS, Spec, draw, simpler


def shrink(spec: Spec, attempts: int = 400, **keywords: Any) -> Spec:
    """The simplest specification found from a failing one that fails in the same way."""
    kind = _kind(spec, keywords)
    found = True
    while found:
        found = False
        for candidate in simpler(spec):
            attempts -= 1
            if attempts <= 0:
                return spec
            if _kind(candidate, keywords) == kind:
                spec, found = candidate, True
                break
    return spec


def _kind(spec: Spec, keywords: dict[str, Any]) -> str:
    """The beginning of the first fault; empty if there is none."""
    try:
        faults = check(spec, **keywords)
    except Exception:  # of the fuzzer itself, on a specification that does not fit together
        return ""
    return faults[0][:8] if faults else ""


__all__ = ["BACKENDS", "OPS", "Spec", "check", "draw", "shrink"]
