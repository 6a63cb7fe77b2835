"""Compiling the CUDA sources with nvcc: the library, or the PTX and machine code of one file."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .compiler import ABI_TARGET, TORCH_FLAGS, BuildError, compiler_version, run, sources

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
    listed = run([nvcc, "--list-gpu-arch"])
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
    digest = _sources_digest()
    digest.update(repr((ABI_TARGET, FLAGS, platform.system(), platform.machine())).encode())
    return f"cuda-{digest.hexdigest()[:32]}"


def unit_key(nvcc: str) -> str:
    """What the PTX and machine code of one file depend on, as a name."""
    digest = _sources_digest()
    digest.update(repr((nvcc, compiler_version(nvcc), FLAGS)).encode())
    return f"ptx-{digest.hexdigest()[:32]}"


def _sources_digest() -> hashlib._Hash:
    digest = hashlib.sha256()
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cu", ".cuh") or path.name in ("dfl_math.h", "iou.h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest


def compile_unit(file: str, element: str, arch: int, folder: Path, nvcc: str) -> None:
    """Put <file>_<element>_sm<arch>.ptx and .cubin into folder, each in one step."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        stem = Path(scratch) / f"{file}_{element}_sm{arch}"
        ptx, cubin = stem.with_suffix(".ptx"), stem.with_suffix(".cubin")
        source = str(sources() / f"{file}.cu")
        target = [f"-arch=sm_{arch}", f"-DDFL_ELEMENT={element}"]
        run([nvcc, *FLAGS, *target, "-ptx", "-o", str(ptx), source])
        run([nvcc, f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(ptx)])
        for path in (cubin, ptx):
            os.replace(path, folder / path.name)


def build(target: Path, archs: Sequence[int], nvcc: str) -> None:
    """Compile the CUDA library and put it at target in one step.

    Args:
        target: the library's path, in a folder that exists.
        archs: ascending; PTX for later GPUs is made for the last.
        nvcc: its path.

    Raises:
        BuildError: with the compiler's last words.
    """
    torch_folder = Path(torch.__file__).parent
    if not (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise BuildError(
            f"PyTorch {torch.__version__} is built without CUDA; install a build with it "
            "(https://pytorch.org/get-started) and build again"
        )
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    compile_ = [nvcc, *FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden"]
    include = (*TORCH_FLAGS, "-DUSE_CUDA", "-isystem", str(torch_folder / "include"))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        host = str(Path(scratch) / "dfl_cuda.o")
        commands = [[*compile_, *include, "-c", str(sources() / "dfl_cuda.cu"), "-o", host]]
        objects = [host]
        for file, element in UNITS:
            objects.append(str(Path(scratch) / f"{file}_{element}.o"))
            source = str(sources() / f"{file}.cu")
            commands.append(
                [*compile_, *code, f"-DDFL_ELEMENT={element}", "-c", source, "-o", objects[-1]]
            )
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(run, commands))
        library = Path(scratch) / target.name
        # The runtime linked in: no version of it has to be on the machine, with a GPU or without.
        run(
            [
                nvcc, "-shared", "-cudart=static", "-o", str(library), *objects,
                f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda",
            ]
        )  # fmt: skip
        os.replace(library, target)
