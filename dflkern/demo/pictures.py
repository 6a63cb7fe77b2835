"""curves.png and detections.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .. import paired_box_iou
from .config import STRIDES
from .report import DFL_LIMIT, GRAD_NORM_LIMIT, MAP_LIMIT, SEED_MAP
from .train import Run

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#f28e2b", "#3fd07c", "#ff4d4d", "#8a8f98"
LEVELS = ("#16406f", "#2f74b8", "#84b4dd", "#cfe1f2")
ROWS, COLUMNS = 3, 4
MIN_DRAWN_SCORE = 0.3


def draw_curves(run: Run, path: Path) -> None:
    """Draw the three losses, the gradient norm, mAP and the levels' shares over the training."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = figure.subplots(2, 3)
    steps, per_epoch = run.steps, run.config.steps_per_epoch

    _curve(axes[0, 0], [step.dfl for step in steps], "DFL loss", "nats, mean over sides")
    floor = [step.floor for step in steps]
    words = "floor: entropy of its targets"
    axes[0, 0].plot(at_steps(floor), floor, color=ORANGE, lw=1, label=words)
    limit(axes[0, 0], DFL_LIMIT, f"must end below {DFL_LIMIT}")
    uniform = math.log(run.config.num_bins)
    limit(axes[0, 0], uniform, f"ln {run.config.num_bins}: a uniform distribution")
    axes[0, 0].set_ylim(0, 1.12 * max([uniform, *(s.dfl for s in steps if math.isfinite(s.dfl))]))
    axes[0, 0].legend(frameon=False, fontsize=9, loc="lower left")
    _curve(axes[0, 1], [step.box for step in steps], "Box loss", "1 − CIoU, weighted mean")
    axes[0, 1].set_ylim(bottom=0)
    _curve(axes[0, 2], [step.classes for step in steps], "Class loss", "BCE, nats per unit weight")
    axes[0, 2].set_ylim(bottom=0)
    switch = run.config.static_steps + 0.5
    if switch < len(steps):
        axes[0, 2].axvline(switch, color=GREY, ls=":", lw=1)
        words = " from here on\n assigned by\n predictions"
        top = axes[0, 2].get_xaxis_transform()
        axes[0, 2].text(switch, 0.98, words, color=GREY, fontsize=9, va="top", transform=top)

    _curve(axes[1, 0], [step.grad_norm for step in steps], "Gradient norm", "L2, before clipping")
    limit(axes[1, 0], GRAD_NORM_LIMIT, f"must stay below {GRAD_NORM_LIMIT:.0f}")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylim(top=2 * GRAD_NORM_LIMIT)

    epochs = np.arange(1, len(run.epochs) + 1)
    for name, label, colour in (
        ("map_50", "IoU 0.5", BLUE),
        ("map_75", "IoU 0.75", ORANGE),
        ("map", "IoU 0.5 to 0.95", GREY),
    ):
        values = [summary[name] for summary in run.epochs]
        axes[1, 1].plot(epochs, values, "o-", color=colour, label=label)
    axes[1, 1].annotate(
        f"{run.epochs[-1]['map_50']:.3f}",
        (epochs[-1], run.epochs[-1]["map_50"]),
        xytext=(-4, 7),
        textcoords="offset points",
        ha="right",
        color=BLUE,
    )
    for value, words in ((SEED_MAP, "asked for"), (MAP_LIMIT, "wanted")):
        limit(axes[1, 1], value, f"{words}: {value}")
    axes[1, 1].set(title="Validation mAP", ylabel="mAP", xlabel="epoch", ylim=(0, 1.08))
    axes[1, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 1].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.15))

    shares = np.array([step.levels for step in steps])
    bottom = np.zeros(len(epochs))
    for level in range(len(STRIDES)):
        means = shares[:, level].reshape(len(epochs), per_epoch).mean(1)
        axes[1, 2].bar(epochs, means, 0.7, bottom, color=LEVELS[level], label=f"P{level + 2}")
        bottom = bottom + means
    axes[1, 2].set(
        title="Levels that answer for the digits",
        ylabel="share of foreground weight",
        xlabel="epoch",
        ylim=(0, 1),
    )
    axes[1, 2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 2].legend(
        frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_detections(run: Run, path: Path) -> None:
    """Draw the first validation scenes with true and predicted boxes."""
    figure = Figure(figsize=(13, 10.6), layout="constrained", facecolor="white")
    size = run.config.image_size
    for index, axis in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axis.axis("off")
        if index >= len(run.scenes.images):
            continue
        image = run.scenes.images[index, 0].cpu().numpy()
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0))
        _draw_scene(axis, run, index)
    figure.legend(
        handles=[
            Line2D([], [], color=GREEN, lw=2.5, label="true box"),
            Line2D([], [], color=ORANGE, lw=1.5, label="predicted: digit and score"),
            Line2D([], [], color=RED, lw=1.5, label="predicted, but wrong digit or IoU below 0.5"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=12,
    )
    figure.suptitle(
        f"Validation scenes: detections with a score of at least {MIN_DRAWN_SCORE} "
        f"(mAP@0.5 of all {len(run.scenes.images)} scenes: {run.epochs[-1]['map_50']:.3f})"
    )
    figure.savefig(path, dpi=100)


def _draw_scene(axis: Axes, run: Run, index: int) -> None:
    valid = run.scenes.valid[index]
    true_boxes, true_labels = run.scenes.boxes[index][valid].cpu(), run.scenes.labels[index][valid]
    for box in true_boxes.tolist():
        _rectangle(axis, box, GREEN, 2.5)
    found = run.detections
    mine = (found.image == index) & (found.score >= MIN_DRAWN_SCORE)
    drawn = zip(found.box[mine], found.score[mine], found.label[mine], strict=True)
    for box, score, label in drawn:
        same = true_boxes[true_labels.cpu() == label]
        right = len(same) > 0 and bool((paired_box_iou(box, same) >= 0.5).any())
        colour = ORANGE if right else RED
        _rectangle(axis, box.tolist(), colour, 1.3)
        x, y = box[0].item(), box[1].item()
        above = y > 7
        axis.text(
            x, y - 0.8 if above else box[3].item() + 0.8, f"{int(label)}  {score:.2f}",
            va="bottom" if above else "top", color="black", fontsize=7.5,
            bbox={"boxstyle": "square,pad=0.12", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip


def _rectangle(axis: Axes, box: list[float], colour: str, width: float) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width))


def _curve(axis: Axes, values: list[float], title: str, unit: str) -> None:
    """Every step as a faint line, and a running mean on top."""
    axis.plot(at_steps(values), values, color=BLUE, lw=0.7, alpha=0.35)
    axis.plot(*smoothed(values), color=BLUE, lw=1.8)
    axis.set(title=title, ylabel=unit, xlabel="step")


def smoothed(values: list[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and values of a running mean over a fiftieth of them."""
    window = max(1, len(values) // 50)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(smooth)) + 1 + (window - 1) / 2, smooth


def limit(axis: Axes, value: float, words: str) -> None:
    """A dashed line across, with its meaning at the right end."""
    axis.axhline(value, color=GREY, ls="--", lw=1)
    right = axis.get_yaxis_transform()
    axis.text(0.995, value, words, color=GREY, fontsize=9, ha="right", va="bottom", transform=right)


def at_steps(values: list[float]) -> list[int]:
    """1, 2, … for each value."""
    return list(range(1, len(values) + 1))
