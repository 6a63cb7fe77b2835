"""Branches, the end, and barriers."""

import numpy as np

from ..memory import AccessError
from . import opcode

EXIT = -1


@opcode("ret exit")
def end(machine, instruction, mask):
    return EXIT


@opcode("bra", "", "uni")
def branch(machine, instruction, mask):
    return machine.kernel.labels[instruction.operands[0].name]


@opcode("bar", "", "sync")
def barrier(machine, instruction, mask):
    """Every live thread of a block must arrive."""
    blocks = len(machine.shared.phase)
    arrived = np.bincount(machine.here[machine.active], minlength=blocks)
    awaited = np.bincount(machine.here[machine.live], minlength=blocks)
    if (arrived[arrived > 0] != awaited[arrived > 0]).any():
        raise AccessError("divergent barrier: not every thread of the block arrives", 0)
    machine.shared.phase[arrived > 0] += 1
