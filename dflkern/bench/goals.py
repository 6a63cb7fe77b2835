"""What the project set out to reach on a CPU, and what was measured."""

from __future__ import annotations

from typing import Any

from .contenders import COMPILED, ULTRALYTICS_DECODE, ULTRALYTICS_LOSS
from .studies import DECODE_CASE, LOSS_CASE

DECODE_ONE = "decode-columns-1x64x8400-fp32"
LOSS_SMALL = "loss-rows-1000x4x16-fp32"
# Work, its case and pass, the peer, and the ratio asked for
RATIOS = (
    ("decode (16, 64, 8400) fp32", DECODE_CASE, "forward", ULTRALYTICS_DECODE, 6.0),
    ("decode (16, 64, 8400) fp32", DECODE_CASE, "forward", ULTRALYTICS_DECODE + COMPILED, 4.0),
    ("decode (1, 64, 8400) fp32", DECODE_ONE, "forward", ULTRALYTICS_DECODE, 6.0),
    ("decode (1, 64, 8400) fp32", DECODE_ONE, "forward", ULTRALYTICS_DECODE + COMPILED, 4.0),
    ("loss + backward, 64 000 × 4 fp32", LOSS_CASE, "both", ULTRALYTICS_LOSS, 4.0),
    ("loss + backward, 64 000 × 4 fp32", LOSS_CASE, "both", ULTRALYTICS_LOSS + COMPILED, 3.5),
    ("loss + backward, 1 000 × 4 fp32", LOSS_SMALL, "both", ULTRALYTICS_LOSS, 4.0),
    ("loss + backward, 1 000 × 4 fp32", LOSS_SMALL, "both", ULTRALYTICS_LOSS + COMPILED, 2.0),
)
HALF_COPY = 0.5
DTYPE_RATIO = 0.95
THREAD_EFFICIENCY = 0.8  # of linear


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was measured; None where it was not."""
    rows = [_ratio_goal(results["cases"], *goal) for goal in RATIOS]
    rows.insert(2, _copy_goal(results["cases"]))
    rows += _study_goals(results["studies"])
    for row in rows:
        measured = row["measured"]
        row["met"] = None if measured is None else measured >= row["asked"]
    return rows


def _row(cases: dict[str, Any], name: str, direction: str) -> dict[str, Any] | None:
    passes = cases.get(name, {}).get("passes")
    return passes[direction] if passes else None


def _ratio_goal(
    cases: dict[str, Any], work: str, name: str, direction: str, peer: str, asked: float
) -> dict[str, Any]:
    row = _row(cases, name, direction)
    goal = {"work": work, "against": peer, "asked": asked, "unit": "×", "measured": None}
    if row:
        goal["measured"] = row["ratios"].get(peer)
        goal["default_allocator"] = row.get("ratios_default_allocator", {}).get(peer)
        fellows = {
            label: ratio
            for label, ratio in row["ratios"].items()
            if label.endswith(COMPILED) == peer.endswith(COMPILED)
        }
        if fellows:
            fastest = min(fellows, key=lambda label: fellows[label])
            goal["fastest_of_its_kind"] = {"peer": fastest, "ratio": fellows[fastest]}
    return goal


def _copy_goal(cases: dict[str, Any]) -> dict[str, Any]:
    row = _row(cases, DECODE_CASE, "forward")
    return {
        "work": "decode (16, 64, 8400) fp32",
        "against": "half the time of copying the logits",
        "asked": HALF_COPY,
        "unit": "",
        "measured": row["half_copy_of_logits"] if row else None,
    }


def _study_goals(studies: dict[str, Any]) -> list[dict[str, Any]]:
    works = {DECODE_CASE: "decode (16, 64, 8400)", LOSS_CASE: "loss + backward, 64 000 × 4"}
    rows = []
    for name, work in works.items():
        minima = _minima(studies, "dtypes", name)
        for dtype in ("bf16", "fp16"):
            ratio = minima["fp32"] / minima[dtype] if minima else None
            rows.append(
                {
                    "work": f"{work} {dtype}",
                    "against": "itself in fp32",
                    "asked": DTYPE_RATIO,
                    "unit": "×",
                    "measured": ratio,
                }
            )
    for name, work in works.items():
        minima = _minima(studies, "threads", name)
        most = max(map(int, minima), default=1)
        if minima and most == 1:
            continue  # one thread has nothing to scale to
        rows.append(
            {
                "work": f"{work} fp32, {most if minima else 'all'} threads",
                "against": "itself on one thread",
                "asked": THREAD_EFFICIENCY * (most if minima else 2),
                "unit": "×",
                "measured": minima["1"] / minima[str(most)] if minima else None,
            }
        )
    return rows


def _minima(studies: dict[str, Any], study: str, case: str) -> dict[str, float]:
    times = (studies.get(study, {}).get("data") or {}).get(case, {}).get("times", {})
    return {label: time["minimum"] for label, time in times.items()}
