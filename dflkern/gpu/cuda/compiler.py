"""Compiling the CUDA sources with nvcc: the library, or the PTX and machine code of one file."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...cpu.compiler import ABI_TARGET, TORCH_FLAGS, VERSION_TIMEOUT, digest, sources
from ...library import BuildError
from ...library.processes import run

# A file is compiled once for every element type, as DFL_UNITS in csrc/kernels.cuh says.
HALVES_AND_SINGLE = ("fp16", "bf16", "fp32")
UNITS = tuple(
    (file, element)
    for file, elements in {
        "rows": HALVES_AND_SINGLE,
        "columns": HALVES_AND_SINGLE,
        "general": (*HALVES_AND_SINGLE, "fp64"),
        "boxes": (*HALVES_AND_SINGLE, "fp64"),
    }.items()
    for element in elements
)
DEFAULT_ARCHS = (75, 80, 86, 89, 90, 100, 120)
# -fmad=false: a multiply-add is fused where the source says so and nowhere else
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=false")
TIMEOUT = 3600.0  # seconds for a build, which takes minutes
WAY_OUT = "install NVIDIA's CUDA toolkit, or name its nvcc in the environment variable NVCC"


def find_nvcc() -> str:
    """The path of nvcc: $NVCC, else that of $CUDA_HOME, the PATH or /usr/local/cuda."""
    names = [os.environ["NVCC"]] if os.environ.get("NVCC") else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME") and not os.environ.get("NVCC"):
        names.insert(0, str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"))
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no CUDA compiler was found (looked for {', '.join(names)}); {WAY_OUT}")


@functools.cache
def _known_archs(nvcc: str) -> frozenset[int]:
    (listed,) = run([[nvcc, "--list-gpu-arch"]], timeout=VERSION_TIMEOUT)
    return frozenset(int(number) for number in re.findall(r"compute_(\d+)\b", listed))


def choose_archs(asked: Sequence[int] | None, nvcc: str) -> tuple[int, ...]:
    """The architectures to build for, ascending: as asked, else this machine's GPUs, else many."""
    known = _known_archs(nvcc)
    if asked:
        missing = [arch for arch in asked if arch not in known]
        if missing:
            raise BuildError(
                f"{nvcc} cannot build for sm_{missing[0]}; it knows "
                f"{', '.join(map(str, sorted(known)))}"
            )
        return tuple(sorted(set(asked)))
    if torch.cuda.is_available():
        present = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(device) for device in present}
        return choose_archs([10 * major + minor for major, minor in capabilities], nvcc)
    return tuple(arch for arch in DEFAULT_ARCHS if arch in known)


def key() -> str:
    """What a built library depends on, as a name; using one needs no nvcc, so nvcc is no part."""
    files = ["cuda/dfl_cuda.cu", *sorted({f"cuda/{file}.cu" for file, _ in UNITS})]
    return f"cuda-{digest(files, ABI_TARGET, FLAGS, platform.system(), platform.machine())}"


def unit_key(file: str, nvcc: str) -> str:
    """What the PTX and machine code of one file depend on, as a name."""
    return f"ptx-{digest([f'cuda/{file}.cu'], nvcc, nvcc_version(nvcc), FLAGS)}"


@functools.cache
def nvcc_version(nvcc: str) -> str:
    """The last line of what nvcc says of itself."""
    return run([[nvcc, "--version"]], timeout=VERSION_TIMEOUT)[0].strip().rpartition("\n")[2]


def compile_ptx(target: Path, file: str, element: str, arch: int, nvcc: str) -> dict[str, Any]:
    """Compile one file for one element type and GPU to PTX; what its manifest says."""
    include = ["-I", str(sources())]
    command = [nvcc, *FLAGS, *include, f"-arch=sm_{arch}", f"-DDFL_ELEMENT={element}", "-ptx"]
    source = str(sources() / "cuda" / f"{file}.cu")
    run([[*command, "-o", str(target), source]], timeout=TIMEOUT, scratch=target.parent)
    return {"compiler": nvcc_version(nvcc), "flags": list(FLAGS)}


def assemble(target: Path, ptx: Path, arch: int, nvcc: str) -> dict[str, Any]:
    """Compile PTX to machine code for one GPU; what its manifest says."""
    command = [nvcc, f"-arch=sm_{arch}", "-cubin", "-o", str(target), str(ptx)]
    run([command], timeout=TIMEOUT, scratch=target.parent)
    return {"compiler": nvcc_version(nvcc)}


def build(target: Path, archs: Sequence[int], nvcc: str) -> dict[str, Any]:
    """Compile the CUDA library.

    Args:
        target: the library's path, in an empty folder.
        archs: ascending; PTX for later GPUs is made for the last.
        nvcc: its path.

    Returns:
        What its manifest says of it.

    Raises:
        BuildError: with nvcc's first error message.
    """
    torch_folder = Path(torch.__file__).parent
    if not (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise BuildError(
            f"PyTorch {torch.__version__} is built without CUDA; install a build with it "
            "(https://pytorch.org/get-started) and build again"
        )
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    compile_ = [nvcc, *FLAGS, "-I", str(sources()), "-Xcompiler=-fPIC,-fvisibility=hidden"]
    include = (*TORCH_FLAGS, "-DUSE_CUDA", "-isystem", str(torch_folder / "include"))
    scratch = target.parent
    objects = [str(scratch / "dfl_cuda.o")]
    commands = [
        [*compile_, *include, "-c", str(sources() / "cuda" / "dfl_cuda.cu"), "-o", objects[0]]
    ]
    for file, element in UNITS:
        objects.append(str(scratch / f"{file}_{element}.o"))
        source = str(sources() / "cuda" / f"{file}.cu")
        commands.append(
            [*compile_, *code, f"-DDFL_ELEMENT={element}", "-c", source, "-o", objects[-1]]
        )
    run(commands, timeout=TIMEOUT, scratch=scratch)
    # The runtime linked in: no version of it has to be on the machine, with a GPU or without.
    link = [nvcc, "-shared", "-cudart=static", "-o", str(target), *objects]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    run([[*link, *libraries]], timeout=TIMEOUT, scratch=scratch)
    return {
        "abi": ABI_TARGET,
        "archs": list(archs),
        "compiler": nvcc_version(nvcc),
        "flags": list(FLAGS),
        "machine": platform.machine(),
    }
