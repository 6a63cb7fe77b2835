"""What the command does, once its packages are there: workers, tables, JSON and chart."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import chart, machine, report
from .cases import Case
from .goals import goals
from .results import derive, green, plain
from .worker import Request, request_json

# glibc keeps what is freed, instead of giving it back and mapping it afresh
KEPT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def run(arguments: argparse.Namespace, cases: Sequence[Case], studies: Sequence[str]) -> int:
    """Measure in workers, print, write; the command's exit code."""
    began = time.perf_counter()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = torch.device(device).type == "cpu"
    request = Request(
        cases=tuple(case.name for case in cases),
        studies=tuple(studies),
        device=device,
        backend=arguments.backend,
        threads=arguments.threads,
        rounds=arguments.rounds,
        least=3e-4 if arguments.quick else 2e-3,
        limit=0.7 if arguments.quick else 1e9,
        compiled=not arguments.quick,
        counted=True,
        allocator="allocator keeps memory" if on_cpu else "PyTorch's allocator",
    )
    default = None
    try:
        found = measure_apart(request, KEPT if on_cpu else {})
        # Small tensors are never mapped afresh, so a quick run leaves them out.
        large = [case.name for case in cases if not (arguments.quick and case.regime == "call")]
        if on_cpu and large:
            again = dataclasses.replace(
                request,
                cases=tuple(large),
                studies=(),
                compiled=False,
                counted=False,
                allocator="default allocator",
            )
            default = measure_apart(again, {})
    except WorkerError as error:
        print(error, file=sys.stderr)
        return 2

    results = {
        **machine.describe(device, found["threads"]),
        "settings": {
            "command": "bench --quick" if arguments.quick else "bench",
            "rounds": request.rounds,
            "backend": request.backend,
            "compiled": request.compiled,
            "allocator": KEPT if on_cpu else {},
        },
        "definitions": report.DEFINITIONS,
        "cases": derive(cases, found, default),
        "studies": found["studies"],
    }
    results["goals"] = goals(results)
    results["seconds"] = time.perf_counter() - began
    report.show(results)
    json_path = arguments.json or arguments.out / "bench.json"
    chart_path = arguments.chart or arguments.out / "bench.png"
    for path in (json_path, chart_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    json_path.write_text(text + "\n", encoding="utf-8")
    chart.draw(results, chart_path)
    print(f"{results['seconds']:.0f} s; wrote {json_path} and {chart_path}")
    return 0 if green(results) else 1


class WorkerError(RuntimeError):
    """A worker ended early; it has said why."""


def measure_apart(request: Request, settings: dict[str, str]) -> dict[str, Any]:
    """What a worker finds, in a process with these allocator settings."""
    environment = {name: value for name, value in os.environ.items() if name not in KEPT}
    environment.update(settings)
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(request_json(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.worker", str(asked), str(answer)],
            env=environment,
            stdout=subprocess.DEVNULL,  # other libraries' greetings
            start_new_session=True,  # Ctrl-C ends it from here, without a traceback of its own
            check=False,
        )
        if done.returncode:
            raise WorkerError(f"dflkern bench: the measuring process ended with {done.returncode}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found
