"""Write the README's tables from the recorded results, or with --check say whether they differ.

A table stands between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`; it is empty while
there is no results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelled_tables import modelled
from tables import table as _table

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if different")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args(argv)
    text = arguments.readme.read_text(encoding="utf-8")
    try:
        wanted = rewrite(text, arguments.results)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    if arguments.check:
        different = [
            name
            for (_, name, old, _), (_, _, new, _) in zip(
                BLOCK.findall(text), BLOCK.findall(wanted), strict=True
            )
            if old != new
        ]
        if different:
            print(
                f"{arguments.readme.name}: what stands between its markers {', '.join(different)} "
                "is not what the recorded results say; run `python benchmarks/readme.py`.",
                file=sys.stderr,
            )
            return 1
        return 0
    arguments.readme.write_text(wanted, encoding="utf-8")
    return 0


def rewrite(text: str, results: Path) -> str:
    """The README with every table made anew.

    Raises:
        LookupError: for markers of no known table, or a recorded result without its markers.
    """
    found = {name for _, name, _, _ in BLOCK.findall(text)}
    unknown = found - SECTIONS.keys()
    if unknown:
        raise LookupError(f"README: no table is called {', '.join(sorted(unknown))}.")
    for name in SECTIONS.keys() - found:
        if (results / f"{name}.json").exists():
            raise LookupError(
                f"README: {name}.json is recorded, but the lines <!-- begin {name} --> and "
                f"<!-- end {name} --> are missing."
            )

    def section(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return match[1] + match[4]
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{SECTIONS[match[2]](recorded)}\n{match[4]}"

    return BLOCK.sub(section, text)


def demo(recorded: dict[str, Any]) -> str:
    """What the demo asked for, and what it measured."""
    rows = [
        (row["name"], row["expected"], row["measured"], "yes" if row["met"] else "**no**")
        for row in recorded["expectations"]
    ]
    rows.append(("time", "", f"{recorded['seconds']:.0f} s", ""))
    epochs = recorded["epochs"]
    where = _where(recorded["machine"], recorded["versions"])
    return (
        f"{_table(('expectation', 'asked', 'measured', 'met'), rows)}\n\n"
        f"After {epochs} epoch{'s' * (epochs != 1)}, on {where}."
    )


def mistakes(recorded: dict[str, Any]) -> str:
    """The corrected training beside the broken ones, and which symptom each of them shows."""
    columns = (
        "training", "DFL loss", "at 10.0", "box loss", "largest spike", "largest gradient norm",
        "mAP@0.5", "mAP@0.75", "the doctor's first finding",
    )  # fmt: skip
    runs = recorded["runs"]
    rows = [(name, *_training(run), run["first_finding"] or "none") for name, run in runs.items()]
    shown = {
        symptom: [name for name, run in runs.items() if run["symptoms"][symptom]]
        for symptom in SYMPTOMS
    }
    symptoms = "; ".join(
        f"{words}: {', '.join(shown[symptom]) or 'in none'}" for symptom, words in SYMPTOMS.items()
    )
    return (
        f"{_table(columns, rows)}\n\n"
        f"Bold: the symptom shows. The post-mortem's four symptoms: {symptoms}. "
        f"After {recorded['epochs']} epochs, on "
        f"{_where(recorded['machine'], recorded['versions'])}."
    )


def _training(run: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str, digits: int) -> str:
        return "not finite" if run[name] is None else f"{run[name]:.{digits}f}"

    def bold(symptom: str, text: str) -> str:
        return f"**{text}**" if run["symptoms"][symptom] else text

    return (
        f"{figure('dfl_first', 2)} → {figure('dfl_last', 2)}",
        bold("stuck", f"{100 * run['stuck_share']:.0f} %"),
        f"{figure('box_first', 2)} → {figure('box_last', 2)}",
        bold("unstable", f"{figure('box_spike', 2)}×"),
        bold("exploding", figure("grad_norm_max", 1)),
        bold("no convergence", figure("map50", 3)),
        figure("map75", 3),
    )


def cpu(recorded: dict[str, Any]) -> str:
    """The goals with what was measured, the cost of a call, and every ratio below 1."""
    settings = recorded["settings"]
    columns = ("work", "against", "asked", "measured", "default allocator", "fastest peer")
    text = [
        _table(columns, [_goal(goal) for goal in recorded["goals"] if not _of_boxes(goal)]),
        f"Peer's time over dflkern's for equal work, minima over {settings['rounds']} interleaved "
        "rounds in one process that keeps freed memory "
        f"({' '.join(f'`{name}={value}`' for name, value in settings['allocator'].items())}); the "
        "default allocator's ratio stands beside it, and so does the fastest of all eager, or of "
        "all compiled, peers. Ultralytics' `DFLoss` ends in a mean over the four sides, and so "
        "does dflkern where it is held against it.",
        f"Measured on {_where(recorded['machine'], recorded['versions'])}, "
        f"commit {recorded['commit'] or 'unknown'}, {recorded['date']}.",
    ]
    split = ((recorded["studies"].get("calls") or {}).get("data") or {}).get("split")
    if split:
        parts = [f"{row['part']} {row['seconds'] * 1e6:.1f} µs" for row in split]
        text.append(f"A call of `dfl_loss` on 256 distributions: {'; '.join(parts)}.")
    ratios = [
        (ratio, name, direction, peer)
        for name, case in recorded["cases"].items()
        for direction, row in case.get("passes", {}).items()
        for peer, ratio in row["ratios"].items()
    ]
    lost = sorted(row for row in ratios if row[0] < 1)
    if lost:
        text.append(f"Slower than a peer, {len(lost)} of {len(ratios)} ratios:")
        rows = [(n, d, p, f"{r:.2f}×") for r, n, d, p in lost]
        text.append(_table(("case", "pass", "peer", "ratio"), rows))
    else:
        text.append(f"Slower than a peer: none of {len(ratios)} ratios.")
    return "\n\n".join(text)


def _of_boxes(goal: dict[str, Any]) -> bool:
    """Whether a goal is of the run recorded in boxes.json."""
    return bool(goal["work"].startswith("box path"))


def boxes(recorded: dict[str, Any]) -> str:
    """Time, kernels and bytes of the box path of a step, and of Ultralytics' own loss."""
    names = {"boxes": "the box path, {}", "ultralytics": "Ultralytics' step: {}"}
    rows = []
    for study, words in names.items():
        for step, found in recorded["studies"][study]["data"].items():
            for side, time in found["times"].items():
                last = f"{found['ratio']:.1f}×" if side == "dflkern" and "ratio" in found else ""
                kept = found["saved"][side] / 1e6
                rows.append(
                    (
                        words.format(step), side, f"{time['minimum'] * 1e3:.2f} ms",
                        str(found["kernels"][side]), f"{found['tensor_bytes'][side] / 1e6:.0f} MB",
                        f"{kept:.1f} MB", last,
                    )
                )  # fmt: skip
    columns = ("step", "side", "time", "kernels", "tensors made", "kept for backward", "ratio")
    settings = recorded["settings"]
    goals = _table(
        ("asked of", "against", "asked", "measured"),
        [_goal(goal)[:4] for goal in recorded["goals"] if _of_boxes(goal)],
    )
    return (
        f"{_table(columns, rows)}\n\n{goals}\n\n"
        f"Forward and backward, minima over {settings['rounds']} interleaved rounds in one process "
        "that keeps freed memory; images × anchors, 100 anchors of the foreground an image, class "
        "scores passed as they are. The last step is the DFL part of the one before it. On "
        f"{_where(recorded['machine'], recorded['versions'])}."
    )


def ultralytics(recorded: dict[str, Any]) -> str:
    """The time of Ultralytics' loss, and some losses of its training, without and with patch()."""
    settings, losses = recorded["settings"], recorded["losses"]
    before, after = losses
    times = []
    for what, seconds in recorded["seconds"].items():
        old, new = seconds[before]["minimum"], seconds[after]["minimum"]
        times.append((what, f"{old * 1e3:.1f} ms", f"{new * 1e3:.1f} ms", f"{old / new:.2f}×"))
    steps = len(losses[before])
    shown = []
    for step in sorted({0, steps // 3, 2 * steps // 3, steps - 1}):
        values = (" / ".join(f"{loss:.4f}" for loss in side[step]) for side in losses.values())
        shown.append((str(step + 1), *values))
    return "\n\n".join(
        (
            _table(("forward and backward of", before, after, "ratio"), times),
            f"{settings['model']}, {settings['batch']} images of {settings['size']} pixels, minima "
            f"over {settings['rounds']} interleaved rounds.",
            _table(("step", *(f"box / class / DFL loss, {side}" for side in losses)), shown),
            f"{steps} steps of Ultralytics' trainer on generated images; no loss differs by more "
            f"than {recorded['largest_relative_difference']:.0e} of itself. On "
            f"{_where(recorded['machine'], recorded['versions'])}.",
        )
    )


def precision(recorded: dict[str, Any]) -> str:
    """The errors of Ultralytics and of dflkern against float64."""
    rows = [
        (what, dtype, *(f"{error:.1e}" for error in sides.values()))
        for what, by_dtype in recorded["errors"].items()
        for dtype, sides in by_dtype.items()
    ]
    return _table(("error against float64", "logits", "Ultralytics", "dflkern"), rows)


def _goal(goal: dict[str, Any]) -> tuple[str, ...]:
    unit, measured, other = goal["unit"], goal["measured"], goal.get("default_allocator")
    fastest = goal.get("fastest_of_its_kind")
    at_most = goal.get("at_most", False)
    digits = ".3g" if at_most else ".2f"
    value = "not measured" if measured is None else f"{measured:{digits}}{unit}"
    return (
        goal["work"],
        goal["against"],
        f"{'≤ ' * at_most}{goal['asked']:g}{unit}",
        f"**{value}**" if goal["met"] is False else value,
        "" if other is None else f"{other:.1f}{unit}",
        f"{fastest['ratio']:.2f}×, {fastest['peer']}" if fastest else "",
    )


def _where(machine: dict[str, Any], versions: dict[str, str]) -> str:
    place = machine.get("gpu") or machine["cpu"]
    if machine.get("capability"):
        place += f" ({machine['capability']})"
    names = {"torch": "PyTorch", "ultralytics": "Ultralytics", "dflkern": "dflkern"}
    used = [f"{word} {versions[name]}" for name, word in names.items() if name in versions]
    threads, cores = machine["threads"], machine["cores"]
    share = f"{threads} thread{'s' * (threads != 1)} of {cores} core{'s' * (cores != 1)}"
    return f"{place}, {share}, {', '.join(used)}"


SYMPTOMS = {
    "stuck": "DFL loss stuck at 10.0",
    "exploding": "gradients explode",
    "unstable": "box loss unstable",
    "no convergence": "no convergence",
}
SECTIONS = {
    "modelled": modelled,
    "demo": demo,
    "mistakes": mistakes,
    "cpu": cpu,
    "boxes": boxes,
    "ultralytics": ultralytics,
    "precision": precision,
}

if __name__ == "__main__":
    sys.exit(main())
