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

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*(?:/\*.*)?$"
)
LABEL = re.compile(r"^(\.L_x_\d+):")
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
        widest_load: bytes of the widest load of global memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    path: tuple[str, ...]
    loops: bool
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
    opcodes = [opcode for opcode, _, _ in lines]
    loads = [opcode for opcode in opcodes if opcode.startswith("LDG")]
    return Facts(
        registers=usage_of["REG"],
        stack=usage_of["STACK"] + usage_of["LOCAL"],
        spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        shared=usage_of["SHARED"],
        instructions=len(lines),
        path=_longest(lines),
        loops=any(target is not None and target <= i for i, (_, _, target) in enumerate(lines)),
        widest_load=max(map(_width, loads), default=0),
    )


def _run(tool: str, *arguments: str) -> str:
    triton = importlib.util.find_spec("triton")
    folders = list(triton.submodule_search_locations or ()) if triton else []
    bundled = [Path(folder) / "backends" / "nvidia" / "bin" / tool for folder in folders]
    found = next((str(path) for path in bundled if path.exists()), None) or shutil.which(tool)
    if found is None:
        raise FileNotFoundError(f"{tool} is neither in Triton's package nor on the PATH.")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _lines(code: str, entry: str) -> list[tuple[str, bool, int | None]]:
    """Opcode, whether it has a guard, and where it branches to, for each line of a kernel."""
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str | None]] = []
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
            found.append((match[2], match[1] is not None, target[1] if target else None))
    while found and found[-1][0].split(".")[0] in ("NOP", "BRA"):  # padding after the end
        found.pop()
    return [(opcode, guard, labels[to] if to else None) for opcode, guard, to in found]


def _longest(lines: list[tuple[str, bool, int | None]]) -> tuple[str, ...]:
    """The longest way from the first line to an exit that never goes back."""
    length = [0] * (len(lines) + 1)
    following: list[int | None] = [None] * len(lines)
    for i in range(len(lines) - 1, -1, -1):
        opcode, guarded, target = lines[i]
        ends = opcode.split(".")[0] in ("EXIT", "RET", "BRA") and not guarded
        ways = [] if ends else [i + 1]
        if target is not None and target > i:
            ways.append(target)
        following[i] = max(ways, key=lambda way: length[way], default=None)
        length[i] = 1 + (length[way] if (way := following[i]) is not None else 0)
    path = []
    place: int | None = 0
    while place is not None and place < len(lines):
        path.append(lines[place][0].split(".")[0])
        place = following[place]
    return tuple(path)


def _width(load: str) -> int:
    found = re.search(r"\.[US]?(128|64|16|8)\b", load)
    return int(found[1]) // 8 if found else 4
