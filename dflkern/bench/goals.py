"""What the project set out to reach on a CPU, and what was measured."""

from __future__ import annotations

from typing import Any

from .box_steps import MAIN, ULTRALYTICS
from .contenders import COMPILED, OURS, ULTRALYTICS_DECODE, ULTRALYTICS_LOSS
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
BOX_RATIO, BOX_KERNELS, BOX_SAVED = 8.0, 10, 0.1
HALF_COPY = 0.5
DTYPE_RATIO = 0.95
THREAD_EFFICIENCY = 0.8  # of linear


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was measured; None where it was not."""
    rows = [_ratio_goal(results["cases"], *goal) for goal in RATIOS]
    rows.insert(2, _copy_goal(results["cases"]))
    rows += _study_goals(results["studies"])
    rows += _box_goals(results["studies"])
    for row in rows:
        measured, asked = row["measured"], row["asked"]
        enough = measured is not None and (
            measured <= asked if row.get("at_most") else measured >= asked
        )
        row["met"] = None if measured is None else enough
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


def _box_goals(studies: dict[str, Any]) -> list[dict[str, Any]]:
    found = (studies.get("boxes", {}).get("data") or {}).get(MAIN, {})
    work = "box path of a step, 16 images of 8 400 anchors"
    kernels, saved = found.get("kernels", {}), found.get("saved", {})
    share = saved[OURS] / saved[ULTRALYTICS] if ULTRALYTICS in saved else None
    return [
        {"work": work, "against": ULTRALYTICS, "asked": BOX_RATIO, "unit": "×",
         "measured": found.get("ratio")},
        {"work": f"{work}: kernels", "against": "", "asked": BOX_KERNELS, "unit": "",
         "measured": kernels.get(OURS), "at_most": True},
        {"work": f"{work}: bytes kept for backward", "against": f"those of {ULTRALYTICS}",
         "asked": BOX_SAVED, "unit": "", "measured": share, "at_most": True},
    ]  # fmt: skip
