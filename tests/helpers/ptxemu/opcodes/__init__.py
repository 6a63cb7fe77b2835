"""What each PTX instruction does, from the text of the PTX ISA.

An opcode is a function of the machine, the instruction and the mask of the threads that execute it
(None: all), registered under its name with the types and modifiers it covers. Whatever is not
registered is refused by name before a kernel runs, so that to add an opcode is to write a function.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..parse import PtxError
from ..values import TYPES


class Opcode(NamedTuple):
    """A function, and what it covers."""

    execute: Callable
    types: frozenset
    modifiers: frozenset


REGISTERED = {}


def opcode(names, types="", modifiers=""):
    """Register a function for opcodes, types and modifiers, each a list with spaces."""
    covered = frozenset(TYPES[name] for name in types.split()), frozenset(modifiers.split())

    def register(function):
        for name in names.split():
            REGISTERED.setdefault(name, []).append(Opcode(function, *covered))
        return function

    return register


def bind(kernel):
    """Give each instruction of a kernel its function.

    Raises:
        PtxError: naming all instructions that are not emulated.
    """
    unknown = set()
    for instruction in kernel.code:
        for execute, types, modifiers in REGISTERED.get(instruction.name, ()):
            if types.issuperset(instruction.types) and modifiers.issuperset(instruction.modifiers):
                instruction.execute = execute
                break
        else:
            unknown.add(instruction.text)
    if unknown:
        raise PtxError(f"{kernel.name}: not emulated: {'; '.join(sorted(unknown))}")


from . import control, conversion, floats, integers, memory, warps  # noqa: E402, F401
