"""Exchange between the lanes of a warp."""

import numpy as np

from ..memory import AccessError
from ..parse import Pair
from ..values import TYPES
from . import opcode


@opcode("shfl", "b32", "sync up down bfly idx")
def shuffle(machine, instruction, mask):
    """Each lane reads a register of another, which must execute the shuffle, too."""
    destination, source, *control = instruction.operands
    value = np.broadcast_to(machine.read(source, TYPES["b32"]), machine.size)
    by, limits, members = (
        np.broadcast_to(machine.read(o, TYPES["u32"]), machine.size).astype(np.int64)
        for o in control
    )
    executing = np.ones(machine.size, bool) if mask is None else mask
    lane, by = machine.lane, by & 31
    stray = executing & (members >> lane & 1 == 0)
    if stray.any():
        raise _error(executing, stray, "executes a shuffle whose mask does not name it")
    segment, clamp = limits >> 8 & 31, limits & 31
    first = lane & segment
    last = first | clamp & ~segment
    mode = instruction.modifiers[1]
    other = {
        "up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment
    }[mode]  # fmt: skip
    inside = other >= last if mode == "up" else other <= last
    place = machine.of_lane[machine.warp * 32 + np.where(inside, other, lane)]
    absent = (place < 0) | ~executing[np.maximum(place, 0)]
    place = np.maximum(place, 0)
    undefined = machine.undefined_of(source)
    undefined = absent if undefined is None else undefined[place] | absent
    register, found = (
        (destination.first, destination.second)
        if isinstance(destination, Pair)
        else (destination, None)
    )
    machine.write(register, value[place], TYPES["b32"], mask, undefined & executing)
    if found is not None:
        machine.write(found, inside, TYPES["pred"], mask)


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("redux", "s32 u32 b32", "sync add min max and or xor")
def reduce(machine, instruction, mask):
    """Every lane named by the mask must take part, and gets the result of all of them."""
    destination, source, members = instruction.operands
    value = np.broadcast_to(machine.read(source, instruction.type), machine.size)
    named = np.broadcast_to(machine.read(members, TYPES["u32"]), machine.size).astype(np.int64)
    executing = np.ones(machine.size, bool) if mask is None else mask
    lanes = np.nonzero(executing)[0]
    present = np.zeros(machine.warps, np.int64)
    np.bitwise_or.at(present, machine.warp[lanes], 1 << machine.lane[lanes])
    differing = executing & (present[machine.warp] != named)
    if differing.any():
        raise _error(executing, differing, "reduces over lanes that do not all take part")
    function = REDUCTIONS[instruction.modifiers[1]]
    order = lanes[np.argsort(machine.warp[lanes], kind="stable")]
    starts = np.unique(machine.warp[order], return_index=True)[1]
    result = np.zeros(machine.warps, value.dtype)
    result[machine.warp[order[starts]]] = function.reduceat(value[order], starts)
    undefined = machine.undefined_of(source)
    if undefined is not None:
        unknown = np.zeros(machine.warps, bool)
        np.logical_or.at(unknown, machine.warp[lanes], undefined[lanes])
        undefined = unknown[machine.warp]
    machine.write(destination, result[machine.warp], instruction.type, mask, undefined)


@opcode("bar", "", "warp sync")
def warp_barrier(machine, instruction, mask):
    """Lanes of a warp run in lockstep here; the block's barrier is what orders shared memory."""


def _error(executing, faulty, message):
    return AccessError(message, int(np.argmax(faulty[executing])))
