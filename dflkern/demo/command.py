"""What the command does, once its packages are there: train with progress, judge, write."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import decode_boxes, dfl_loss, explain, use_backend
from ..commands.console import open_console
from .config import Config
from .model import anchors
from .pictures import draw_curves, draw_detections
from .report import metrics, table, write_json, write_predictions
from .train import Run, Step, train

WIDTH = 110  # of lines in a file or a pipe


def choose_device(name: str | None) -> str:
    """The device to run on.

    Raises:
        RuntimeError: if the named one is not there, in words for the user.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"The demo cannot run on the device {name!r}: {reason}") from error
    return name


def choose_decode_backend(backend: str, device: str) -> str:
    """The backend for decode_boxes: the named one, or auto where that has no kernel for it yet.

    Raises:
        RuntimeError: if the named backend cannot serve the loss on this device.
    """
    logits = torch.zeros(1, 4, 16, 1, device=device)
    target = torch.zeros(1, 4, 1, device=device)
    points, strides = torch.zeros(1, 2, device=device), torch.ones(1, 1, device=device)
    with use_backend(backend):
        dfl_loss(logits, target, dim=2)
        try:
            decode_boxes(logits, points, strides, dim=2)
        except RuntimeError:
            return "auto"
    return backend


def run(config: Config, out: Path, began: float) -> int:
    """Train, report, write the four files; 0 if every expectation is met, else 1.

    Args:
        config: what to train.
        out: the folder to write into.
        began: when the command was started, in time.perf_counter's seconds.
    """
    console = open_console(WIDTH)
    out.mkdir(parents=True, exist_ok=True)  # before the training, which a full disk should not cost
    _introduce(console, config)
    result = train_with_progress(console, config)

    write_predictions(result, out / "predictions.npz")
    draw_curves(result, out / "curves.png")
    draw_detections(result, out / "detections.png")
    numbers = metrics(result, time.perf_counter() - began)
    write_json(numbers, out / "metrics.json")
    console.print()
    console.print(table(numbers))
    console.print(
        f"{numbers['seconds']:.0f} s; wrote curves.png, detections.png, metrics.json and "
        f"predictions.npz to {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0 if all(row["met"] for row in numbers["expectations"]) else 1


def _introduce(console: Console, config: Config) -> None:
    count = len(anchors(config.image_size, "cpu")[0])
    logits = torch.zeros(1, 4, config.num_bins, device=config.device)
    with use_backend(config.backend):
        _, *reasons = explain("dfl_loss", logits, logits[..., 0]).splitlines()
    lines = [
        f"{config.epochs} epochs of {config.steps_per_epoch} steps of {config.batch_size} scenes, "
        f"{config.image_size}×{config.image_size} pixels, {count} anchors on P2 to P5, "
        f"K = {config.num_bins}, on {config.device}",
        "dfl_loss",
        *reasons,
    ]
    if config.decode_backend != config.backend:
        lines.append(
            f"decode_boxes: {config.backend} has no kernel for it yet, "
            f"so it runs on {config.decode_backend}"
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def train_with_progress(console: Console, config: Config, *, watched: bool = False) -> Run:
    """Train, with a bar for each epoch in a terminal and a line for each elsewhere."""
    progress = Progress(
        TextColumn("epoch {task.fields[number]}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TextColumn("{task.fields[verdict]}", style="bold"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )
    # One task at a time, so that the bar of an epoch appears when it begins.
    tasks = [
        progress.add_task(
            "", total=config.steps_per_epoch, start=False, visible=False,
            number=f"{epoch + 1}/{config.epochs}", losses="", verdict="",
        )
        for epoch in range(config.epochs)
    ]  # fmt: skip

    def on_step(epoch: int, step: Step) -> None:
        task = progress.tasks[epoch]
        if not task.started:
            progress.start_task(tasks[epoch])
        last = task.completed + 1 == config.steps_per_epoch
        progress.update(
            tasks[epoch],
            visible=True,
            advance=1,
            losses=_losses(step.box, step.classes, step.dfl),
            verdict="validating…" if last else "",
        )

    def on_epoch(epoch: int, summary: dict[str, float]) -> None:
        losses = _losses(summary["box"], summary["classes"], summary["dfl"])
        verdict = f"mAP@0.5 {summary['map_50']:.3f}"
        progress.update(tasks[epoch], losses=losses, verdict=verdict)
        if not console.is_terminal:
            console.print(
                f"epoch {epoch + 1}/{config.epochs}  {losses} (floor {summary['floor']:.3f})  "
                f"{verdict}  {summary['seconds']:.0f} s",
                highlight=False,
            )

    with progress:
        return train(config, on_step, on_epoch, watched=watched)


def _losses(box: float, classes: float, dfl: float) -> str:
    return f"box {box:.3f}  cls {classes:5.2f}  dfl {dfl:.3f}"
