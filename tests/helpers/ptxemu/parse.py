"""PTX text as a list of instructions."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .values import TYPES


class PtxError(Exception):
    """PTX that is not emulated, or that does what no kernel may do."""


class Register(NamedTuple):
    """A register or predicate."""

    name: str


class Special(NamedTuple):
    """A special register: tid.x, ctaid.y, …"""

    name: str


class Immediate(NamedTuple):
    """A constant's bits, as a Python integer."""

    bits: int


class Symbol(NamedTuple):
    """A label, a parameter, or a variable in shared memory."""

    name: str


class Vector(NamedTuple):
    """{a, b, …}."""

    items: tuple


class Address(NamedTuple):
    """[base + offset]."""

    base: object
    offset: int


class Pair(NamedTuple):
    """a|b, two destinations."""

    first: object
    second: object


class Not(NamedTuple):
    """!p."""

    predicate: Register


@dataclass
class Counts:
    """What the executions of one instruction cost."""

    warps: int = 0
    sectors: int = 0
    least_sectors: int = 0
    wavefronts: int = 0


@dataclass
class Instruction:
    """One statement. `guard` is its predicate or None; `line` its source file, line and column."""

    text: str
    line: str
    guard: object
    name: str
    modifiers: tuple
    types: tuple
    operands: tuple
    execute: object = None
    counts: Counts = field(default_factory=Counts)

    @property
    def type(self):
        """Of the operands where all have the same, else of the last one."""
        return self.types[-1]

    @property
    def joins(self):
        """Whether the lanes of a warp execute it together."""
        return self.name in ("shfl", "redux") or "warp" in self.modifiers


class Parameter(NamedTuple):
    """A kernel parameter: its name, place in bytes and size."""

    name: str
    offset: int
    size: int


class Variable(NamedTuple):
    """A variable in shared memory; its size is 0 if the launch decides."""

    name: str
    size: int
    alignment: int


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*\{")
STATEMENT = re.compile(
    r"\s*(?:(?P<scope>[{}])|(?P<label>[\w$]+)\s*:(?!:)|\.loc(?P<line>[^\n]*)\n|(?P<statement>[^;]+);)"
)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)")
GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
IGNORED = (".pragma", ".file", ".section", ".branchtargets")


class Kernel:
    """The instructions, labels, registers, parameters and shared variables of one entry."""

    def __init__(self, ptx, entry):
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", " ", ptx, flags=re.DOTALL))
        self.target = re.search(r"\.target\s+(\w+)", text)[1]
        entries = {match[1]: match for match in ENTRY.finditer(text)}
        if entry not in entries:
            raise PtxError(f"no entry {entry}; there are {', '.join(entries)}")
        head = entries[entry]
        self.name = entry
        self.parameters = _parameters(head[2] or "")
        self.registers, self.labels, self.code = {}, {}, []
        self.variables = [_variable(m) for m in SHARED.finditer(text[: head.start()])]
        self._body(text, head.end())

    def _body(self, text, at):
        scopes, line = [{}], ""
        while scopes:
            match = STATEMENT.match(text, at)
            at = match.end()
            if match["scope"] == "{":
                scopes.append({})
            elif match["scope"]:
                scopes.pop()
            elif match["label"]:
                self.labels[match["label"]] = len(self.code)
            elif match["line"]:
                line = ":".join(match["line"].split()[:3])
            else:
                self._statement(" ".join(match["statement"].split()), line, scopes)

    def _statement(self, text, line, scopes):
        if text.startswith(".reg"):
            self._declare(text, scopes)
        elif variable := SHARED.match(text):
            self.variables.append(_variable(variable))
        elif not text.startswith(IGNORED):
            self.code.append(self._instruction(text, line, scopes))

    def _declare(self, text, scopes):
        _, kind, names = text.replace(".reg.", ".reg .").split(None, 2)
        for name in split(names):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = each if len(scopes) == 1 else f"{each}@{len(self.registers)}"
                scopes[-1][each] = unique
                self.registers[unique] = TYPES[kind[1:]].bits

    def _instruction(self, text, line, scopes):
        guard, rest = None, text
        if match := GUARD.match(text):
            guard = self._operand(match[2], scopes)
            guard, rest = Not(guard) if match[1] else guard, text[match.end() :]
        mnemonic, _, operands = rest.partition(" ")
        name, *parts = mnemonic.replace("::", ":").split(".")
        return Instruction(
            text=text,
            line=line,
            guard=guard,
            name=name,
            modifiers=tuple(part for part in parts if part not in TYPES),
            types=tuple(TYPES[part] for part in parts if part in TYPES),
            operands=tuple(self._operand(operand, scopes) for operand in split(operands)),
        )

    def _operand(self, text, scopes):
        if text[0] == "{":
            return Vector(tuple(self._operand(item, scopes) for item in split(text[1:-1])))
        if text[0] == "[":
            base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
            return Address(self._operand(base, scopes), int(offset or "0", 0))
        if "|" in text:
            return Pair(*(self._operand(item, scopes) for item in text.split("|")))
        if text[0] == "!":
            return Not(self._operand(text[1:], scopes))
        for scope in reversed(scopes):
            if text in scope:
                return Register(scope[text])
        if text[0] == "%":
            return Special(text[1:])
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            return Immediate(int(match[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return Symbol(text)


def split(text):
    """The items of a list, at the commas outside of brackets."""
    items = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)
    return [item.strip() for item in items if item.strip()]


def _parameters(text):
    parameters, offset = [], 0
    for declaration in split(text):
        kind = re.search(r"\.([bsuf]\d+)\b", declaration)[1]
        name, length = re.search(r"([\w$]+)(?:\[(\d+)\])?$", declaration).groups()
        size = TYPES[kind].bits // 8
        aligned = re.match(r"\.param\s+\.align\s+(\d+)", declaration)
        alignment = int(aligned[1]) if aligned else size
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(name, offset, size * int(length or 1)))
        offset += parameters[-1].size
    return parameters


def _variable(match):
    alignment, kind, name, dimensions = match.groups()
    size = TYPES[kind].bits // 8
    for length in re.findall(r"\[(\d*)\]", dimensions):
        size *= int(length or 0)
    return Variable(name, size, int(alignment or 1))
