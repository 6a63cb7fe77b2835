"""The PTX of every GPU kernel, run in an emulator: right results, no fault, all written once.

Each case also runs a second time with its blocks in the reverse order, and the bits must agree.
What the default run leaves out stands behind `pytest -m ptx_full`.
"""

import pytest

from emulation import FAR, LAYOUTS, NAMES, Case, variants

BACKENDS = ("triton", "cuda")
BOTH = ("dfl_loss_and_decode", "dfl_loss_and_decode_backward")
OPS = (*BOTH, "dfl_loss", "dfl_loss_backward", "dfl_decode", "dfl_decode_backward")
BINS = (8, 16, 17, 33, 91)


def quick():
    """Each structure with its tail, each way of addressing, and all special values."""
    for op in BOTH:
        base = Case(op)
        yield from variants(base, dtype=NAMES, layout=["rows", "columns"], bins=[16])
        yield from variants(base, dtype=["fp32", "bf16"], layout=["rows", "columns"], bins=[17, 91])
        yield from variants(base, dtype=["fp32", "fp16"], layout=LAYOUTS[2:])
        yield from variants(base, layout=["rows", "columns"], bins=[16, 17, 91], special=[True])
        yield from variants(base, layout=["rows", "columns"], project=[True], special=[True])
        yield from variants(base, layout=["rows", "columns"], part=["last"], count=[FAR])
        yield from variants(base, arch=[100], layout=["rows", "columns"], dtype=["bf16"])
    yield from variants(Case(""), op=OPS[2:], layout=["rows", "columns"])


def full():
    """All operators, dtypes and numbers of bins; sizes around the blocks; other architectures."""
    rows_and_columns = {"layout": ["rows", "columns"]}
    yield from variants(Case(""), op=OPS, dtype=NAMES, bins=BINS, **rows_and_columns)
    for op in BOTH:
        base = Case(op)
        yield from variants(base, dtype=NAMES, bins=BINS, project=[True], **rows_and_columns)
        yield from variants(base, dtype=NAMES, bins=[16, 17], layout=LAYOUTS[2:])
        yield from variants(
            base, dtype=["fp32", "fp16"], bins=[16, 17], count=SIZES, **rows_and_columns
        )
        yield from variants(
            base, dtype=NAMES, bins=[16, 17, 91], special=[True], **rows_and_columns
        )
        yield from variants(base, dtype=NAMES, bins=[16], project=[True], special=[True])
        yield from variants(
            base, dtype=["fp32", "bf16"], bins=[16, 17], count=[FAR], part=["last"],
            **rows_and_columns,
        )  # fmt: skip
        yield from variants(base, arch=[90], dtype=NAMES, bins=[16, 17], **rows_and_columns)
        yield from variants(base, arch=[100], dtype=["fp32", "bf16"], bins=[17], **rows_and_columns)


SIZES = (1, 127, 128, 129, 255, 256, 257)


def parameters():
    """Every case once, those that are not quick with a mark."""
    fast = dict.fromkeys(quick())
    slow = [case for case in dict.fromkeys(full()) if case not in fast]
    for backend in BACKENDS:
        for case in variants_of(fast, backend):
            yield pytest.param(case, id=str(case))
        for case in variants_of(slow, backend):
            yield pytest.param(case, id=str(case), marks=pytest.mark.ptx_full)


def variants_of(cases, backend):
    return [case for each in cases for case in variants(each, backend=[backend])]


@pytest.mark.parametrize("case", list(parameters()))
def test_results(workers, case):
    assert workers.outcome(case).faults == ()
