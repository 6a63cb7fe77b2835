"""What a compiled kernel's machine code says of itself, read with NVIDIA's disassemblers.

Triton's wheel carries them, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*(?:/\*.*)?$"
)
LABEL = re.compile(r"^(\.L_x_\d+):")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Facts:
    """Facts of one kernel.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread.
        spills: instructions that read or write local memory.
        shared: bytes of shared memory that are part of the code.
        instructions: of the whole kernel.
        path: opcodes of the longest way through it without going back, such as a warp takes that
            has nothing left over; longer than any real way where two branches exclude each other.
        loops: whether any branch goes back.
        round_trips: how often a warp waits for what it has loaded from global memory, on the way
            with the most waits, each loop taken once. Loads that are issued before one of them is
            waited for are one round trip.
        loop_round_trips: the same for each further pass through a loop, by loop.
        widest_load: bytes of the widest load of global memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    path: tuple[str, ...]
    loops: bool
    round_trips: int
    loop_round_trips: tuple[int, ...]
    widest_load: int


def facts(cubin: bytes, entry: str) -> Facts:
    """The facts of an entry of a cubin.

    Raises:
        FileNotFoundError: if nvdisasm or cuobjdump is nowhere.
        subprocess.CalledProcessError: if one of them refuses the cubin.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    used = re.search(rf"Function {re.escape(entry)}:\s+(.*)", usage)
    if used is None:
        raise ValueError(f"facts: the cubin has no kernel {entry}.")
    usage_of = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", used[1])}
    lines = _lines(code, entry)
    opcodes = [line.opcode for line in lines]
    once, each_pass = round_trips(code, entry)
    loads = [opcode for opcode in opcodes if opcode.startswith("LDG")]
    return Facts(
        registers=usage_of["REG"],
        stack=usage_of["STACK"] + usage_of["LOCAL"],
        spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        shared=usage_of["SHARED"],
        instructions=len(lines),
        path=_longest(lines),
        loops=bool(_loops(lines)),
        round_trips=once,
        loop_round_trips=each_pass,
        widest_load=max(map(_width, loads), default=0),
    )


def round_trips(code: str, entry: str) -> tuple[int, tuple[int, ...]]:
    """`Facts.round_trips` and `Facts.loop_round_trips` of an entry of disassembled code."""
    lines = _lines(code, entry)
    each_pass = tuple(_waits_of_next_pass(loop) for loop in _loops(lines))
    return _waits(lines, frozenset())[0], each_pass


def _run(tool: str, *arguments: str) -> str:
    triton = importlib.util.find_spec("triton")
    folders = list(triton.submodule_search_locations or ()) if triton else []
    bundled = [Path(folder) / "backends" / "nvidia" / "bin" / tool for folder in folders]
    found = next((str(path) for path in bundled if path.exists()), None) or shutil.which(tool)
    if found is None:
        raise FileNotFoundError(f"{tool} is neither in Triton's package nor on the PATH.")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


class _Line(NamedTuple):
    """An instruction; `target` is the line that it branches to."""

    opcode: str
    guarded: bool
    operands: str
    target: int | None

    @property
    def ends(self) -> bool:
        """Whether the next line does not follow."""
        return self.opcode.split(".")[0] in ("EXIT", "RET", "BRA") and not self.guarded


def _lines(code: str, entry: str) -> list[_Line]:
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str, str | None]] = []
    inside = False
    for line in code.splitlines():
        if line.startswith(".text."):
            inside = line == f".text.{entry}:"
        if not inside:
            continue
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            branch = match[2].split(".")[0] == "BRA"
            target = TARGET.search(match[3]) if branch else None
            guarded = match[1] is not None
            found.append((match[2], guarded, match[3], target[1] if target else None))
    while found and (found[-1][0] == "NOP" or labels.get(found[-1][3] or "") == len(found) - 1):
        found.pop()  # padding after the end: a branch to itself
    return [
        _Line(opcode, guarded, operands, labels[to] if to else None)
        for opcode, guarded, operands, to in found
    ]


def _loops(lines: list[_Line]) -> list[list[_Line]]:
    """The lines of each loop, from the branch's target to the branch."""
    ends = [(line.target, i) for i, line in enumerate(lines)]
    spans = [(start, end + 1) for start, end in ends if start is not None and start <= end]
    return [
        [line._replace(target=_within(line.target, start, end)) for line in lines[start:end]]
        for start, end in spans
    ]


def _within(target: int | None, start: int, end: int) -> int | None:
    return target - start if target is not None and start <= target < end else None


def _waits_of_next_pass(loop: list[_Line]) -> int:
    _, pending = _waits(loop, frozenset())
    return _waits(loop, pending)[0]


def _waits(lines: list[_Line], pending: frozenset[int]) -> tuple[int, frozenset[int]]:
    """Waits for loads on the way with the most of them, and what is still being loaded at its end.

    Args:
        lines: of a kernel or a loop, whose branches back are not taken.
        pending: registers that are being loaded when the first line is reached.
    """
    reached: list[tuple[int, frozenset[int]] | None] = [(0, pending), *[None] * len(lines)]
    most = (0, pending)
    for i, line in enumerate(lines):
        state = reached[i]
        if state is None:
            continue
        waits, pending = state
        written, used = _registers(line)
        if pending & used:
            waits, pending = waits + 1, frozenset()
        if line.opcode.startswith("LDG"):
            pending |= written
        most = max(most, (waits, pending), key=lambda each: each[0])
        following = [] if line.ends else [i + 1]
        if line.target is not None and line.target > i:
            following.append(line.target)
        for place in following:
            reached[place] = _merged(reached[place], (waits, pending))
    return most[0], (reached[-1] or most)[1]


def _merged(
    one: tuple[int, frozenset[int]] | None, other: tuple[int, frozenset[int]]
) -> tuple[int, frozenset[int]]:
    if one is None or one[0] < other[0]:
        return other
    return (one[0], one[1] | other[1]) if one[0] == other[0] else one


def _registers(line: _Line) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that a load writes, and all that an instruction names."""
    found = [(int(m[1]), 2 if m[2] else 1) for m in REGISTER.finditer(line.operands)]
    wide = re.search(r"\.(64|128)\b", line.opcode)
    words = int(wide[1]) // 32 if wide else 1
    spans = [range(first, first + max(count, words * (i == 0))) for i, (first, count) in
             enumerate(found)]  # fmt: skip
    named = frozenset(register for span in spans for register in span)
    return frozenset(spans[0] if spans else ()), named


def _longest(lines: list[_Line]) -> tuple[str, ...]:
    """The longest way from the first line to an exit that never goes back."""
    length = [0] * (len(lines) + 1)
    following: list[int | None] = [None] * len(lines)
    for i in range(len(lines) - 1, -1, -1):
        target = lines[i].target
        ways = [] if lines[i].ends else [i + 1]
        if target is not None and target > i:
            ways.append(target)
        following[i] = max(ways, key=lambda way: length[way], default=None)
        length[i] = 1 + (length[way] if (way := following[i]) is not None else 0)
    path = []
    place: int | None = 0
    while place is not None and place < len(lines):
        path.append(lines[place].opcode.split(".")[0])
        place = following[place]
    return tuple(path)


def _width(load: str) -> int:
    found = re.search(r"\.[US]?(128|64|16|8)\b", load)
    return int(found[1]) // 8 if found else 4
