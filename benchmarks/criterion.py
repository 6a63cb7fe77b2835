"""A training step's criterion on a CPU: DetectionLoss beside Ultralytics' v8DetectionLoss.

    python -m benchmarks.criterion                  # from the repository's root; minutes
    python -m benchmarks.criterion --rounds 5 --json runs/criterion.json

Both sides get the same raw outputs of a YOLOv8n head, 16 images of 640 pixels, and the same
objects: 12 an image, or one image of 300. Timed are the losses and the gradients of both outputs,
in interleaved rounds: wall time with all threads, and CPU time with one thread, which other
processes on the machine disturb less. Ratios are those of the minima. Kernels are counted by
torch.profiler; memory is the peak of what the assignment allocates through PyTorch, without what
the C++ kernel allocates for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dflkern
from dflkern.bench import machine
from dflkern.bench.counts import KERNELS, count_kernels
from dflkern.bench.timing import Effort, Work, measure

IMAGES, IMAGE, CLASSES, BINS, STRIDES = 16, 640, 80, 16, (8, 16, 32)
SIZES = [(IMAGE // stride, IMAGE // stride) for stride in STRIDES]
OBJECTS = {"12 objects an image": [12] * IMAGES, "one image of 300": [300] + [0] * (IMAGES - 1)}
GOALS = {"12 objects an image": 6, "one image of 300": 20}
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
RESULTS = Path(__file__).parent / "results" / "criterion.json"


def criterion() -> Any:
    """Ultralytics' loss for a head of which it reads the settings alone."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils.loss import v8DetectionLoss

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.args = nn.Parameter(torch.zeros(1)), get_cfg()
            head = {"stride": torch.tensor(STRIDES).float(), "nc": CLASSES, "reg_max": BINS}
            self.model = [types.SimpleNamespace(**head)]

    return v8DetectionLoss(Model())


def steps(counts: list[int]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By name, functions that return the losses and both gradients of one step."""
    g = torch.Generator().manual_seed(0)
    points, stride = dflkern.make_anchors(SIZES, STRIDES)
    boxes = torch.randn(IMAGES, 4 * BINS, len(points), generator=g).requires_grad_()
    classes = (torch.randn(IMAGES, CLASSES, len(points), generator=g) - 4).requires_grad_()
    total = sum(counts)
    size = 10 + torch.rand(total, 2, generator=g) * (60 if total == 300 else 250)
    centre = torch.rand(total, 2, generator=g) * IMAGE
    gt_boxes = torch.cat((centre - size / 2, centre + size / 2), 1).clamp(0, IMAGE)
    labels = torch.randint(0, CLASSES, (total,), generator=g)
    image = torch.repeat_interleave(torch.arange(IMAGES), torch.tensor(counts))
    first, second = gt_boxes.chunk(2, 1)
    batch = {
        "batch_idx": image.float(), "cls": labels[:, None].float(),
        "bboxes": torch.cat(((first + second) / 2, second - first), 1) / IMAGE,
    }  # fmt: skip
    feats = [torch.zeros(IMAGES, 1, *size) for size in SIZES]
    loss, theirs = dflkern.DetectionLoss(CLASSES, BINS, strides=STRIDES), criterion()

    def ours() -> tuple[Tensor, ...]:
        found = loss(boxes, classes, gt_boxes, labels, image, anchor_points=points, stride=stride)
        return found.total, *torch.autograd.grad(found.total, (boxes, classes))

    def ultralytics() -> tuple[Tensor, ...]:
        total = theirs({"boxes": boxes, "scores": classes, "feats": feats}, batch)[0].sum() / IMAGES
        return total, *torch.autograd.grad(total, (boxes, classes))

    def assign() -> None:
        with torch.no_grad():
            logits = boxes.unflatten(1, (4, BINS))
            decoded = dflkern.decode_boxes(logits, points, stride, dim=2)
            dflkern.task_aligned_assign(
                classes, decoded, points, stride, gt_boxes, labels, image, dim=1, min_side=16
            )

    return {"dflkern": ours, "ultralytics": ultralytics, "assign": assign}


def peak_memory(step: Callable[[], Any], inside: str) -> int:
    """The most bytes that PyTorch's allocator held for an operator or module, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns()) for e in events if e.name() == inside]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() != "[memory]":
            continue
        if any(begin <= event.start_ns() <= end for begin, end in spans):
            held += event.nbytes()
            most = max(most, held)
    return most


def run(rounds: int) -> dict[str, Any]:
    """All that is measured, as the JSON holds it."""
    found: dict[str, Any] = {**machine.describe("cpu", torch.get_num_threads()), "cases": {}}
    found["counted"] = KERNELS
    for name, counts in OBJECTS.items():
        sides = steps(counts)
        assign = sides.pop("assign")
        mine, peer = (sides[side]() for side in ("dflkern", "ultralytics"))
        gaps = [
            float(((a - b).norm() / b.norm()).detach()) for a, b in zip(mine, peer, strict=True)
        ]
        works = [Work(side, step) for side, step in sides.items()]
        times = measure(works, Effort(rounds, 0.0), "cpu")
        kernels = {work.label: count_kernels(work, "cpu") for work in works}
        ratio = times["ultralytics"]["minimum"] / times["dflkern"]["minimum"]
        found["cases"][name] = {
            "times": times, "kernels": kernels, "ratio": ratio, "goal": GOALS[name],
            "one_thread": one_thread(sides, rounds),
            "differences": dict(zip(("total", "box_logits", "class_logits"), gaps, strict=True)),
            "assignment_peak_bytes": peak_memory(assign, "dflkern::_cpu_task_aligned_assign"),
        }  # fmt: skip
        print(line(name, found["cases"][name]), flush=True)
    return found


def one_thread(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least CPU time of each side with one thread, in interleaved rounds, and their ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    least = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, step in sides.items():
            began = time.process_time()
            step()
            least[name] = min(least[name], time.process_time() - began)
    torch.set_num_threads(threads)
    return {**least, "ratio": least["ultralytics"] / least["dflkern"]}


def line(name: str, case: dict[str, Any]) -> str:
    """A case in words."""
    words = [f"{name} (goal {case['goal']}x): {case['ratio']:.1f}x"]
    for side, kernels in case["kernels"].items():
        wall, cpu = case["times"][side]["minimum"], case["one_thread"][side]
        words.append(
            f"{side} {1e3 * wall:.1f} ms, one thread {1e3 * cpu:.1f} ms, {kernels} kernels"
        )
    words.append(f"{case['one_thread']['ratio']:.1f}x with one thread")
    words.append(f"assignment {case['assignment_peak_bytes'] / 1e6:.1f} MB")
    words += [f"{each} differ by {value:.1e}" for each, value in case["differences"].items()]
    return "; ".join(words)


def main() -> int:
    """Measure in a process that keeps freed memory, and write the results."""
    parser = argparse.ArgumentParser(description="The criterion of a step beside Ultralytics'.")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds (default 30)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the results")
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        # glibc reads them when a process starts
        command = [sys.executable, "-m", "benchmarks.criterion", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **SETTINGS}, check=False).returncode
    results = run(given.rounds)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
