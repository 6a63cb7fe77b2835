"""`demo --mistake`: the corrected training beside broken ones, with the doctor watching both.

It says of each mistake what the doctor finds first, and of each of the post-mortem's four symptoms
whether the mistake brings it about.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from ..commands.console import open_console
from .command import WIDTH, train_with_progress
from .config import Config
from .mistakes import ALL, LOSS_CLAMP, broken
from .pictures import at_steps, limit, smoothed
from .report import (
    GRAD_NORM_LIMIT,
    SEED_EPOCHS,
    SEED_MAP,
    SPIKE_LIMIT,
    last_steps,
    metrics,
    write_json,
)
from .train import Run

CORRECTED = "corrected"
COLOURS = ("#2563a8", "#d6453d", "#f28e2b", "#7b4fb3", "#2f9e6e", "#16181d")
KEPT = (
    "dfl_first", "dfl_last", "box_first", "box_last", "box_spike", "grad_norm_max",
    "grad_norm_median", "map50", "map75", "map", "seconds",
)  # fmt: skip
STUCK = 0.5  # the share of the last steps at the clamp that counts as stuck
DEFINITIONS = {
    "dfl": "the DFL loss as that training has it: mean over the four sides, but with loss-clamp "
    f"their sum, clamped at {LOSS_CLAMP:g} per anchor; weighted mean over the foreground",
    "stuck": f"the share of the last quarter of the last epoch's steps whose dfl is {LOSS_CLAMP:g} "
    f"to four digits; the symptom from {STUCK} on",
    "exploding": f"grad_norm_max, the largest L2 norm before clipping, above {GRAD_NORM_LIMIT:g}, "
    "or not finite",
    "unstable": "box_spike, the largest box loss over the median of the 20 before, above "
    f"{SPIKE_LIMIT}, or not finite",
    "no convergence": f"mAP@0.5 not above {SEED_MAP} after the last epoch",
    "findings": "of the doctor, which watched the first 100 steps",
}


def run(config: Config, names: Sequence[str], out: Path) -> int:
    """Train all, print the table, write mistakes.json and comparison.png.

    Returns:
        0 if the doctor finds nothing above a note in the corrected run and names each mistake
        first, else 1.
    """
    console = open_console(WIDTH)
    out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for name in (CORRECTED, *dict.fromkeys(names)):
        console.print(f"\n[bold]{name}[/bold]")
        chosen = config if name == CORRECTED else broken(config, name)
        began = time.perf_counter()
        result = train_with_progress(console, chosen, watched=True)
        runs[name] = (result, time.perf_counter() - began)
        console.print(_diagnosis(result), highlight=False, markup=False, soft_wrap=True)
    numbers = summary(runs)
    write_json(numbers, out / "mistakes.json")
    draw({name: result for name, (result, _) in runs.items()}, out / "comparison.png")
    show(console, numbers)
    console.print(f"wrote mistakes.json and comparison.png to {out}", markup=False, soft_wrap=True)
    return 0 if all(entry["named"] for entry in numbers["runs"].values()) else 1


def summary(runs: dict[str, tuple[Run, float]]) -> dict[str, Any]:
    """Everything that mistakes.json holds."""
    entries: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for name, (result, seconds) in runs.items():
        found = metrics(result, seconds)
        assert result.report is not None
        first = result.report.findings[0].code if not result.report.healthy else None
        wanted = {CORRECTED: None, ALL: "coordinates"}.get(name, name)
        entries[name] = {
            **{key: found[key] for key in KEPT},
            "mistakes": list(result.config.mistakes),
            "stuck_share": stuck_share(result),
            "symptoms": symptoms(result, found),
            "first_finding": first,
            "named": first == wanted,
            "report": result.report.to_dict(),
        }
        common = {key: found[key] for key in ("epochs", "config", "versions", "machine")}
    del common["config"]["mistakes"], common["config"]["dfl_gain"]  # they differ
    return {"runs": entries, "definitions": DEFINITIONS, **common}


def stuck_share(result: Run) -> float:
    """The share of the last steps whose DFL loss reads 10.0."""
    last = [step.dfl for step in result.steps[-last_steps(result.config) :]]
    return sum(abs(dfl - LOSS_CLAMP) < 1e-3 for dfl in last) / len(last)


def symptoms(result: Run, numbers: dict[str, Any]) -> dict[str, bool]:
    """Which of the post-mortem's four symptoms this training shows; NaN shows them."""
    return {
        "stuck": stuck_share(result) >= STUCK,
        "exploding": not numbers["grad_norm_max"] <= GRAD_NORM_LIMIT,
        "unstable": not numbers["box_spike"] <= SPIKE_LIMIT,
        "no convergence": not numbers["map50"] > SEED_MAP,
    }


def show(console: Console, numbers: dict[str, Any]) -> None:
    """Print the table: a line for each training."""
    epochs = numbers["epochs"]
    table = Table(
        title="Broken and corrected",
        caption=f"after {epochs} epoch{'s' * (epochs != 1)}; * shows the symptom"
        + (f", which is defined for {SEED_EPOCHS} epochs" if epochs != SEED_EPOCHS else ""),
    )
    table.add_column("")
    for column in (
        "DFL loss", "at 10.0", "box loss", "spike", "gradient", "mAP@0.5", "@0.75",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("first finding")
    for name, entry in numbers["runs"].items():
        table.add_row(name, *cells(entry), entry["first_finding"] or "none")
    console.print()
    console.print(table)


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """The figures of one training as text, with a star at each symptom."""
    star = {name: "*" if shown else "" for name, shown in entry["symptoms"].items()}

    def figure(name: str, digits: int) -> str:
        value = entry[name]
        return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"

    return (
        f"{figure('dfl_first', 2)} → {figure('dfl_last', 2)}",
        f"{100 * entry['stuck_share']:.0f} %{star['stuck']}",
        f"{figure('box_first', 2)} → {figure('box_last', 2)}",
        f"{figure('box_spike', 2)}×{star['unstable']}",
        f"{figure('grad_norm_max', 1)}{star['exploding']}",
        f"{figure('map50', 3)}{star['no convergence']}",
        figure("map75", 3),
    )


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draw DFL loss, box loss, gradient norm and mAP of all trainings, a colour for each."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)
    for (name, result), colour in zip(runs.items(), COLOURS, strict=False):
        width = 2.4 if name == CORRECTED else 1.3
        style = {"color": colour, "lw": width, "label": name}
        for axis, values in (
            (axes[0, 0], [step.dfl for step in result.steps]),
            (axes[0, 1], [step.box for step in result.steps]),
            (axes[1, 0], [step.grad_norm for step in result.steps]),
        ):
            axis.plot(*smoothed(values), **style)
        values = [epoch["map_50"] for epoch in result.epochs]
        axes[1, 1].plot(at_steps(values), values, "o-", **style)
    limit(axes[0, 0], LOSS_CLAMP, f"the clamp: {LOSS_CLAMP:g}")
    limit(axes[1, 0], GRAD_NORM_LIMIT, f"exploding: above {GRAD_NORM_LIMIT:g}")
    limit(axes[1, 1], SEED_MAP, f"no convergence: below {SEED_MAP}")
    axes[1, 0].set_yscale("log")
    axes[1, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _name(axes[0, 0], "DFL loss, as each training has it", "nats", "step")
    _name(axes[0, 1], "Box loss", "1 − CIoU, weighted mean", "step")
    _name(axes[1, 0], "Gradient norm", "L2, before clipping", "step")
    _name(axes[1, 1], "Validation mAP@0.5", "mAP", "epoch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def _name(axis: Axes, title: str, unit: str, along: str) -> None:
    axis.set(title=title, ylabel=unit, xlabel=along)
    axis.spines[["top", "right"]].set_visible(False)


def _diagnosis(result: Run) -> str:
    assert result.report is not None
    found = [f"{finding.severity} {finding.code}" for finding in result.report]
    return "the doctor: " + (", ".join(found) or "nothing")
