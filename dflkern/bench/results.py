"""From the workers' times to what JSON, tables and chart show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cases import PASSES, Case
from .contenders import COMPILED, OURS
from .worker import COPY, COPY_LOGITS


def derive(
    cases: Sequence[Case], found: dict[str, Any], default: dict[str, Any] | None
) -> dict[str, Any]:
    """By case: whether it matches, and if so its passes with times, rates, ratios and counts."""
    return {case.name: _case(case, found, default) for case in cases}


def green(results: dict[str, Any]) -> bool:
    """Whether every gate is."""
    entries = [*results["cases"].values(), *results["studies"].values()]
    return not any(entry["faults"] for entry in entries)


def plain(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def eager_peer(row: dict[str, Any]) -> str | None:
    """The eager peer to name first: Ultralytics' class if there is one, else the first spelling."""
    eager = [label for label in row["ratios"] if not label.endswith(COMPILED)]
    upstream = [label for label in eager if label.startswith("Ultralytics")]
    return next(iter(upstream + eager), None)


def _case(case: Case, found: dict[str, Any], default: dict[str, Any] | None) -> dict[str, Any]:
    raw = found["cases"][case.name]
    second = default["cases"].get(case.name) if default else None
    entry = {
        "op": case.op,
        "layout": case.layout,
        "shape": list(case.shape),
        "bins": case.bins,
        "distributions": case.count,
        "dtype": case.dtype,
        "regime": case.regime,
        "backend": raw["backend"],
        "faults": [*raw["faults"], *(second["faults"] if second else ())],
    }
    entry["match"] = not entry["faults"]
    if not entry["match"]:
        return entry
    entry["peer_faults"] = raw["peer_faults"]
    entry["saved"] = raw["saved"]
    entry["passes"] = {}
    for direction in PASSES:
        times = raw["times"][direction]
        size = case.traffic(direction)
        row = {
            "bytes": size,
            "times": times,
            "gb_per_s": size / times[OURS]["minimum"] / 1e9,
            "share_of_copy": times[COPY]["minimum"] / times[OURS]["minimum"],
            "kernels": {label: count[direction] for label, count in raw["kernels"].items()},
            "ratios": _ratios(times, raw["rivals"]),
        }
        if COPY_LOGITS in times:
            half = times[COPY_LOGITS]["minimum"] / 2
            row["half_copy_of_logits"] = half / times[OURS]["minimum"]
        if "graph" in times[OURS]:
            row["ratios_in_graph"] = _ratios(times, raw["rivals"], "graph")
        if second:
            row["ratios_default_allocator"] = _ratios(second["times"][direction], second["rivals"])
        entry["passes"][direction] = row
    return entry


def _ratios(
    times: dict[str, Any], rivals: dict[str, str], key: str = "minimum"
) -> dict[str, float]:
    """How many times as long each peer takes as dflkern's contender that does the same work."""
    return {
        peer: times[peer][key] / times[rival][key]
        for peer, rival in rivals.items()
        if key in times[peer] and key in times[rival]
    }
