"""What a run costs: instructions, sectors, bank cycles, DRAM footprint."""

from dataclasses import dataclass, field

import numpy as np

from .memory import FIRST_ADDRESS, SECTOR

LINE, BANKS = 128, 32
SPECIAL = ("ex2", "lg2", "rcp")


@dataclass
class Totals:
    """Counts that belong to no single instruction."""

    threads: int = 0
    warps: int = 0
    tags: int = 0
    bank_cycles: int = 0
    store_sectors: int = 0
    loaded_sectors: int = 0
    open_sectors: list = field(default_factory=list)

    def end_of_blocks(self):
        """Add the sectors that each block has loaded, once however often it asked for them."""
        if self.open_sectors:
            self.loaded_sectors += np.unique(np.concatenate(self.open_sectors)).size
            self.open_sectors.clear()


@dataclass(frozen=True)
class Counts:
    """The cost of a run.

    Attributes:
        warp_instructions: PTX instructions that warps issue, those of parameters left out.
        special: of them ex2, lg2, rcp.
        shuffles: of them shuffles and reductions across a warp.
        wavefronts: passes over the banks of shared memory.
        sectors, least_sectors: 32-byte sectors that warps move to and from L1, and the fewest that
            hold the same bytes.
        tags: passes of the L1 tag stage, four 128-byte lines each.
        bank_cycles: passes of the L1 data stage over its banks.
        store_sectors: sectors sent to L2 by stores.
        loaded_sectors: sectors fetched from L2 if L1 kept all that a block loads.
        bytes_read, bytes_written: distinct sectors in bytes, the least that DRAM moves.
        threads, warps: launched.
    """

    warp_instructions: int
    special: int
    shuffles: int
    wavefronts: int
    sectors: int
    least_sectors: int
    tags: int
    bank_cycles: int
    store_sectors: int
    loaded_sectors: int
    bytes_read: int
    bytes_written: int
    threads: int
    warps: int


def total(kernel, memory, totals):
    """The counts of a kernel's instructions and of what ran it."""

    def warps(wanted):
        return sum(i.counts.warps for i in kernel.code if wanted(i))

    return Counts(
        warp_instructions=warps(lambda i: "param" not in i.modifiers),
        special=warps(lambda i: i.name in SPECIAL),
        shuffles=warps(lambda i: i.name in ("shfl", "redux")),
        wavefronts=sum(i.counts.wavefronts for i in kernel.code),
        sectors=sum(i.counts.sectors for i in kernel.code),
        least_sectors=sum(i.counts.least_sectors for i in kernel.code),
        tags=totals.tags,
        bank_cycles=totals.bank_cycles,
        store_sectors=totals.store_sectors,
        loaded_sectors=totals.loaded_sectors,
        bytes_read=SECTOR * sum(int(b.sectors_read.sum()) for b in memory.buffers),
        bytes_written=SECTOR * sum(int(b.sectors_written.sum()) for b in memory.buffers),
        threads=totals.threads,
        warps=totals.warps,
    )


def count_request(machine, instruction, addresses, size, lanes):
    """A load or store of global memory, `size` bytes at each address."""
    totals = machine.totals
    place = (addresses - np.uint64(FIRST_ADDRESS)).astype(np.int64)
    warp = machine.warp[lanes].astype(np.int64)
    sectors = per_warp(warp, place // SECTOR)
    instruction.counts.sectors += sectors.size
    instruction.counts.least_sectors += -(-np.unique(place).size * size // SECTOR)
    _, lines = np.unique(per_warp(warp, place // LINE) >> 44, return_counts=True)
    totals.tags += int((-(-lines // 4)).sum())
    totals.bank_cycles += bank_cycles(warp, place, size)
    if instruction.name == "st":
        totals.store_sectors += sectors.size
    else:
        totals.open_sectors.append(per_warp(machine.here[lanes], place // SECTOR))


def count_wavefronts(instruction, warps, offsets, size):
    """An access to shared memory."""
    instruction.counts.wavefronts += bank_cycles(warps, offsets, size)


def per_warp(warp, place):
    """The distinct places of each warp (or block), as one number each: owner · 2⁴⁴ + place."""
    return np.unique(warp.astype(np.int64) << 44 | place)


def bank_cycles(warp, place, size):
    """Passes over the banks: per warp, the most distinct words that share a bank."""
    words = place[:, None] // 4 + np.arange(max(size // 4, 1))
    words = per_warp(np.repeat(warp, words.shape[1]), words.reshape(-1))
    banks, count = np.unique((words >> 44) * BANKS + words % BANKS, return_counts=True)
    _, first = np.unique(banks // BANKS, return_index=True)
    return int(np.maximum.reduceat(count, first).sum())
