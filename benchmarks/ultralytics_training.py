"""Ultralytics' own training on a CPU with and without `patch()`: the losses, and the loss's time.

The real trainer trains a model from its YAML file on generated images, twice with the same seed;
the losses of all steps stand side by side. Then the criterion of a real batch is timed, forward and
backward down to the head's output, and the part of it that DFL is: decode, IoU, DFL.

    python benchmarks/ultralytics_training.py

Exit code 1 if the losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from ultralytics import YOLO

from dflkern.adapters.ultralytics import patch
from dflkern.bench.command import KEPT
from dflkern.bench.machine import describe
from dflkern.bench.timing import Effort, Work, measure
from dflkern.bench.ultralytics_step import criterion_step

RESULT = Path(__file__).resolve().parent / "results" / "ultralytics.json"
COLOURS = ("red", "green", "blue")
TOLERANCE = 1e-3  # relative; rounding grows from step to step, see tests/test_ultralytics_models.py
PARTS = ("box", "cls", "dfl")
UPSTREAM, PATCHED = "Ultralytics", "dflkern"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, time, print, record; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolov8n")
    parser.add_argument("--epochs", type=int, default=6, help="of 4 steps each")
    parser.add_argument("--batch", type=int, default=16, help="images in the timed loss")
    parser.add_argument("--size", type=int, default=640, help="pixels of these images")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    if any(os.environ.get(name) != value for name, value in KEPT.items()):
        # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})

    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        losses = {UPSTREAM: train(arguments.model, data, arguments.epochs)}
        with patch() as handle:
            losses[PATCHED] = train(arguments.model, data, arguments.epochs)
    difference = show(losses)
    torch.set_num_threads(arguments.threads)  # the trainer leaves one core to its data loaders
    times = time_loss(arguments.model, arguments.batch, arguments.size, arguments.rounds)
    for what, found in times.items():
        upstream, patched = (found[label]["minimum"] for label in (UPSTREAM, PATCHED))
        print(
            f"{what}, {arguments.batch} images of {arguments.size} pixels: {upstream * 1e3:.1f} ms "
            f"before, {patched * 1e3:.1f} ms after, {upstream / patched:.2f}×"
        )
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    settings["allocator"] = KEPT
    record = {
        **describe("cpu", arguments.threads),
        "settings": settings,
        "replaced": handle.replaced,
        "losses": losses,
        "largest_relative_difference": difference,
        "seconds": times,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(not difference <= TOLERANCE)


def show(losses: dict[str, list[list[float]]]) -> float:
    """Print both sides' losses, step by step; the largest relative difference."""
    print("\nstep  " + "   ".join(f"{part}: {UPSTREAM} {PATCHED}" for part in PARTS))
    for step, pair in enumerate(zip(*losses.values(), strict=True), 1):
        values = (f"{before:12.6f} {after:12.6f}" for before, after in zip(*pair, strict=True))
        print(f"{step:4d}  " + "   ".join(values))
    before, after = (torch.tensor(each) for each in losses.values())
    difference = float(((after - before).abs() / before.abs()).max())
    print(f"largest relative difference: {difference:.1e}")
    return difference


def write_data(folder: Path) -> Path:
    """16 images of coloured rectangles for training and 4 to validate; the path of their YAML."""
    random, size = np.random.default_rng(0), 160
    for split, count in (("train", 16), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image, lines = Image.new("RGB", (size, size), "gray"), []
            for _ in range(random.integers(1, 4)):
                (w, h), colour = random.integers(20, 70, 2), random.integers(len(COLOURS))
                x, y = random.integers(0, (size - w, size - h))
                corners = [int(value) for value in (x, y, x + w, y + h)]
                ImageDraw.Draw(image).rectangle(corners, fill=COLOURS[colour])
                box = (x + w / 2, y + h / 2, w, h)
                lines.append(" ".join(map(str, (colour, *(value / size for value in box)))))
            image.save(folder / "images" / split / f"{index}.png")
            (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
    path = folder / "data.yaml"
    names = "".join(f"  {i}: {colour}\n" for i, colour in enumerate(COLOURS))
    path.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return path


def train(model: str, data: Path, epochs: int) -> list[list[float]]:
    """The three losses of each step of the real trainer."""
    yolo, losses = YOLO(f"{model}.yaml"), []

    def keep(trainer: Any) -> None:
        items = trainer.loss_items  # named in Ultralytics 8.4, a vector in 8.3
        values = items.values() if isinstance(items, dict) else items
        losses.append([float(value) for value in values])

    yolo.add_callback("on_train_batch_end", keep)
    yolo.train(
        data=str(data), epochs=epochs, imgsz=160, batch=4, device="cpu", workers=0, seed=0,
        plots=False, val=False, verbose=False, project=str(data.parent / "runs"),
    )  # fmt: skip
    return losses


def time_loss(model: str, images: int, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of the criterion and of its DFL part, each forward and backward, for both sides."""

    def both(forward: Callable[[Tensor], Tensor], leaf: Tensor) -> dict[str, Any]:
        def call() -> None:
            torch.autograd.grad(forward(leaf), leaf)

        works = [Work(UPSTREAM, call), Work(PATCHED, call, context=patch)]
        return measure(works, Effort(rounds, 0), "cpu")

    whole, part = criterion_step(model, images, size)
    return {"the loss": both(*whole), "its decode, IoU and DFL": both(*part)}


if __name__ == "__main__":
    sys.exit(main())
