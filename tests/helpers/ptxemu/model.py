"""Modelled times of counted runs: rates of data sheets, never checked on hardware.

`time_over_dram` is the largest of the times that five resources need, over the time that DRAM
needs for the least traffic. It cannot tell a good kernel from a fair one, since both are bound by
DRAM; `shares` can, by a stricter look at machine code, L1 and L2. Not modelled: bytes in flight, a
last wave that fills no GPU, the capacity of L1, the launch.
"""

from collections import Counter
from dataclasses import dataclass

DRAM_EFFICIENCY = 0.92  # of the data sheet's bandwidth, which a copy reaches
LOADED_BYTES_PER_CLOCK = 64  # from L2 into an SM


@dataclass(frozen=True)
class Gpu:
    """Rates of the data sheet, per SM and clock where nothing else is said.

    `float_pipe` counts warp instructions; `l2_bytes` per second is an assumption.
    """

    sms: int
    ghz: float
    dram_bytes: float
    float_pipe: float
    l2_bytes: float
    issue: float = 4
    special: float = 0.5
    integer_pipe: float = 2
    exchange: float = 1
    sectors: float = 4

    @property
    def clock(self):
        """Clocks of all SMs a second."""
        return self.sms * self.ghz * 1e9


GPUS = {
    "A100": Gpu(108, 1.41, 2039e9, float_pipe=2, l2_bytes=4.4e12),
    "H100": Gpu(132, 1.755, 3350e9, float_pipe=4, l2_bytes=5.5e12),
}
PIPES = {
    "float": "FFMA FMUL FADD IMAD HADD2 HFMA2 HMUL2 FFMA2 FADD2 FMUL2",
    "special": "MUFU F2F F2I I2F POPC FLO BREV",
    "memory": "LDG STG LDS STS SHFL LD ST LDSM",
    "control": "BRA EXIT BAR BSSY BSYNC NOP RET CALL WARPSYNC DEPBAR MEMBAR S2R S2UR CS2R LDC ULDC "
    "VOTE YIELD LDCU R2UR",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


def dram_seconds(counts, gpu):
    """The time of the least traffic."""
    traffic = counts.bytes_read + counts.bytes_written
    return traffic / (GPUS[gpu].dram_bytes * DRAM_EFFICIENCY)


def issue_seconds(counts, gpu):
    """The time to issue all instructions."""
    g = GPUS[gpu]
    return counts.warp_instructions / g.issue / g.clock


def time_over_dram(counts, gpu):
    """The modelled time as a multiple of DRAM's."""
    g = GPUS[gpu]
    dram = dram_seconds(counts, gpu)
    others = {
        "issue": counts.warp_instructions / g.issue,
        "special": counts.special / g.special,
        "exchange": (counts.shuffles + counts.wavefronts) / g.exchange,
        "sectors": counts.sectors / g.sectors,
    }
    return max(dram, *(clocks / g.clock for clocks in others.values())) / dram


def shares(counts, sass, gpu):
    """The share of DRAM's time that each other resource needs.

    Args:
        counts: of a run whose warps all take the same way through the machine code.
        sass: the machine code's opcodes along that way.
        gpu: one of GPUS.
    """
    g = GPUS[gpu]
    dram = dram_seconds(counts, gpu)
    pipes = Counter(
        PIPE_OF.get(name, "uniform" if name.startswith("U") else "integer") for name in sass
    )
    exchange = counts.bank_cycles + counts.wavefronts + counts.shuffles
    clocks = {
        "issue": counts.warps * len(sass) / g.issue,
        "float": counts.warps * pipes["float"] / g.float_pipe,
        "integer": counts.warps * pipes["integer"] / g.integer_pipe,
        "special": counts.warps * pipes["special"] / g.special,
        "L1 tags": counts.tags,
        "L1 data": exchange,
        "L1 fill": counts.loaded_sectors * 32 / LOADED_BYTES_PER_CLOCK,
    }
    result = {name: value / g.clock / dram for name, value in clocks.items()}
    moved = 32 * (counts.loaded_sectors + counts.store_sectors)
    return result | {"L2": moved / g.l2_bytes / dram}
