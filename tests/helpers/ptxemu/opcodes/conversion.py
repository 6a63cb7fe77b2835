"""Moves, conversions, comparisons and selections."""

import numpy as np

from ..parse import Vector
from ..values import SIGNED, TYPES, UNSIGNED, Type, flush, to_bits
from . import opcode

EVERY = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64"
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("mov", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
def move(machine, instruction, mask):
    """Also packs a vector into a register, and unpacks it; unused parts may be undefined."""
    destination, source = instruction.operands
    type = Type("b", instruction.type.bits)
    if isinstance(destination, Vector):
        value = machine.read(source, type)
        undefined = machine.undefined_parts(source, len(destination.items))
        part = Type("b", type.bits // len(destination.items))
        for i, item in enumerate(destination.items):
            piece = (value >> UNSIGNED[type.bits](i * part.bits)).astype(UNSIGNED[part.bits])
            machine.write(item, piece, part, mask, undefined[i])
        return
    sources = source.items if isinstance(source, Vector) else (source,)
    part = Type("b", type.bits // len(sources))
    value = UNSIGNED[type.bits](0)
    for i, item in enumerate(sources):
        piece = machine.read(item, part).astype(UNSIGNED[type.bits])
        value = value | piece << UNSIGNED[type.bits](i * part.bits)
    undefined = tuple(machine.undefined_of(item) for item in sources)
    if len(sources) == 1:
        machine.write(destination, value, type, mask, *undefined)
    else:
        machine.write_parts(destination, value, type, mask, undefined)


@opcode("mov", "pred")
def move_predicate(machine, instruction, mask):
    destination, source = instruction.operands
    value = machine.read(source, instruction.type)
    machine.write(destination, value, instruction.type, mask, machine.undefined_of(source))


@opcode("cvta", "u64", "to global")
def to_global(machine, instruction, mask):
    """Generic addresses of global memory are its own."""
    move(machine, instruction, mask)


@opcode("cvt", EVERY, "rn rni rzi rmi rpi ftz sat")
def convert(machine, instruction, mask):
    destination, source = instruction.operands
    to, origin = instruction.types
    value = machine.read(source, origin)
    rounding = next((ROUND[name] for name in instruction.modifiers if name in ROUND), None)
    if "ftz" in instruction.modifiers:
        value = flush(value)
    if rounding is not None:
        value = rounding(value)
    if not origin.is_float and to.is_float:
        value = value.astype(np.float64) if to.bits < 64 else value
    elif origin.is_float and not to.is_float:
        value = _to_integer(value.astype(np.float64), to)
    elif not to.is_float:
        value = value.astype((SIGNED if to.is_signed else UNSIGNED)[to.bits])
    if to.is_float and "sat" in instruction.modifiers:
        value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
    machine.write(destination, value, to, mask, machine.undefined_of(source))


def _to_integer(value, type):
    """Saturated; NaN becomes 0."""
    limits = np.iinfo((SIGNED if type.is_signed else UNSIGNED)[type.bits])
    inside = (value > limits.min) & (value < limits.max)
    whole = np.where(inside, value, 0).astype(limits.dtype)
    whole = np.where(value >= limits.max, limits.max, whole)
    return np.where(value <= limits.min, limits.min, whole).astype(limits.dtype)


@opcode("cvt", "f16x2 bf16x2 f32", "rn")
def convert_pair(machine, instruction, mask):
    """Two float32, the first into the upper half."""
    destination, *sources = instruction.operands
    half = TYPES[instruction.types[0].kind.removesuffix("x2")]
    high, low = (
        to_bits(machine.read(source, TYPES["f32"]), half).astype(np.uint32) for source in sources
    )
    value = high << np.uint32(16) | low
    machine.write(destination, value, TYPES["b32"], mask, machine.undefined_of(*sources))


@opcode(
    "setp",
    "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64",
    f"{' '.join(COMPARE)} equ neu ltu leu gtu geu num nan lo ls hi hs ftz",
)
def compare(machine, instruction, mask):
    """The comparisons that end in u are true where an operand is NaN, the others are false."""
    destination, *operands = instruction.operands
    x, y = (machine.read(operand, instruction.type) for operand in operands)
    if "ftz" in instruction.modifiers:
        x, y = flush(x), flush(y)
    name = instruction.modifiers[0]
    if instruction.type.is_float:
        unordered = np.isnan(x) | np.isnan(y)
        if name in ("nan", "num"):
            result = unordered == (name == "nan")
        elif name in COMPARE:
            result = COMPARE[name](x, y) & ~unordered
        else:
            result = COMPARE[name[:-1]](x, y) | unordered
    else:
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
        result = COMPARE[name](x, y)
    machine.write(destination, result, TYPES["pred"], mask, machine.undefined_of(*operands))


@opcode("selp", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
def select(machine, instruction, mask):
    """Undefined only where what is chosen is."""
    destination, yes, no, predicate = instruction.operands
    type = Type("b", instruction.type.bits)
    chosen = machine.read(predicate, TYPES["pred"])
    value = np.where(chosen, machine.read(yes, type), machine.read(no, type))
    undefined = machine.undefined_of(predicate)
    of_yes, of_no = machine.undefined_of(yes), machine.undefined_of(no)
    if of_yes is not None or of_no is not None:
        picked = np.where(
            chosen, False if of_yes is None else of_yes, False if of_no is None else of_no
        )
        undefined = picked if undefined is None else undefined | picked
    machine.write(destination, value, type, mask, undefined)
