"""Random calls with hostile values, strides and masks, against a model in NumPy.

    python -m tests.fuzz --seconds 600 --seed 1

Case i of a seed is the same whatever runs before it: `--case 1:4711` runs one again, with the same
--op, --backend and --triton. Exits with 1 if a case fails or ends the process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from typing import Any


def main() -> int:
    options = _options()
    if options.triton:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    context = multiprocessing.get_context("spawn")
    running = context.Value("q", -1)
    process = context.Process(target=_run, args=(options, running))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        seed = options.case.split(":")[0] if options.case else options.seed
        print(f"FAILED case {seed}:{running.value} ended the process: {process.exitcode}")
        return 1
    return process.exitcode


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), help="60 without --cases")
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the index of the first case")
    parser.add_argument("--op", help="one function instead of all")
    parser.add_argument("--backend", choices=("cpu", "registered", "reference"))
    parser.add_argument("--triton", action="store_true", help="Triton's kernels, interpreted: slow")
    parser.add_argument("--case", metavar="SEED:INDEX", help="this case alone")
    parser.add_argument("--failures", type=int, default=5, help="stop after so many")
    options = parser.parse_args()
    if options.seconds == float("inf") and options.cases == sys.maxsize:
        options.seconds = 60.0
    return options


def _run(options: argparse.Namespace, running: Any) -> None:
    """The cases, in a process of their own: `running` holds the one that may end it."""
    from .specs import BACKENDS, BOXES, DISTRIBUTIONS, OPS, draw

    ops = (options.op,) if options.op else OPS
    backends = (options.backend,) if options.backend else BACKENDS
    if options.triton:
        ops = tuple(op for op in ops if op in DISTRIBUTIONS + BOXES)
        backends = ("triton",)
    if options.case:
        seed, running.value = (int(part) for part in options.case.split(":"))
        spec = draw(seed, running.value, ops, backends)
        print(spec)
        sys.exit(_report(spec))
    start, failed = time.monotonic(), 0
    told, counts = start, Counter()
    for index in range(options.first, options.first + options.cases):
        now = time.monotonic()
        if now - start > options.seconds or failed >= options.failures:
            break
        if now - told > 10:
            told = now
            print(f"{counts.total()} cases, {failed} failed, {now - start:.0f} s", flush=True)
        running.value = index
        spec = draw(options.seed, index, ops, backends)
        failed += _report(spec)
        counts[f"{spec.op} on {spec.backend}"] += 1
    took = time.monotonic() - start
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    print(
        f"seed {options.seed}, from {options.first}: {counts.total()} cases in {took:.1f} s "
        f"({counts.total() / took:.0f} a second), {failed} failed"
    )
    sys.exit(int(failed > 0))


def _report(spec: Any) -> int:
    """1 if the case fails, which is then printed together with a simpler one that fails."""
    from . import check, shrink

    faults = check(spec)
    if not faults:
        return 0
    print(f"\nFAILED case {spec.seed[0]}:{spec.seed[1]}, {spec.op} on {spec.backend}")
    for fault in faults:
        print(f"  {fault}")
    least = shrink(spec)
    print(f"a simple case that fails: {'; '.join(check(least))}")
    print(f"  from tests.fuzz import Spec, check\n  print(check({least}))", flush=True)
    return 1
