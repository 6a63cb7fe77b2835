"""How time is taken: interleaved rounds and minima on CPUs, triton.testing on CUDA."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contenders import Contender
from .gate import as_tuple, upstream_for

Context = Callable[[], contextlib.AbstractContextManager[Any]]
Time = dict[str, float]


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        label: its name.
        call: what is timed; takes what `prepare` returned, if there is one.
        prepare: runs before each call, untimed.
        context: holds around prepare and call.
    """

    label: str
    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    context: Context = contextlib.nullcontext


@dataclass(frozen=True)
class Effort:
    """How long to measure on a CPU.

    Attributes:
        rounds: in each, every work is sampled once, in a random order.
        least: seconds that a sample lasts at least, by repeating the call.
        limit: seconds after which no round begins, once there are three.
    """

    rounds: int
    least: float
    limit: float = math.inf


def passes(contender: Contender, leaf: Tensor) -> dict[str, Work]:
    """A contender's forward (without grad), backward alone, and both, as works."""
    function, plain = contender.function, leaf.detach()
    trained = plain.clone().requires_grad_()
    upstream = upstream_for(as_tuple(function(trained)))
    # The graph of a CUDA backward is made once; freeing it frees what eager peers must recompute.
    retain = leaf.device.type != "cpu"

    def backward(results: Any) -> Any:
        return torch.autograd.grad(as_tuple(results), trained, upstream, retain_graph=retain)

    return {
        "forward": Work(contender.label, lambda: function(plain), context=torch.no_grad),
        "backward": Work(contender.label, backward, prepare=lambda: function(trained)),
        "both": Work(
            contender.label,
            lambda: torch.autograd.grad(as_tuple(function(trained)), trained, upstream),
        ),
    }


def copy_work(label: str, total_bytes: int, device: str) -> Work:
    """A copy that reads and writes so many bytes in all."""
    source = torch.ones(max(total_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return Work(label, lambda: target.copy_(source))


def measure(works: Sequence[Work], effort: Effort, device: str) -> dict[str, Time]:
    """The seconds per call of each work.

    Args:
        works: what to time, labels all different.
        effort: how long.
        device: a CUDA device's times are triton.testing's.

    Returns:
        By label: minimum, median, spread (interquartile range / median) and the numbers of rounds
        and of calls in a sample; on CUDA "graph" too, the time in a CUDA graph.
    """
    if torch.device(device).type == "cuda":
        return {work.label: _cuda_time(work) for work in works}
    order = list(works)
    calls = {
        work.label: max(1, math.ceil(effort.least / _pilot(work, effort.least))) for work in works
    }
    samples: dict[str, list[float]] = {work.label: [] for work in works}
    shuffled = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for done in range(effort.rounds):
            if done >= 3 and time.perf_counter() - began > effort.limit:
                break
            shuffled.shuffle(order)
            for work in order:
                samples[work.label].append(_sample(work, calls[work.label]))
    finally:
        if collecting:
            gc.enable()
    return {
        label: {**summary(values), "rounds": len(values), "calls": calls[label]}
        for label, values in samples.items()
    }


def summary(values: Sequence[float]) -> Time:
    """Minimum, median, and spread: the interquartile range over the median."""
    median = statistics.median(values)
    spread = 0.0
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        spread = (third - first) / median
    return {"minimum": min(values), "median": median, "spread": spread}


def _pilot(work: Work, least: float) -> float:
    """A first idea of the time of a call, after calls that warm up."""
    first = _sample(work, 2)
    if first > 10 * least:
        return first
    return max(min(_sample(work, 1) for _ in range(3)), 1e-7)


def _sample(work: Work, calls: int) -> float:
    call, prepare, clock = work.call, work.prepare, time.perf_counter
    with work.context():
        if prepare is None:
            began = clock()
            for _ in range(calls):
                call()
            return (clock() - began) / calls
        total = 0.0
        for _ in range(calls):
            state = prepare()
            began = clock()
            call(state)
            total += clock() - began
        return total / calls


def _cuda_time(work: Work) -> Time:
    """By do_bench, which clears the cache between calls, and by do_bench_cudagraph."""
    from triton import testing

    with work.context():
        if work.prepare is None:
            call = work.call
        else:
            state = work.prepare()

            def call() -> Any:
                return work.call(state)

        values = [ms / 1e3 for ms in testing.do_bench(call, return_mode="all")]
        found = {**summary(values), "rounds": len(values), "calls": 1}
        if work.prepare is None:  # a backward alone cannot be captured apart from its forward
            graph = testing.do_bench_cudagraph(call, return_mode="all")
            found["graph"] = min(graph) / 1e3
    return found
