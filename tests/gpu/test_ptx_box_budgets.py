"""What box_loss costs on a training step: compiled kernels counted in the emulator.

The step has 16 images of 8 400 anchors, 100 of them foreground, and 80 classes. By default two of
the images are run, which cost an eighth; `pytest -m ptx_full` runs all. Times are modelled for an
H100.
"""

from dataclasses import replace

import pytest

from box_emulation import BoxCase
from emulation import variants
from measures import passes_of, round_trips
from ptxemu import model

GPU, IMAGES = "H100", 16
FORWARD_SECONDS = 2e-6  # of issuing instructions
TIME = 1.10  # of the gradient, as a multiple of DRAM's time
ROUND_TRIPS = 12  # waits of a warp for global memory, one after the other
REGISTERS = 128

STEP = BoxCase(
    "box_loss", arch=90, batch=2, anchors=8400, foreground=100 / 8400, weight="80 scores", keep=True
)


def steps():
    """Foreground here and there and in one place, in both layouts and dtypes."""
    for quick in (STEP, replace(STEP, clustered=True, dtype="fp16", layout="rows")):
        yield quick, ()
    for case in variants(
        replace(STEP, batch=IMAGES), clustered=[False, True], dtype=["fp32", "fp16", "bf16"],
        layout=["columns", "rows"],
    ):  # fmt: skip
        yield case, pytest.mark.ptx_full
    for case in variants(STEP, weight=["weights", "80 scores"], keep=[True, False]):
        yield case, pytest.mark.ptx_full


def of(op):
    return [
        pytest.param(each := replace(case, op=op), id=f"{each}-{op}", marks=marks)
        for case, marks in steps()
    ]


@pytest.mark.parametrize("case", of("box_loss"))
def test_forward(workers, case):
    """Two launches, whose instructions take less time than 2 µs."""
    outcome = workers.outcome(case)
    assert outcome.faults == ()
    launches = ((outcome.counts, outcome.facts), *outcome.later)
    assert len(launches) == 2
    seconds = sum(model.issue_seconds(counts, GPU) for counts, _ in launches)
    assert seconds <= FORWARD_SECONDS * case.batch / IMAGES
    for (_, code), passes in zip(launches, passes_of(case), strict=True):
        assert round_trips(code, passes) <= ROUND_TRIPS
        assert code.spills == code.stack == 0
        assert code.registers <= REGISTERS


@pytest.mark.parametrize("case", of("box_loss_backward"))
def test_backward(workers, case):
    """Bound by the memory that the dense gradient takes."""
    outcome = workers.outcome(case)
    assert outcome.faults == ()
    assert model.time_over_dram(outcome.counts, GPU) <= TIME
    assert outcome.counts.store_sectors <= 1.2 * outcome.counts.bytes_written / 32
    assert round_trips(outcome.facts, passes_of(case)[0]) <= ROUND_TRIPS
    assert outcome.facts.spills == outcome.facts.stack == 0
    assert outcome.facts.registers <= REGISTERS
