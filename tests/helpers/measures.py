"""What the counted runs say of a kernel at a million distributions: numbers to hold to budgets."""

from dataclasses import dataclass

from dflkern.gpu.triton.box_plans import LOSS_BLOCK, SUMS_BLOCK
from emulation import NAMES, Case, variants
from ptxemu import model

COUNT = 1 << 20
SECTOR = 32
GPU_OF = {80: "A100", 90: "H100"}
BACKENDS = ("triton", "cuda")
BOTH = ("dfl_loss_and_decode", "dfl_loss_and_decode_backward")
DTYPES = ("fp32", "fp16", "bf16")
BINS = (8, 16, 17, 33)


@dataclass(frozen=True)
class Measures:
    """Of one kernel on one architecture; times and shares are modelled.

    Attributes:
        registers, spills, stack, widest_load: see `facts.Facts`; spills are instructions.
        sass: machine instructions on the longest way through.
        sass_per_distribution: of them, issued by a warp for each distribution; None with loops.
        ptx_per_distribution: PTX instructions that warps issued, for each distribution.
        sectors: 32-byte sectors moved, as a multiple of the fewest possible.
        store_sectors: sectors sent to L2 by stores, as a multiple of the fewest possible.
        traffic: DRAM bytes per distribution, and `least_traffic` those of the byte model.
        time: modelled time, as a multiple of the time that DRAM needs.
        share: of DRAM's time that the busiest other resource needs, and which one it is; machine
            code is left out of it where it has loops.
    """

    registers: int
    spills: int
    stack: int
    widest_load: int
    sass: int
    sass_per_distribution: float | None
    ptx_per_distribution: float
    sectors: float
    store_sectors: float
    traffic: float
    least_traffic: int
    time: float
    share: float
    bound: str


def cases(bins=BINS, dtypes=DTYPES, backends=BACKENDS):
    """The kernels that the budgets are about, over the architectures."""
    return variants(
        Case(""), op=BOTH, layout=["rows", "columns"], bins=bins, dtype=dtypes, arch=GPU_OF,
        backend=backends, count=[COUNT], part=["first"],
    )  # fmt: skip


def measure(case, outcome):
    """The measures of a case of the first part of a launch."""
    counts, code, n = outcome.counts, outcome.facts, outcome.distributions
    gpu = GPU_OF[case.arch]
    shares = model.shares(counts, () if code.loops else code.path, gpu)
    bound = max(shares, key=shares.get)
    return Measures(
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        widest_load=code.widest_load,
        sass=len(code.path),
        sass_per_distribution=None if code.loops else len(code.path) * counts.warps / n,
        ptx_per_distribution=counts.warp_instructions / n,
        sectors=counts.sectors / counts.least_sectors,
        store_sectors=counts.store_sectors * 32 / counts.bytes_written,
        traffic=(counts.bytes_read + counts.bytes_written) / n,
        least_traffic=least_traffic(case),
        time=model.time_over_dram(counts, gpu),
        share=shares[bound],
        bound=bound,
    )


def least_traffic(case):
    """Bytes that an operator must move for each distribution."""
    logits = case.bins * NAMES[case.dtype].itemsize
    asked = ("loss" in case.op) + ("decode" in case.op)
    target = 4 * ("loss" in case.op)
    if case.op.endswith("_backward"):
        return 2 * logits + target + 4 * asked
    return logits + target + 4 * asked


def measure_boxes(case, outcome):
    """Modelled time and worst share, as multiples of DRAM's time, of a BoxCase."""
    counts, code = outcome.counts, outcome.facts
    gpu = GPU_OF[case.arch]
    shares = model.shares(counts, () if code.loops else code.path, gpu)
    return model.time_over_dram(counts, gpu), max(shares.values())


def least_box_traffic(case, anchors, active):
    """Bytes that one launch must move: of all anchors, and of those in the foreground."""
    size = NAMES[case.dtype].itemsize
    logits = 4 * case.bins * size
    if case.op == "decode_boxes":
        return anchors * (logits + 4 * (2 + case.stride) + 16)
    if case.op == "decode_boxes_backward":
        return anchors * (2 * logits + 4 * case.stride + 16)
    # A lone anchor of a column moves a sector for each of its bins
    read = logits if case.layout == "rows" else 4 * case.bins * SECTOR
    inputs = anchors + active * (read + 4 * (2 + 4 + case.classes))
    return inputs + (anchors * logits if case.op.endswith("_backward") else 0)


def round_trips(code, passes):
    """How often a warp waits for global memory that takes so many passes through a loop."""
    return code.round_trips + (passes - 1) * max(code.loop_round_trips, default=0)


def passes_of(case):
    """How often a warp goes through the loops of a BoxCase's launches of the loss, at most.

    Of the first launch if all its anchors are foreground; of the second, which adds its sums.
    """
    programs = case.batch * -(-case.anchors // LOSS_BLOCK)
    return 4, -(-programs // SUMS_BLOCK)
