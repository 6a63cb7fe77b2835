"""Compiling the C++ sources with the machine's own compiler."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ABI_TARGET = "2.10"
CPU_SOURCES = (
    "dfl_cpu.cpp", "run.cpp", "block_float.cpp", "block_double.cpp", "vector_rows.cpp",
    "boxes.cpp", "boxes_cpu.cpp",
)  # fmt: skip
# -ffp-contract=off: a multiply-add is fused where the source says so and nowhere else
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
# Of the LibTorch 2.10 headers, only what is stable across versions
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
# Instructions that a library built for other machines may use
PORTABLE = {"x86_64": ("avx2", "fma", "f16c"), "AMD64": ("avx2", "fma", "f16c")}


class BuildError(RuntimeError):
    """Why a library could not be built, and what to do."""


def sources() -> Path:
    """The folder csrc: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / CPU_SOURCES[0]).exists():
            return folder
    raise BuildError(
        f"the C++ sources are missing (looked in {package / 'csrc'}); reinstall dflkern"
    )


def find_compiler() -> str:
    """The path of a C++ compiler: $CXX, else c++, g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(
        f"no C++ compiler was found (looked for {', '.join(names)}); install one, with "
        "apt install g++ for example, or name it in the environment variable CXX"
    )


@functools.cache
def compiler_version(compiler: str) -> str:
    """What the compiler says of itself."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{compiler} does not run: {error}") from error
    return done.stdout


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


def key(compiler: str) -> str:
    """What a cached build depends on, as a name."""
    digest = hashlib.sha256()
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    environment = (
        ABI_TARGET, compiler, compiler_version(compiler), FLAGS, TORCH_FLAGS, target_flags(False),
        platform.system(), platform.machine(), cpu_features(),
    )  # fmt: skip
    digest.update(repr(environment).encode())
    return digest.hexdigest()[:32]


def build(target: Path, *, compiler: str, portable: bool = False) -> None:
    """Compile the CPU library and put it at target in one step.

    Args:
        target: the library's path, in a folder that exists.
        compiler: the path of a C++ compiler.
        portable: use no instructions beyond PORTABLE, instead of all this machine has.

    Raises:
        BuildError: with the compiler's last words.
    """
    torch_folder = Path(torch.__file__).parent
    folder, flags = sources(), (*FLAGS, *target_flags(portable))
    include = (*TORCH_FLAGS, "-isystem", str(torch_folder / "include"))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        objects = [Path(scratch) / f"{name}.o" for name in CPU_SOURCES]
        commands = [
            [compiler, *flags, *include, "-c", str(folder / name), "-o", str(path)]
            for name, path in zip(CPU_SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(run, commands))
        library = Path(scratch) / target.name
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        run(
            [
                compiler, "-shared", "-o", str(library), *map(str, objects), *link,
                f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
            ]
        )  # fmt: skip
        os.replace(library, target)


def run(command: list[str]) -> str:
    """Run a compiler; what it printed, or a BuildError with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        told = [line for line in words if "error" in line.lower()] or words[-3:] or ["no message"]
        raise BuildError(
            f"{Path(command[0]).name} failed with exit code {done.returncode}: {told[0].strip()}"
        )
    return done.stdout
