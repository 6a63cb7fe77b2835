"""Floating-point arithmetic.

What PTX calls approximate is computed exactly, rounded, and then moved by a few units in the last
place, so that no kernel passes by luck of correctly rounded special functions.
"""

import functools

import numpy as np

from ..values import TYPES, either, flush, fused_multiply_add
from . import opcode

BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,  # the number, where one operand is NaN
    "max": np.fmax,
    "div": np.divide,
    "copysign": lambda sign, size: np.copysign(size, sign),
}
UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}


@opcode("add sub mul", "f32 f64", "rn ftz sat")
@opcode("min max", "f32 f64", "ftz NaN")
@opcode("div", "f32 f64", "rn full approx ftz")
@opcode("copysign", "f32 f64", "")
def binary(machine, instruction, mask):
    """From sm_100 on, the minimum and the maximum also take three operands."""
    function = BINARY[instruction.name]
    if "NaN" in instruction.modifiers:
        function = {"min": np.minimum, "max": np.maximum}[instruction.name]
    compute(machine, instruction, mask, lambda *values: functools.reduce(function, values))


@opcode("fma", "f32 f64", "rn ftz sat")
def fma(machine, instruction, mask):
    compute(machine, instruction, mask, fused_multiply_add)


@opcode("neg abs", "f32 f64", "ftz")
@opcode("ex2 lg2", "f32", "approx ftz")
@opcode("rcp sqrt", "f32 f64", "rn approx ftz")
def unary(machine, instruction, mask):
    function = UNARY[instruction.name]
    if instruction.name in ("ex2", "lg2"):

        def function(x):
            return UNARY[instruction.name](x.astype(np.float64)).astype(x.dtype)

    compute(machine, instruction, mask, function)


@opcode("add sub mul fma", "f32x2", "rn")
def paired(machine, instruction, mask):
    """The same on two float32 in one register."""
    destination, *operands = instruction.operands
    function = BINARY.get(instruction.name, fused_multiply_add)
    pairs = [
        np.ascontiguousarray(np.broadcast_to(machine.read(o, TYPES["b64"]), machine.size))
        for o in operands
    ]
    result = function(*(pair.view(np.float32) for pair in pairs)).view(np.uint64)
    halves = zip(*(machine.undefined_parts(o, 2) for o in operands), strict=True)
    undefined = tuple(either(masks) for masks in halves)
    machine.write_parts(destination, result, TYPES["b64"], mask, undefined)


@opcode("add sub mul", "f16", "rn")
@opcode("add sub mul", "bf16", "rn")
def halves(machine, instruction, mask):
    """In float32, whose digits suffice for the second rounding to change nothing."""
    destination, *operands = instruction.operands
    values = [machine.read(o, instruction.type).astype(np.float32) for o in operands]
    result = BINARY[instruction.name](*values)
    machine.write(destination, result, instruction.type, mask, machine.undefined_of(*operands))


@opcode("add sub fma", "f32 f16 bf16", "rn")
def mixed(machine, instruction, mask):
    """In float32, all but the last operand in half precision."""
    destination, *halves, last = instruction.operands
    wide, half = instruction.types
    values = [machine.read(operand, half).astype(np.float32) for operand in halves]
    values.append(machine.read(last, wide))
    result = BINARY.get(instruction.name, fused_multiply_add)(*values)
    machine.write(destination, result, wide, mask, machine.undefined_of(*halves, last))


def perturb(values, ulps):
    """Float32 values moved by −ulps to ulps units in the last place, each the same way every time.

    As a GPU's ex2, lg2 and divisions may be off. Powers of two, zeros, infinities and NaN stay.
    """
    bits = np.asarray(values, np.float32).view(np.int32)
    shift = (bits.astype(np.int64) * 2654435761 >> 16) % (2 * ulps + 1) - ulps
    plain = np.isfinite(values) & (bits & 0x7FFFFF != 0)
    return np.where(plain, bits + shift, bits).astype(np.int32).view(np.float32)


def compute(machine, instruction, mask, function):
    """Write function of the operands, as the modifiers .ftz and .sat want it."""
    destination, *operands = instruction.operands
    values = [machine.read(operand, instruction.type) for operand in operands]
    if "ftz" in instruction.modifiers:
        result = flush(np.asarray(function(*map(flush, values))))
    else:
        result = function(*values)
    if machine.ulps and not {"approx", "full"}.isdisjoint(instruction.modifiers):
        result = perturb(result, machine.ulps)
    if "sat" in instruction.modifiers:
        result = np.where(result > 0, np.minimum(result, 1), 0)  # NaN becomes 0, too
    undefined = machine.undefined_of(*operands)
    machine.write(destination, result, instruction.type, mask, undefined)
