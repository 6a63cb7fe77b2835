"""The picture: where the targets of each level lie on the bins, and where the clamp is."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .findings import Level
from .report import Report
from .words import number, percent

BLUE, RED, GREY = "#2563a8", "#d6453d", "#8a8f98"


def draw(report: Report, path: Path) -> None:
    """Write a histogram for each level as PNG."""
    levels = report.levels
    figure = Figure(figsize=(9, 1.2 + 1.9 * len(levels)), layout="constrained")
    rows = figure.subplots(len(levels), 1, sharex=True, squeeze=False)
    for axis, level in zip(rows[:, 0], levels, strict=True):
        _histogram(axis, level)
    rows[-1, 0].set_xlabel("bin")
    verdict = "healthy" if report.healthy else f"start with {report.findings[0].code}"
    figure.suptitle(f"Targets on {report.num_bins} bins: {verdict}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _histogram(axis: Axes, level: Level) -> None:
    last = len(level.counts) - 2  # the number of the last bin
    places = [-1.0, *(k + 0.5 for k in range(last)), last + 1.0]
    shares = [100 * count / max(level.count, 1) for count in level.counts]
    colours = [RED, *[BLUE] * last, RED]
    axis.bar(places, shares, width=0.9, color=colours)
    axis.axvline(last, color=GREY, ls="--", lw=1)
    axis.margins(y=0.25)
    top = axis.get_xaxis_transform()
    axis.text(last + 0.1, 0.95, "clamp", color=GREY, va="top", transform=top)
    name = "all targets" if level.stride is None else f"stride {number(level.stride)}"
    axis.set_title(
        f"{name}: {level.count} sides, {percent(level.below)} below, {percent(level.above)} above, "
        f"{percent(level.at_bound)} at the bound",
        fontsize=10,
        loc="left",
    )
    ticks = range(0, last + 1, max(1, last // 15))
    axis.set_xticks([-1, *ticks, last + 1], ["below", *map(str, ticks), "above"])
    axis.set_ylabel("% of sides")
    axis.spines[["top", "right"]].set_visible(False)
