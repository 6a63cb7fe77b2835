"""dflkern's cases under pytest-benchmark: `pytest benchmarks`, also with --benchmark-json.

The gate comes first; extra_info holds bytes, GB/s, the share of a copy of the same bytes, the time
of the reference, kernels and saved bytes. Ratios to peers are what `python -m dflkern bench` is
for, which interleaves both sides. On CUDA every timed call waits for the device; there,
`python -m dflkern bench` times by triton.testing.
"""

import os

import pytest
import torch

import dflkern
from dflkern.bench import contenders, counts, gate, timing, worker
from dflkern.bench.cases import BYTE_MODEL, CASES, PASSES, make_inputs
from dflkern.bench.command import KEPT

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

ROUNDS = 20
LEAST = 5e-4  # seconds of a round at least, by repeating the call
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def gated():
    """The works of a case's passes, kept for the next pass; None if its gate is red."""
    kept = {}

    def of(case):
        if case.name not in kept:
            kept.clear()  # one case's tensors at a time
            inputs = make_inputs(case, DEVICE)
            own = contenders.own(case, inputs)[0]
            faults = gate.faults(case, inputs, own)
            kept[case.name] = faults, own, inputs.leaf
        return kept[case.name]

    return of


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, direction, gated, benchmark):
    """One pass of one case."""
    faults, own, leaf = gated(case)
    assert not faults
    work = timing.passes(own, leaf)[direction]
    with dflkern.use_backend("reference"):
        reference = _measure(work)
    copy = _measure(timing.copy_work("copy", case.traffic(direction), DEVICE))

    def call(*state):
        work.call(*state)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {direction}"
    with work.context():
        if work.prepare is None:
            calls = max(1, round(LEAST / _measure(work, rounds=1)))
            benchmark.pedantic(call, rounds=ROUNDS, iterations=calls, warmup_rounds=1)
        else:
            benchmark.pedantic(
                call, setup=lambda: ((work.prepare(),), {}), rounds=ROUNDS, warmup_rounds=1
            )
    least = benchmark.stats.stats.min if benchmark.stats else float("nan")  # --benchmark-disable
    benchmark.extra_info.update(
        backend=worker.served_by(case, leaf),
        threads=torch.get_num_threads(),
        allocator_keeps_memory=all(os.environ.get(name) == KEPT[name] for name in KEPT),
        bytes=case.traffic(direction),
        byte_model=BYTE_MODEL,
        gb_per_s=case.traffic(direction) / least / 1e9,
        share_of_copy=copy / least,
        reference_seconds=reference,
        ratio_to_reference=reference / least,
        kernels=counts.count_kernels(work, DEVICE),
        saved_bytes=0 if direction == "forward" else counts.saved_bytes(own.function, leaf),
    )


def _measure(work, rounds=5):
    return timing.measure([work], timing.Effort(rounds, LEAST), DEVICE)[work.label]["minimum"]
