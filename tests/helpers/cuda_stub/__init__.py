"""A CUDA device made of stubs: the host code of PyTorch, Triton and dflkern runs as on a GPU.

`build` compiles it, `environment` is what a process needs to get it instead of a GPU, and
`counters` reads, in that process, what it has counted. README.md says what it can and cannot show.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libcuda.so.1"  # the name by which Triton and PyTorch look for the driver
HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")
MAJOR = 13  # of the CUDA API that the sources are written for


def missing() -> str | None:
    """Why the stub cannot be built and used here; None if it can."""
    import torch

    if not sys.platform.startswith("linux"):
        return f"the stub device is preloaded on Linux only, and this is {sys.platform}"
    if not shutil.which("gcc"):
        return "gcc is not on the PATH"
    if int((torch.version.cuda or "0").partition(".")[0]) != MAJOR:
        return (
            f"PyTorch is built for CUDA {torch.version.cuda}, and the stub device is CUDA {MAJOR}"
        )
    lacking = [name for name in HEADERS if not any((f / name).exists() for f in _includes())]
    if lacking:
        return f"CUDA's headers {', '.join(lacking)} are neither in pip's packages nor in CUDA_HOME"
    return None


def _includes() -> Iterator[Path]:
    """Folders with CUDA's headers: of pip's packages for this PyTorch, Triton's, the toolkit's."""
    for package, folder in (
        ("nvidia", f"cu{MAJOR}/include"),
        ("triton", "backends/nvidia/include"),
    ):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            yield Path(place) / folder
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def build(folder: Path) -> Path:
    """Compile the stub into a folder and return the folder.

    Raises:
        subprocess.CalledProcessError: if gcc refuses it; what gcc says is on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{place}" for place in _includes() if place.is_dir()]
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    target = folder / LIBRARY
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-shared", "-fPIC",
         *includes, *sources, "-o", str(target), "-ldl", "-pthread",
         f"-Wl,-soname,{LIBRARY},-Bsymbolic"],
        check=True,
    )  # fmt: skip
    return folder


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """The environment of a process on the stub device in `folder`.

    Args:
        folder: what `build` returned. dflkern, Triton and Inductor keep their caches in it.
        settings: LAUNCH_NS, GPUS, CC, DRIVER, FILL, D2H, see README.md.
    """
    given = {f"STUB_{name}": str(value) for name, value in settings.items()}
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    }
    return (
        inherited
        | given
        | {
            "LD_PRELOAD": str(folder / LIBRARY),
            "LD_LIBRARY_PATH": str(folder),
            "DFLKERN_CACHE": str(folder / "dflkern"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }
    )


COUNTERS = (
    "runtime_launches", "driver_launches", "copies", "allocations", "waits", "file_calls"
)  # fmt: skip


def counters() -> dict[str, int]:
    """What the stub device of this process has counted so far."""
    stub = ctypes.CDLL(LIBRARY)
    return {name: ctypes.c_long.in_dll(stub, f"stub_{name}").value for name in COUNTERS}


def counted(before: dict[str, int]) -> dict[str, int]:
    """What it has counted since `before`."""
    return {name: value - before[name] for name, value in counters().items()}
