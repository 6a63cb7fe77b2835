"""The compiled code of one CUDA launch plan, for a GPU that is not there: needs nvcc alone."""

from __future__ import annotations

import re

from filelock import FileLock

from .. import cache, cuda_compiler
from .offline import Compiled
from .plans import LaunchPlan


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile the file that holds a plan's kernel, unless that is in the user's cache already.

    Args:
        plan: with the backend "cuda".
        arch: 80 for sm_80 and so on.

    Returns:
        The PTX of the one kernel, and the machine code of all kernels of its file.
    """
    nvcc = cuda_compiler.find_nvcc()
    (arch,) = cuda_compiler.choose_archs([int(arch)], nvcc)
    file, element = unit_of(plan.kernel)
    folder = cache.folder(cuda_compiler.unit_key(nvcc))
    stem = folder / f"{file}_{element}_sm{arch}"
    with FileLock(f"{stem}.lock"):
        if not stem.with_suffix(".ptx").exists():
            cuda_compiler.compile_unit(file, element, arch, folder, nvcc)
    return Compiled(
        entry=plan.kernel,
        ptx=_only(stem.with_suffix(".ptx").read_text(), plan.kernel),
        cubin=stem.with_suffix(".cubin").read_bytes(),
        shared=plan.shared or 0,
    )


def unit_of(kernel: str) -> tuple[str, str]:
    """The file and the element type whose compilation holds a kernel."""
    return re.sub(r"\d", "", kernel.partition("_")[0]), kernel.rpartition("_")[2]


def _only(ptx: str, kernel: str) -> str:
    """The module without its other entries."""
    entry = r"(?ms)^\.visible \.entry (\w+)\(.*?^}\n"
    return re.sub(entry, lambda found: found[0] if found[1] == kernel else "", ptx)
