"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..doctor import Report, watch
from .config import Config
from .evaluate import Detections, detect, mean_average_precision
from .glyphs import Digits, load_digits
from .losses import Losses, losses
from .model import Detector, anchors
from .scenes import Scenes, compose


@dataclasses.dataclass(frozen=True)
class Step:
    """The numbers of one training step; see `losses.Losses`."""

    total: float
    box: float
    classes: float
    dfl: float
    floor: float
    grad_norm: float  # over all parameters, before it was clipped
    levels: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a training run leaves behind."""

    config: Config
    steps: list[Step]
    epochs: list[dict[str, float]]
    scenes: Scenes
    detections: Detections
    seconds: float
    threads: int  # of one operation; the scenes are made by another thread
    report: Report | None = None  # the doctor's, if it watched


def train(
    config: Config,
    on_step: Callable[[int, Step], None] = lambda epoch, step: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, summary: None,
    *,
    watched: bool = False,
) -> Run:
    """Train and validate a detector; the same config gives the same numbers on the same machine.

    Args:
        config: what to train.
        on_step: called after every step with the number of the epoch, from 0.
        on_epoch: called after every epoch with its mean losses, seconds and validation mAP.
        watched: let the doctor look at the first steps; it changes no number.
    """
    threads = torch.get_num_threads()
    if torch.device(config.device).type == "cpu":
        # Operations this small gain little from a second thread, and wait long for it where another
        # program wants the core; it makes the scenes instead. Sums keep their order, too.
        torch.set_num_threads(1)
    try:
        return _train(config, on_step, on_epoch, watched)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: Config,
    on_step: Callable[[int, Step], None],
    on_epoch: Callable[[int, dict[str, float]], None],
    watched: bool,
) -> Run:
    began = time.perf_counter()
    train_digits, validation_digits = (part.to(config.device) for part in load_digits(config.seed))
    # Streams of their own, so that the validation scenes do not depend on what was trained before.
    generator = torch.Generator(config.device).manual_seed(2 * config.seed)
    held_out = torch.Generator(config.device).manual_seed(2 * config.seed + 1)
    scenes = compose(validation_digits, config.validation_scenes, config, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = Detector(config.head_bins, config.width)
    model = model.to(config.device).to(memory_format=torch.channels_last)
    points, strides = anchors(config.image_size, config.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, config))

    batches = _batches(train_digits, config, generator)
    steps: list[Step] = []
    epochs: list[dict[str, float]] = []
    watcher = watch(model, num_bins=config.num_bins) if watched else None
    with watcher or contextlib.nullcontext():
        for epoch in range(config.epochs):
            epoch_began = time.perf_counter()
            for _ in range(config.steps_per_epoch):
                batch = next(batches)
                images = batch.images.contiguous(memory_format=torch.channels_last)
                box_logits, class_logits = model(images)
                static = len(steps) < config.static_steps
                result = losses(
                    box_logits, class_logits, points, strides, batch, config,
                    static=static, watcher=watcher,
                )  # fmt: skip
                optimizer.zero_grad()
                result.total.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                schedule.step()
                steps.append(_step(result, norm))
                on_step(epoch, steps[-1])
            detections = detect(model, points, strides, scenes.images, config)
            recent = steps[-config.steps_per_epoch :]
            summary = {
                name: sum(getattr(step, name) for step in recent) / len(recent)
                for name in ("box", "classes", "dfl", "floor", "grad_norm")
            }
            summary |= mean_average_precision(detections, scenes)
            summary["seconds"] = time.perf_counter() - epoch_began
            epochs.append(summary)
            on_epoch(epoch, summary)
    seconds = time.perf_counter() - began
    return Run(
        config, steps, epochs, scenes, detections, seconds, torch.get_num_threads(),
        watcher.report if watcher else None,
    )  # fmt: skip


def _batches(digits: Digits, config: Config, generator: torch.Generator) -> Iterator[Scenes]:
    """The scenes of each step, made by a thread of its own while the step before is under way."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(compose, digits, config.batch_size, config, generator)
        while True:
            batch = coming.result()
            coming = maker.submit(compose, digits, config.batch_size, config, generator)
            yield batch


def _step(result: Losses, norm: Tensor) -> Step:
    scalars = (result.total, result.box, result.classes, result.dfl, result.floor, norm)
    # One transfer, hence one wait for the device.
    numbers = torch.cat((torch.stack(scalars), result.levels)).tolist()
    total, box, classes, dfl, floor, grad_norm, *levels = numbers
    return Step(total, box, classes, dfl, floor, grad_norm, tuple(levels))


def _rate(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warm = min(config.warmup_steps, config.steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(config.steps - warm, 1)))
