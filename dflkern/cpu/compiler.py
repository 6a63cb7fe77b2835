"""Compiling the C++ sources with the machine's own compiler."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..library import BuildError
from ..library.processes import run
from ..library.reporting import announce

ABI_TARGET = "2.10"
CPU_SOURCES = (
    "cpu/dfl_cpu.cpp", "cpu/run.cpp", "cpu/block_float.cpp", "cpu/block_double.cpp",
    "cpu/vector_rows.cpp", "cpu/boxes.cpp", "cpu/boxes_cpu.cpp", "cpu/box_loss_cpu.cpp",
    "cpu/class_sums.cpp", "cpu/class_gradients.cpp", "cpu/class_positives.cpp",
    "cpu/class_loss_cpu.cpp", "cpu/assign.cpp", "cpu/assign_cpu.cpp",
)  # fmt: skip
# -ffp-contract=off: a multiply-add is fused where the source says so and nowhere else
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
# Of the LibTorch 2.10 headers, only what is stable across versions
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
# Instructions that a library built for other machines may use
PORTABLE = {"x86_64": ("avx2", "fma", "f16c"), "AMD64": ("avx2", "fma", "f16c")}
# Seconds, for what takes 10 to 30, 1 and 0.1
COMPILE_TIMEOUT, LINK_TIMEOUT, VERSION_TIMEOUT = 300.0, 60.0, 10.0


def sources() -> Path:
    """The folder csrc: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / CPU_SOURCES[0]).exists():
            return folder
    raise BuildError(
        f"the C++ sources are missing (looked in {package / 'csrc'}); reinstall dflkern"
    )


def with_includes(names: Iterable[str]) -> list[Path]:
    """Source files of csrc and all that they include from there, sorted: what is compiled."""
    folder = sources()
    found: set[Path] = set()
    waiting = [folder / name for name in names]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
                beside = path.parent / name
                waiting.append(beside if beside.exists() else folder / name)
    return sorted(found)


def digest(names: Iterable[str], *facts: object) -> str:
    """A key for what is compiled from source files of csrc under the given facts."""
    found = hashlib.sha256(repr(facts).encode())
    for path in with_includes(names):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.hexdigest()[:32]


def compilers() -> list[tuple[str, ...]]:
    """The commands of this machine's C++ compilers, best first; runs none of them.

    $CXX, then c++, g++ and clang++. $CXX may have arguments: "ccache g++", "g++ -O2".

    Raises:
        BuildError: if there is none.
    """
    wanted = [*filter(None, [_named()]), ("c++",), ("g++",), ("clang++",)]
    paths = [(shutil.which(words[0]), words) for words in wanted]
    found = [(path, *words[1:]) for path, words in paths if path]
    if not found:
        raise BuildError(
            f"no C++ compiler was found (looked for {', '.join(map(shlex.join, wanted))}); install "
            "one, with apt install g++ for example, or name it in the environment variable CXX"
        )
    return found


def _named() -> tuple[str, ...]:
    """The words of $CXX; none if it is not set, or has an open quotation mark."""
    try:
        return tuple(shlex.split(os.environ.get("CXX", "")))
    except ValueError:
        return ()


def toolchain() -> str:
    """Which compilers and torch a build would take, as a text; another installation changes it."""
    parts = [str(torch.__version__)]
    for command in compilers():
        for word in command:
            path = shutil.which(word)
            status = os.stat(path) if path else None
            parts.append(f"{word} {status and (status.st_size, status.st_mtime_ns)}")
    return "; ".join(parts)


def working_compiler(scratch: Path | None = None) -> tuple[tuple[str, ...], str]:
    """The first compiler that answers to --version, and the first line of its answer.

    Says so on stderr if $CXX names another one.

    Raises:
        BuildError: if there is none, with what each said.
    """
    refusals: list[BuildError] = []
    for command in compilers():
        try:
            answer = run([[*command, "--version"]], timeout=VERSION_TIMEOUT, scratch=scratch)[0]
        except BuildError as error:
            refusals.append(error)
            continue
        named = _named()
        if os.environ.get("CXX") and (named and shutil.which(named[0]), *named[1:]) != command:
            why = f" ({refusals[0]})" if refusals else ""
            announce(f"CXX={os.environ['CXX']} is not a working compiler{why}; using {command[0]}")
        return command, answer.strip().partition("\n")[0]
    raise type(refusals[-1])("; ".join(map(str, refusals)))


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this machine's CPU, as far as it tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(set(values.split())))
    except OSError:
        pass
    return (platform.machine(), torch.backends.cpu.get_cpu_capability())


def target_flags(portable: bool) -> tuple[str, ...]:
    """Compiler flags for this machine alone, or for all of its kind that have PORTABLE."""
    if not portable:
        if platform.machine() == "arm64":
            return ("-mcpu=native",)
        # Generic tuning is the faster one on processors that the compiler does not know yet
        return ("-march=native", "-mtune=generic")
    return tuple(f"-m{feature}" for feature in PORTABLE.get(platform.machine(), ()))


def key() -> str:
    """What a cached build depends on, as a name. No compiler: a build serves without one."""
    return digest(
        CPU_SOURCES, ABI_TARGET, FLAGS, TORCH_FLAGS, target_flags(False),
        platform.system(), platform.machine(), cpu_features(),
    )  # fmt: skip


def build(target: Path, *, portable: bool = False) -> dict[str, Any]:
    """Compile the CPU library.

    Args:
        target: the library's path, in an empty folder.
        portable: use no instructions beyond PORTABLE, instead of all this machine has.

    Returns:
        What its manifest says of it.

    Raises:
        BuildError: with the compiler's first error message.
    """
    scratch = target.parent
    compiler, version = working_compiler(scratch)
    torch_folder = Path(torch.__file__).parent
    flags = (*FLAGS, *target_flags(portable))
    include = (
        *TORCH_FLAGS, "-I", str(sources()), "-isystem", str(torch_folder / "include"),
    )  # fmt: skip
    objects = [str(scratch / f"{Path(name).stem}.o") for name in CPU_SOURCES]
    compile_all = [
        [*compiler, *flags, *include, "-c", str(sources() / name), "-o", path]
        for name, path in zip(CPU_SOURCES, objects, strict=True)
    ]
    run(compile_all, timeout=COMPILE_TIMEOUT, scratch=scratch)
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    run(
        [[*compiler, "-shared", "-o", str(target), *objects, *link, *libraries]],
        timeout=LINK_TIMEOUT, scratch=scratch,
    )  # fmt: skip
    return {
        "abi": ABI_TARGET,
        "compiler": version,
        "command": shlex.join(compiler),
        "flags": list(flags),
        "features": list(PORTABLE.get(platform.machine(), ()) if portable else cpu_features()),
        "machine": platform.machine(),
    }
