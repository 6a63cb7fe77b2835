"""Loads and stores."""

import numpy as np

from ..counting import count_request, count_wavefronts
from ..memory import AccessError
from ..parse import Vector
from ..values import TYPES, Type
from . import opcode

ELEMENTS = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64"


def access(machine, instruction, address, mask):
    """The threads that take part, and their addresses."""
    undefined = machine.undefined_of(address.base)
    lanes = np.arange(machine.size) if mask is None else np.nonzero(mask)[0]
    if undefined is not None and undefined[lanes].any():
        raise AccessError("undefined address", int(np.argmax(undefined[lanes])))
    base = machine.read(address.base, TYPES["u64"])
    offset = np.uint64(address.offset % (1 << 64))
    return lanes, np.broadcast_to(base + offset, machine.size)[lanes]


def items_of(operand):
    return operand.items if isinstance(operand, Vector) else (operand,)


@opcode("ld", ELEMENTS, "param")
def load_parameter(machine, instruction, mask):
    destination, address = instruction.operands
    type = instruction.type
    _, places = access(machine, instruction, address, mask)
    place, size = int(places[0]), type.bits // 8
    value = machine.parameters[place : place + size].view(f"u{size}")[0]
    value = np.array(value).view(f"{'i' if type.is_signed else 'u'}{size}")
    machine.write(destination, value, Type("s" if type.is_signed else "b", type.bits), mask)


@opcode("ld", ELEMENTS, "global nc v2 v4 L1:no_allocate L1:evict_last L1:evict_first")
@opcode("ld", ELEMENTS, "shared shared:cta v2 v4")
def load(machine, instruction, mask):
    destination, address = instruction.operands
    type = instruction.type
    items, width = items_of(destination), type.bits // 8
    size = width * len(items)
    lanes, addresses = access(machine, instruction, address, mask)
    if "global" in instruction.modifiers:
        data, defined = machine.memory.load(addresses, size)
        count_request(machine, instruction, addresses, size, lanes)
    else:
        offsets = addresses.astype(np.int64)
        blocks, warps = machine.here[lanes], machine.warp[lanes]
        data, defined = machine.shared.load(blocks, warps, offsets, size)
        count_wavefronts(instruction, warps, offsets, size)
    kind = Type("s" if type.is_signed else "b", type.bits)
    for i, item in enumerate(items):
        part = slice(i * width, (i + 1) * width)
        value = np.zeros(machine.size, f"{'i' if type.is_signed else 'u'}{width}")
        value[lanes] = np.ascontiguousarray(data[:, part]).view(value.dtype)[:, 0]
        undefined = np.zeros(machine.size, bool)
        undefined[lanes] = ~defined[:, part].all(1)
        machine.write(item, value, kind, mask, undefined)


@opcode("st", ELEMENTS, "global wb v2 v4")
@opcode("st", ELEMENTS, "shared shared:cta v2 v4")
def store(machine, instruction, mask):
    address, source = instruction.operands
    type = Type("b", instruction.type.bits)
    items, width = items_of(source), type.bits // 8
    lanes, addresses = access(machine, instruction, address, mask)
    parts, defined = [], []
    for item in items:
        value = np.broadcast_to(machine.read(item, type), machine.size)[lanes]
        parts.append(value.copy().view(np.uint8).reshape(-1, width))
        undefined = machine.undefined_of(item)
        known = np.ones(lanes.size, bool) if undefined is None else ~undefined[lanes]
        defined.append(np.repeat(known[:, None], width, 1))
    data, defined = np.concatenate(parts, 1), np.concatenate(defined, 1)
    if "global" in instruction.modifiers:
        if not defined.all():
            raise AccessError("stores an undefined value", int(np.argmin(defined.all(1))))
        machine.memory.store(addresses, data, machine.thread[lanes])
        count_request(machine, instruction, addresses, data.shape[1], lanes)
    else:
        offsets = addresses.astype(np.int64)
        blocks, warps = machine.here[lanes], machine.warp[lanes]
        machine.shared.store(blocks, warps, offsets, data, defined)
        count_wavefronts(instruction, warps, offsets, data.shape[1])


@opcode("ldmatrix", "b16", "sync aligned m8n8 x1 shared shared:cta")
def load_matrix(machine, instruction, mask):
    """Eight rows of 16 bytes, whose addresses lanes 0 to 7 give; each lane gets two elements."""
    if mask is not None:
        raise AccessError("ldmatrix without the whole warp", 0)
    (item,), address = instruction.operands[0].items, instruction.operands[1]
    _, addresses = access(machine, instruction, address, mask)
    giving = np.nonzero(machine.lane < 8)[0]
    offsets = addresses[giving].astype(np.int64)
    blocks, warps = machine.here[giving], machine.warp[giving]
    data, defined = machine.shared.load(blocks, warps, offsets, 16)
    count_wavefronts(instruction, warps, offsets, 16)
    row, part = machine.lane // 4, machine.lane % 4
    words = np.ascontiguousarray(data).view(np.uint32).reshape(machine.warps, 8, 4)
    known = defined.reshape(machine.warps, 8, 4, 4).all(3)
    place = machine.warp, row, part
    machine.write(item, words[place], TYPES["b32"], None, ~known[place])
