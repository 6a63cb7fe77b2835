"""The process that measures: `python -m dflkern.bench.worker REQUEST RESULT`, both JSON files.

A process of its own, since glibc reads its allocator's settings when a process starts.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..operators import backends
from ..operators.table import TABLE
from . import box_steps, contenders, gate, studies
from .cases import DTYPES, PASSES, Case, make_inputs, named
from .contenders import COMPILED, Contender
from .counts import count_kernels, saved_bytes
from .timing import Effort, Time, Work, copy_work, measure, passes

COPY = "copy of the same bytes"
COPY_LOGITS = "copy of the logits"


@dataclass(frozen=True)
class Request:
    """What a worker is to measure.

    Attributes:
        cases: names.
        studies: names.
        device: a torch device.
        backend: a name for `use_backend`.
        threads: None leaves PyTorch's number.
        rounds: as in Effort, like least and limit.
        compiled: whether peers are measured under torch.compile too.
        counted: whether kernels and saved bytes are counted.
        allocator: what to call the allocator's settings in progress lines.
    """

    cases: tuple[str, ...]
    studies: tuple[str, ...]
    device: str
    backend: str
    threads: int | None
    rounds: int
    least: float
    limit: float
    compiled: bool
    counted: bool
    allocator: str

    @property
    def effort(self) -> Effort:
        """How long to measure each pass of a case."""
        return Effort(self.rounds, self.least, self.limit)


def main(argv: list[str]) -> int:
    """Measure what a file asks for; 0, or 2 if the device or the backend cannot."""
    request = Request(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    try:
        found = run(request)
    except CannotRunError as error:
        print(f"dflkern: {error}", file=sys.stderr)
        return 2
    Path(argv[1]).write_text(json.dumps(found), encoding="utf-8")
    return 0


class CannotRunError(RuntimeError):
    """The device is not there, or the backend serves nothing on it."""


def run(request: Request) -> dict[str, Any]:
    """Measure in this process."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with backends.use_backend(request.backend):
        try:
            torch.empty(1, device=request.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise CannotRunError(f"no device {request.device!r}: {reason}") from error
        began = time.perf_counter()
        found: dict[str, Any] = {"cases": {}, "studies": {}}
        names = [*request.cases, *(f"study of {name}" for name in request.studies)]
        for i, name in enumerate(names):
            seconds = time.perf_counter() - began
            line = f"[{i + 1}/{len(names)}] {seconds:4.0f} s, {request.allocator}: {name}"
            print(line, file=sys.stderr, flush=True)
            if i < len(request.cases):
                found["cases"][name] = _case(named(name), request)
            else:
                study = request.studies[i - len(request.cases)]
                found["studies"][study] = _study(study, request)
        found["threads"] = torch.get_num_threads()
    return found


def request_json(request: Request) -> str:
    """A request as `main` reads it."""
    return json.dumps(asdict(request))


def served_by(case: Case, leaf: torch.Tensor) -> str:
    """The backend that serves a case.

    Raises:
        CannotRunError: if the one that was asked for cannot.
    """
    logits = case.view(leaf)
    try:
        call = {"logits": logits, "dim": case.dim, "project": None}
        return backends.decide(TABLE[f"dfl_{case.op}"], {**call, "backend": backends.requested()})
    except RuntimeError as error:
        raise CannotRunError(str(error)) from error


def _case(case: Case, request: Request) -> dict[str, Any]:
    if request.compiled:
        torch._dynamo.reset()  # each case compiles the same functions anew
    inputs = make_inputs(case, request.device)
    found: dict[str, Any] = {"backend": served_by(case, inputs.leaf)}
    ours = contenders.own(case, inputs)
    found["faults"] = [fault for one in ours for fault in gate.faults(case, inputs, one)]
    if found["faults"]:
        return found
    exact = {
        mean: gate.expected(case, inputs, mean=mean, exact=True)
        for mean in {one.mean for one in ours}
    }
    alike, found["peer_faults"] = [], {}
    for peer in contenders.peers(case, inputs, request.compiled):
        faults = _check_peer(peer, inputs.leaf, exact[peer.mean])
        if faults:
            found["peer_faults"][peer.label] = faults
        else:
            alike.append(peer)
    del exact
    found["rivals"] = {peer.label: peer.rival for peer in alike}
    works = {one.label: passes(one, inputs.leaf) for one in [*ours, *alike]}
    found["times"] = {
        direction: _pass(case, direction, [work[direction] for work in works.values()], request)
        for direction in PASSES
    }
    if request.counted:
        # Compiled graphs on a CPU show no kernels to the profiler.
        countable = [one for one in [*ours, *alike] if not one.label.endswith(COMPILED)]
        found["kernels"] = {
            one.label: {
                direction: count_kernels(works[one.label][direction], request.device)
                for direction in PASSES
            }
            for one in countable
        }
        found["saved"] = {
            one.label: saved_bytes(one.function, inputs.leaf) for one in [*ours, *alike]
        }
    return found


def _check_peer(peer: Contender, leaf: torch.Tensor, exact: gate.Values) -> list[str]:
    try:
        values = gate.evaluate(peer.function, leaf)
    except Exception as error:  # whatever a peer or its compiler raises, the others go on
        return [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    return gate.peer_faults(values, exact, leaf.dtype)


def _pass(case: Case, direction: str, works: list[Work], request: Request) -> dict[str, Time]:
    copies = [copy_work(COPY, case.traffic(direction), request.device)]
    if case.op == "decode" and direction == "forward":
        logits = case.count * case.bins * DTYPES[case.dtype].itemsize
        copies.append(copy_work(COPY_LOGITS, 2 * logits, request.device))
    return measure([*works, *copies], request.effort, request.device)


def _study(name: str, request: Request) -> dict[str, Any]:
    if name in ("boxes", "ultralytics"):
        return _step_study(name, request)
    faults = []
    for case in studies.variants(name):
        inputs = make_inputs(case, request.device)
        served_by(case, inputs.leaf)
        faults += gate.faults(case, inputs, contenders.own(case, inputs)[0])
    if faults:
        return {"faults": faults}
    data = studies.run(name, request.effort, request.device, request.backend, request.compiled)
    return {"faults": [], "data": data}


def _step_study(name: str, request: Request) -> dict[str, Any]:
    steps = box_steps.BOX_STEPS
    faults = [
        fault
        for step in steps
        for fault in box_steps.faults(step, box_steps.make_inputs(step, request.device))
    ]
    if faults:
        return {"faults": faults}
    run = box_steps.run_boxes if name == "boxes" else box_steps.run_ultralytics
    return {"faults": [], "data": run(request.effort, request.device)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
