"""Budgets of the compiled kernels at 1M distributions: machine code, sectors, modelled times.

The cases run in the emulator, so their results are checked, too. Times are modelled (ptxemu.model).
"""

from dataclasses import replace

import pytest

from emulation import Case
from measures import BOTH, COUNT, cases, measure

REGISTERS = 128
TIME, SHARE = 1.10, 0.85
# Machine instructions that a warp issues for each distribution: a + b · K. One and a half times
# as many as DRAM leaves time for would show in the share; these catch a creeping growth before.
INSTRUCTIONS = {
    ("cuda", "forward"): (2.5, 0.40),
    ("cuda", "backward"): (3.0, 0.55),
    ("triton", "forward"): (2.5, 0.55),
    ("triton", "backward"): (2.0, 0.85),
}
# Sectors moved and stored, as multiples of the fewest, where a structure trades them for
# instructions: a lane then reads granules at a stride, whose other halves it finds in L1, and
# writes half sectors that L2 joins.
SECTORS = {
    "rows_chunk_forward_kernel": (2.0, 1.0),
    "rows_lazy_forward_kernel": (2.0, 1.0),
    "rows_lazy_backward_kernel": (2.0, 2.0),
}
NARROW_SECTORS = 3.6  # rows_lazy_forward with granules of 8 bytes, that is half K = 33


def parameters():
    """K = 16 in two dtypes and K = 17 in fp32 by default."""
    quick = cases([16], ("fp32", "fp16")) + cases([17], ("fp32",))
    for case in cases():
        marks = () if case in quick else pytest.mark.ptx_full
        yield pytest.param(case, id=str(case), marks=marks)


@pytest.mark.parametrize("case", list(parameters()))
def test_budget(workers, case):
    outcome = workers.outcome(case)
    assert outcome.faults == ()
    got = measure(case, outcome)
    assert (got.spills, got.stack) == (0, 0)
    assert got.registers <= REGISTERS
    columns = {"triton": 4, "cuda": 8}[case.backend]
    assert got.widest_load == (16 if case.layout == "rows" else columns)
    direction = "backward" if case.op.endswith("_backward") else "forward"
    start, each = INSTRUCTIONS[case.backend, direction]
    assert got.sass_per_distribution <= start + each * case.bins
    sectors, store_sectors = SECTORS.get(outcome.kernel, (1.05, 1.0))
    if outcome.kernel == "rows_lazy_forward_kernel" and (case.bins, case.dtype) in NARROW:
        sectors = NARROW_SECTORS
    assert got.sectors <= sectors
    assert got.store_sectors <= store_sectors
    assert got.traffic == got.least_traffic
    assert got.time <= TIME
    assert got.share <= SHARE


NARROW = {(33, "fp16"), (33, "bf16")}

# What a backend does not do within the budget, by case: modelled time and worst share as multiples
# of DRAM's time, and why. `auto` takes the other backend where that does better.
PADDED = "bins padded to a power of two, and reduced across lanes by shuffles"
STAGED = "any number of bins: a lane reads its bins from shared memory one by one"
STRIDED = "rows without 16-byte alignment: a load for each bin, at the stride of a row"
SEARCHED = "a project: the target's bin is searched among positions that are loaded"
EXCEPTIONS = [
    (Case(BOTH[0], bins=91, dtype="fp32"), 4.33, 4.48, PADDED),
    (Case(BOTH[0], bins=91, dtype="fp16"), 8.40, 8.68, PADDED),
    (Case(BOTH[1], bins=91, dtype="fp16"), 3.18, 3.50, PADDED),
    (Case(BOTH[0], bins=17, dtype="fp16", layout="offset"), 1.26, 0.73, STRIDED),
    (Case(BOTH[1], bins=17, dtype="fp16", layout="offset"), 1.43, 4.13, STRIDED),
    (Case(BOTH[1], bins=17, dtype="fp32", layout="offset"), 1.00, 2.36, STRIDED),
    (Case(BOTH[0], dtype="fp16", layout="columns", project=True), 1.22, 1.02, SEARCHED),
    (Case(BOTH[0], bins=33, dtype="fp16", layout="columns", project=True), 1.95, 1.25, SEARCHED),
    (Case(BOTH[0], bins=91, dtype="fp16", backend="cuda"), 1.42, 0.82, STAGED),
    (Case(BOTH[1], bins=91, dtype="fp16", backend="cuda"), 1.49, 0.93, STAGED),
    (Case(BOTH[0], bins=17, dtype="fp16", layout="offset", backend="cuda"), 1.72, 0.97, STAGED),
    (Case(BOTH[1], bins=17, dtype="fp16", layout="offset", backend="cuda"), 1.89, 1.12, STAGED),
]


@pytest.mark.parametrize(
    ("case", "time", "share", "reason"),
    [
        pytest.param(replace(case, arch=90, count=COUNT, part="first"), *rest, id=str(case))
        for case, *rest in EXCEPTIONS
    ],
)
def test_exception(workers, case, time, share, reason):
    """Still needed, still as measured, and right all the same."""
    outcome = workers.outcome(case)
    assert outcome.faults == ()
    got = measure(case, outcome)
    assert got.time > TIME or got.share > SHARE, f"within the budget now: {reason}"
    assert (got.time, got.share) == pytest.approx((time, share), rel=0.1), reason
