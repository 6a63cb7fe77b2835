"""What was expected, what was measured: metrics.json, predictions.npz and the final table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from .. import __version__
from ..commands.info import cpu_name
from .config import Config
from .train import Run, Step

FIRST = 5  # steps that `…_first` averages
BEFORE = 20  # steps whose median a step's box loss is compared with
SPIKE_LIMIT = 1.5  # in a sound run no step is 1.2 times that median
GRAD_NORM_LIMIT = 30.0  # in a sound run the norm stays below 10; exploding gradients pass 30 soon
DFL_LIMIT = 2.0  # nats
MAP_LIMIT = 0.5
SEED_MAP = 0.1
SEED_EPOCHS = 5

DEFINITIONS = {
    "dfl": "DFL in nats: mean over the four sides, mean over the foreground anchors of a batch "
    "weighted by their soft class targets, before any gain",
    "dfl_first": f"mean of dfl over the first {FIRST} steps",
    "dfl_last": "mean of dfl over the last quarter of the last epoch's steps",
    "dfl_entropy_floor": "the entropy of the two-bin targets, −Σ y ln y, averaged like dfl over "
    "the steps of dfl_last: no prediction can have a lower dfl",
    "box_spike": f"the largest box loss of a step divided by the median of the {BEFORE} before it",
    "grad_norm_max": "the largest L2 norm of all parameters' gradients, before clipping",
    "map50": "mAP at IoU 0.5 over the ten digits on the validation scenes, by torchmetrics, after "
    "the last epoch; map75 at 0.75, map from 0.5 to 0.95",
    "levels": "share of the foreground weight on P2 to P5, in the steps of dfl_last",
    "seconds": "from the start of the command to the writing of this file",
}


def metrics(run: Run, seconds: float) -> dict[str, Any]:
    """Everything that metrics.json holds."""
    config, steps, epochs = run.config, run.steps, run.epochs
    first, last = steps[:FIRST], steps[-last_steps(config) :]
    numbers: dict[str, Any] = {
        "dfl_first": _mean(first, "dfl"),
        "dfl_last": _mean(last, "dfl"),
        "dfl_entropy_floor": _mean(last, "floor"),
        "box_first": _mean(first, "box"),
        "box_last": _mean(last, "box"),
        "box_spike": spike([step.box for step in steps]),
        "grad_norm_max": largest([step.grad_norm for step in steps]),
        "grad_norm_median": statistics.median(step.grad_norm for step in steps),
        "map50": epochs[-1]["map_50"],
        "map75": epochs[-1]["map_75"],
        "map": epochs[-1]["map"],
        "levels": [statistics.fmean(step.levels[i] for step in last) for i in range(4)],
        "seconds": seconds,
    }
    numbers["expectations"] = expectations(numbers)
    numbers["epochs"] = config.epochs
    numbers["history"] = epochs
    numbers["definitions"] = DEFINITIONS
    numbers["config"] = dataclasses.asdict(config)
    numbers["versions"] = _versions()
    numbers["machine"] = _machine(config.device, run.threads)
    return numbers


def last_steps(config: Config) -> int:
    """How many steps count as the end of the training."""
    return max(1, config.steps_per_epoch // 4)


def spike(losses: list[float]) -> float:
    """The largest ratio of a loss to the median of those before it; NaN if that cannot be said."""
    ratios = [
        losses[i] / statistics.median(losses[i - BEFORE : i]) for i in range(BEFORE, len(losses))
    ]
    return largest(ratios) if all(math.isfinite(loss) for loss in losses) else math.nan


def largest(values: list[float]) -> float:
    """The maximum; NaN if there is none, or if any value is NaN, which max() may pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=math.nan)


def expectations(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The four expectations, with what was measured and whether it meets them.

    A NaN meets nothing, since every comparison with it is false.
    """
    n, ratio = numbers, numbers["box_spike"]
    return [
        {
            "name": "DFL loss",
            "expected": f"falls, ends between its entropy floor and {DFL_LIMIT} nats",
            "measured": f"{n['dfl_first']:.3f} → {n['dfl_last']:.3f}, "
            f"floor {n['dfl_entropy_floor']:.3f}",
            "met": n["dfl_entropy_floor"] <= n["dfl_last"] <= DFL_LIMIT
            and n["dfl_last"] < n["dfl_first"],
        },
        {
            "name": "box loss",
            "expected": f"falls, no step above {SPIKE_LIMIT} × the median of the {BEFORE} before",
            "measured": f"{n['box_first']:.3f} → {n['box_last']:.3f}, "
            + (f"at most {ratio:.2f} × it" if math.isfinite(ratio) else "too short or not finite"),
            "met": n["box_last"] < n["box_first"] and n["box_spike"] <= SPIKE_LIMIT,
        },
        {
            "name": "gradient norm",
            "expected": f"finite in every step, at most {GRAD_NORM_LIMIT:.0f}",
            "measured": f"at most {n['grad_norm_max']:.2f}, median {n['grad_norm_median']:.2f}",
            "met": n["grad_norm_max"] <= GRAD_NORM_LIMIT,
        },
        {
            "name": "mAP@0.5",
            "expected": f"above {SEED_MAP} was asked for, above {MAP_LIMIT} is wanted",
            "measured": f"{n['map50']:.3f}",
            "met": n["map50"] > MAP_LIMIT,
        },
    ]


def table(numbers: dict[str, Any]) -> Table:
    """The final table, for rich to print."""
    epochs = numbers["epochs"]
    caption = f"after {epochs} epoch{'s' * (epochs != 1)}"
    if epochs < SEED_EPOCHS:
        caption += f"; the expectations are for {SEED_EPOCHS}"
    result = Table(title="Expected and measured", caption=caption)
    result.add_column("")
    result.add_column("expected")
    result.add_column("measured")
    result.add_column("met")
    for row in numbers["expectations"]:
        verdict = "[green]yes[/green]" if row["met"] else "[bold red]NO[/bold red]"
        result.add_row(row["name"], row["expected"], row["measured"], verdict)
    return result


def write_json(numbers: dict[str, Any], path: Path) -> None:
    """Write metrics.json; a NaN or infinity, which JSON has no word for, becomes null."""
    text = json.dumps(_plain(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_predictions(run: Run, path: Path) -> None:
    """Write every detection on the validation scenes, and the truth, as arrays."""
    found, scenes = run.detections, run.scenes
    true_image = scenes.valid.nonzero()[:, 0]
    np.savez_compressed(
        path,
        image=found.image.numpy(),
        box=found.box.numpy(),
        score=found.score.numpy(),
        label=found.label.numpy(),
        true_image=true_image.cpu().numpy(),
        true_box=scenes.boxes[scenes.valid].cpu().numpy(),
        true_label=scenes.labels[scenes.valid].cpu().numpy(),
    )


def _mean(steps: list[Step], name: str) -> float:
    return statistics.fmean(getattr(step, name) for step in steps)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "torchmetrics", "scikit-learn", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"dflkern": __version__, "python": platform.python_version(), **versions}


def _machine(device: str, threads: int) -> dict[str, Any]:
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.system(),
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine
