"""Integer arithmetic, logic, shifts and bit fields."""

import numpy as np

from ..values import TYPES, UNSIGNED, Type
from . import opcode

INTEGERS = "s16 u16 b16 s32 u32 b32 s64 u64 b64"
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def operands_of(machine, instruction):
    """The destination, the operands' values in the instruction's type, and where undefined."""
    destination, *operands = instruction.operands
    values = [machine.read(operand, instruction.type) for operand in operands]
    return destination, values, machine.undefined_of(*operands)


@opcode("add sub min max", INTEGERS)
@opcode("mul", INTEGERS, "lo")
@opcode("and or xor", "b16 b32 b64")
def binary(machine, instruction, mask):
    destination, values, undefined = operands_of(machine, instruction)
    result = BINARY[instruction.name](*values)
    machine.write(destination, result, instruction.type, mask, undefined)


@opcode("mul mad", "s16 u16 s32 u32", "wide")
@opcode("mad", INTEGERS, "lo")
def multiply(machine, instruction, mask):
    destination, *operands = instruction.operands
    type = instruction.type
    wide = Type(type.kind, type.bits * (2 if "wide" in instruction.modifiers else 1))
    x, y = (machine.read(operand, type) for operand in operands[:2])
    grown = np.promote_types(x.dtype, f"{'i' if type.is_signed else 'u'}{wide.bits // 8}")
    result = x.astype(grown) * y.astype(grown)
    if instruction.name == "mad":
        result = result + machine.read(operands[2], wide)
    machine.write(destination, result, wide, mask, machine.undefined_of(*operands))


@opcode("mul", "s16 u16 s32 u32", "hi")
def multiply_high(machine, instruction, mask):
    """The upper half of the product."""
    destination, (x, y), undefined = operands_of(machine, instruction)
    size = 2 * x.dtype.itemsize
    grown = np.dtype(f"{x.dtype.kind}{size}")
    result = (x.astype(grown) * y.astype(grown) >> grown.type(4 * size)).astype(x.dtype)
    machine.write(destination, result, instruction.type, mask, undefined)


@opcode("div rem", "u16 u32 u64")
def divide(machine, instruction, mask):
    """By 0, PTX leaves open what comes out: here all bits set."""
    destination, (x, y), undefined = operands_of(machine, instruction)
    quotient = x // np.where(y == 0, 1, y).astype(x.dtype)
    result = quotient if instruction.name == "div" else x - quotient * y
    result = np.where(y == 0, ~x.dtype.type(0), result)
    machine.write(destination, result, instruction.type, mask, undefined)


@opcode("and or xor not", "pred")
def logic(machine, instruction, mask):
    """A defined operand that decides alone makes up for an undefined one."""
    destination, values, undefined = operands_of(machine, instruction)
    result = ~values[0] if instruction.name == "not" else BINARY[instruction.name](*values)
    if undefined is not None and instruction.name in ("and", "or"):
        for operand, value in zip(instruction.operands[1:], values, strict=True):
            own = machine.undefined_of(operand)
            decides = value == (instruction.name == "or")
            undefined = undefined & ~(decides if own is None else decides & ~own)
    machine.write(destination, result, instruction.type, mask, undefined)


@opcode("not", "b16 b32 b64")
def complement(machine, instruction, mask):
    destination, (value,), undefined = operands_of(machine, instruction)
    machine.write(destination, ~value, instruction.type, mask, undefined)


@opcode("neg abs", "s16 s32 s64")
def sign(machine, instruction, mask):
    destination, (value,), undefined = operands_of(machine, instruction)
    result = -value if instruction.name == "neg" else np.abs(value)
    machine.write(destination, result, instruction.type, mask, undefined)


@opcode("shl", "b16 b32 b64")
@opcode("shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64")
def shift(machine, instruction, mask):
    """By more than the width: 0, or copies of the sign."""
    destination, *operands = instruction.operands
    type = instruction.type
    value = machine.read(operands[0], type)
    amount = machine.read(operands[1], TYPES["u32"])
    by = np.minimum(amount, type.bits - 1).astype(value.dtype)
    result = value << by if instruction.name == "shl" else value >> by
    if not type.is_signed:
        result = np.where(amount >= type.bits, 0, result)
    machine.write(destination, result, type, mask, machine.undefined_of(*operands))


@opcode("shf", "b32", "l r wrap clamp")
def funnel_shift(machine, instruction, mask):
    destination, *operands = instruction.operands
    low, high, amount = (machine.read(o, TYPES["u32"]).astype(np.uint64) for o in operands)
    amount = np.minimum(amount, 32) if "clamp" in instruction.modifiers else amount & np.uint64(31)
    both = low | high << np.uint64(32)
    result = both << amount >> np.uint64(32) if "l" in instruction.modifiers else both >> amount
    machine.write(destination, result, TYPES["u32"], mask, machine.undefined_of(*operands))


@opcode("bfe", "u32 s32")
def bit_field_extract(machine, instruction, mask):
    destination, *operands = instruction.operands
    value = machine.read(operands[0], TYPES["u32"]).astype(np.uint64)
    start, length = (
        (machine.read(o, TYPES["u32"]) & np.uint32(255)).astype(np.int64) for o in operands[1:]
    )
    last = np.minimum(start + length - 1, 31)
    filler = value >> np.clip(last, 0, 31).astype(np.uint64) & np.uint64(1)
    filler = np.where((length > 0) & instruction.type.is_signed, filler, np.uint64(0))
    result = np.uint64(0)
    for i in range(32):
        bit = value >> np.minimum(start + i, 31).astype(np.uint64) & np.uint64(1)
        result = result | np.where((i < length) & (start + i < 32), bit, filler) << np.uint64(i)
    machine.write(destination, result, TYPES["u32"], mask, machine.undefined_of(*operands))


@opcode("prmt", "b32")
def permute_bytes(machine, instruction, mask):
    destination, *operands = instruction.operands
    low, high, selector = (machine.read(o, TYPES["u32"]).astype(np.uint64) for o in operands)
    both = low | high << np.uint64(32)
    result = np.uint64(0)
    for i in range(4):
        choice = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i)
    machine.write(destination, result, TYPES["u32"], mask, machine.undefined_of(*operands))


@opcode("lop3", "b32")
def lookup_logic(machine, instruction, mask):
    destination, *operands, table = instruction.operands
    a, b, c = (machine.read(operand, TYPES["b32"]) for operand in operands)
    result = UNSIGNED[32](0)
    for i in range(8):
        if table.bits >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    machine.write(destination, result, TYPES["b32"], mask, machine.undefined_of(*operands))
