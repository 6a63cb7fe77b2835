"""Host time and launches of small GPU calls, measured on a stub device that runs no kernel.

PyTorch, Triton and dflkern run their real host code; a launch costs a set time. Values are
meaningless, and only ratios of one run should be quoted. One core, no GPU.

    python -m benchmarks.host_time                  # from the repository's root
    python -m benchmarks.host_time --only "dfl_loss mean" eager --rounds 20

Times are CPU time of all threads: on one core that is wall time, less what other processes take.

Columns: launches with `.backward()` and with the upstream gradient passed in; us a call with sizes
that stay the same; us a call with a number of anchors that is new at each call; file-system calls
of a call after the first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import cuda_stub

ANCHORS, MOST, BINS = 1000, 50_000, 16
CALLS = 20  # of one timing
WARM, WARM_NEW = 20, 200  # calls before the first timing; new sizes also warm up size classes
IMAGES, GRID, CLASSES = 16, 8400, 80  # a training step of YOLOv8 at 640 pixels


@dataclass(frozen=True)
class Case:
    """One side of a comparison.

    Attributes:
        name: as the table shows it.
        step: a whole call, with `.backward()` where it trains.
        passed: the same with the upstream gradient passed in, or None.
        resized: the same as `step` on a given number of anchors, or None.
    """

    name: str
    step: Callable[[], object]
    passed: Callable[[], object] | None = None
    resized: Callable[[int], object] | None = None


@dataclass
class Row:
    """What was measured of a case; CPU times in us, the least of all rounds."""

    name: str
    launches: int
    launches_passed: int | None
    same: float
    new: float | None
    files: int


def main(argv: Sequence[str] | None = None) -> int:
    """Build the stub, run this file on it, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--launch-ns", type=int, default=2000, help="what a launch costs: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=60, help="timings of each case: %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="cases whose name contains one of these",
    )
    parser.add_argument("--backend", default="auto", help="dflkern's backend: %(default)s")
    parser.add_argument("--stub", type=Path, help="a folder to keep the stub and its caches in")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(argv)
    if "STUB_LAUNCH_NS" in os.environ:
        return _on_the_stub(arguments)
    if reason := cuda_stub.missing():
        print(f"benchmarks.host_time: {reason}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = cuda_stub.build((arguments.stub or Path(scratch)).resolve())
        environment = cuda_stub.environment(folder, LAUNCH_NS=arguments.launch_ns)
        command = [sys.executable, "-m", "benchmarks.host_time", *(argv or sys.argv[1:])]
        return subprocess.run(command, env=environment, check=False).returncode


def _on_the_stub(arguments: argparse.Namespace) -> int:
    import dflkern

    warnings.filterwarnings("ignore")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with dflkern.use_backend(arguments.backend):
        rows = measure(
            [case for case in cases() if any(text in case.name for text in arguments.only)],
            arguments.rounds,
        )
    print(f"host time on a stub device, {arguments.launch_ns / 1000:g} us a launch, one core\n")
    print(table(rows))
    for line in verdicts({row.name: row for row in rows}):
        print(line)
    if arguments.out:
        record = {"launch_ns": arguments.launch_ns, "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def cases() -> Iterator[Case]:
    """Every case, dflkern first."""
    import dflkern

    n = float(ANCHORS)
    yield loss_case("dfl_loss mean", lambda z, t: dflkern.dfl_loss(z, t, reduction="mean"))
    yield loss_case("dfl_loss none", lambda z, t: dflkern.dfl_loss(z, t))
    yield loss_case(
        "dfl_loss side_mean", lambda z, t: dflkern.dfl_loss(z, t, reduction="side_mean")
    )
    weights = torch.empty(MOST, 1, device="cuda")
    yield loss_case(
        "dfl_loss sum, weight, normalizer",
        lambda z, t: dflkern.dfl_loss(
            z, t, weight=weights[: len(t)], reduction="sum", normalizer=n
        ),
    )
    yield loss_case("eager", eager_loss)
    yield loss_case("torch.compile", torch.compile(hat_loss, dynamic=True))
    head = torch.empty(1, 4, BINS, GRID, device="cuda")
    positions = torch.arange(BINS, device="cuda").view(1, 1, BINS, 1)
    yield Case("decode without grad", no_grad(lambda: dflkern.dfl_decode(head, dim=2)))
    yield Case("decode without grad, eager", no_grad(lambda: (head.softmax(2) * positions).sum(2)))
    yield Case("box path of a training step", box_step())


def loss_case(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Forward and backward of a loss of (anchors, 4, bins) logits and (anchors, 4) targets."""
    all_logits = torch.empty(MOST, 4, BINS, device="cuda")
    all_targets = torch.empty(MOST, 4, device="cuda")
    logits = all_logits[:ANCHORS].clone().requires_grad_()
    targets = all_targets[:ANCHORS].clone()
    whole = torch.empty_like(loss(all_logits, all_targets))

    def upstream(value: Tensor) -> Tensor | None:
        return whole[: len(value)] if value.ndim else None

    def step() -> None:
        value = loss(logits, targets)
        value.backward(upstream(value))
        logits.grad = None

    def passed() -> None:
        value = loss(logits, targets)
        given = upstream(value)
        torch.autograd.grad(value, logits, whole if given is None else given)

    def resized(anchors: int) -> None:
        value = loss(all_logits[:anchors].detach().requires_grad_(), all_targets[:anchors])
        value.backward(upstream(value))

    return Case(name, step, passed, resized)


def eager_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Two-bin cross entropy as detectors write it: one log_softmax, two gathers."""
    target = target.clamp(0, BINS - 1.01)
    left = target.long()
    right_weight = (target - left).view(-1, 1)
    log_p = logits.view(-1, BINS).log_softmax(-1)
    i = left.view(-1, 1)
    picked = log_p.gather(1, i) * (1 - right_weight) + log_p.gather(1, i + 1) * right_weight
    return -picked.mean()


def hat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The same without gathers, which a compiler fuses: the two-bin target is a hat function."""
    target = target.clamp(0, BINS - 1.01)
    bins = torch.arange(BINS, device=target.device)
    wanted = (1 - (target.unsqueeze(-1) - bins).abs()).clamp(min=0)
    return (torch.logsumexp(logits, -1) - (wanted * logits).sum(-1)).mean()


def no_grad(call: Callable[[], object]) -> Callable[[], object]:
    """The call under torch.no_grad()."""
    return torch.no_grad()(call)


def box_step() -> Callable[[], None]:
    """decode_boxes, box_loss and backward for a batch."""
    import dflkern

    logits = torch.empty(IMAGES, 4, BINS, GRID, device="cuda", requires_grad=True)
    points, stride = torch.empty(GRID, 2, device="cuda"), torch.empty(GRID, 1, device="cuda")
    targets = torch.empty(IMAGES, GRID, 4, device="cuda")
    scores = torch.empty(IMAGES, GRID, CLASSES, device="cuda")
    total = torch.empty((), device="cuda")
    foreground = torch.empty(IMAGES, GRID, dtype=torch.bool, device="cuda")
    upstream = torch.empty((), device="cuda")

    def step() -> None:
        dflkern.decode_boxes(logits.detach(), points, stride, dim=2)
        losses = dflkern.box_loss(
            logits, points, targets, scores, total, dim=2, foreground=foreground
        )
        torch.autograd.grad(losses, logits, (upstream, upstream))

    return step


def measure(cases: Sequence[Case], rounds: int) -> list[Row]:
    """Measure the cases interleaved."""
    rows = [_count(case) for case in cases]
    sizes = [iter(sizes) for sizes in _new_sizes(len(cases), WARM_NEW + 1 + rounds * CALLS)]
    for case, row, left in zip(cases, rows, sizes, strict=True):
        if case.resized:
            for _ in range(WARM_NEW):
                case.resized(next(left))
            _, files = _counted(lambda: case.resized(next(left)))  # noqa: B023
            row.files = max(row.files, files)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for case, row, left in zip(cases, rows, sizes, strict=True):
            row.same = min(row.same, _time(case.step))
            if case.resized:
                row.new = min(row.new, _time(lambda: case.resized(next(left))))  # noqa: B023
        gc.collect(0)
    gc.enable()
    return rows


def _count(case: Case) -> Row:
    for _ in range(WARM):
        case.step()
    launches, files = _counted(case.step)
    passed = None
    if case.passed:
        case.passed()
        passed, _ = _counted(case.passed)
    infinite = float("inf")
    return Row(case.name, launches, passed, infinite, infinite if case.resized else None, files)


def _counted(call: Callable[[], object]) -> tuple[int, int]:
    before = cuda_stub.counters()
    call()
    counts = cuda_stub.counted(before)
    return counts["runtime_launches"] + counts["driver_launches"], counts["file_calls"]


def _new_sizes(cases: int, count: int) -> list[list[int]]:
    """Numbers of anchors for each case, in random order, none of them twice in the process."""
    sizes = random.Random(1).sample(range(ANCHORS, MOST), cases * count)
    return [sizes[i::cases] for i in range(cases)]


def _time(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | launches | with gradient passed in | same N, us | new N, us | file-system calls |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        passed = "" if row.launches_passed is None else str(row.launches_passed)
        new = "" if row.new is None else f"{row.new:.1f}"
        lines.append(
            f"| {row.name} | {row.launches} | {passed} | {row.same:.1f} | {new} | {row.files} |"
        )
    return "\n".join(lines)


def verdicts(rows: dict[str, Row]) -> Iterator[str]:
    """Each goal with what was measured."""

    def judge(what: str, value: float, limit: float) -> str:
        return f"{'met   ' if value <= limit else 'missed'} {what}: {value:.2f}, at most {limit:g}"

    mean, eager, compiled = (rows.get(n) for n in ("dfl_loss mean", "eager", "torch.compile"))
    if mean and eager and compiled:
        yield judge("dfl_loss mean / eager", mean.same / eager.same, 0.5)
        yield judge("dfl_loss mean / torch.compile", mean.same / compiled.same, 0.6)
    for name, row in rows.items():
        if not name.startswith("dfl_loss"):
            continue
        if mean and row is not mean:
            yield judge(f"{name} / mean", row.same / mean.same, 1.2)
        yield judge(f"{name}: a new N adds, us", row.new - row.same, 5)
        yield judge(f"{name}: launches, gradient passed in", row.launches_passed, 3)
        yield judge(f"{name}: file-system calls", row.files, 0)
    if decode := rows.get("decode without grad"):
        yield judge("decode without grad, us", decode.same, 15)
    if box := rows.get("box path of a training step"):
        yield judge("box path, us", box.same, 120)
        yield judge("box path, launches", box.launches, 5)


if __name__ == "__main__":
    sys.exit(main())
