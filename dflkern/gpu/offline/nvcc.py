"""The compiled code of one CUDA launch plan, for a GPU that is not there: needs nvcc alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...library import Recipe, store
from ..cuda import compiler as cuda_compiler
from ..launch_plan import LaunchPlan
from .compiled import Compiled


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
    key = cuda_compiler.unit_key(file, nvcc)
    name = f"{file}_{element}_sm{arch}"

    def compiled(suffix: str, build: Callable[[Path], dict[str, Any]]) -> Path:
        return store.obtain(
            Recipe(
                file=name + suffix,
                purpose=f"CUDA kernels {name}{suffix}",
                duration="a few seconds",
                key=lambda: key,
                build=build,
                compiler=lambda: nvcc,
                executable=False,
                timeout=cuda_compiler.TIMEOUT,
            )
        ).path

    ptx = compiled(".ptx", lambda path: cuda_compiler.compile_ptx(path, file, element, arch, nvcc))
    cubin = compiled(".cubin", lambda path: cuda_compiler.assemble(path, ptx, arch, nvcc))
    return Compiled(
        entry=plan.kernel,
        ptx=_only(ptx.read_text(), plan.kernel),
        cubin=cubin.read_bytes(),
        shared=plan.shared or 0,
    )


def unit_of(kernel: str) -> tuple[str, str]:
    """The file and the element type whose compilation holds a kernel."""
    return re.sub(r"\d", "", kernel.partition("_")[0]), kernel.rpartition("_")[2]


def _only(ptx: str, kernel: str) -> str:
    """The module without its other entries."""
    entry = r"(?ms)^\.visible \.entry (\w+)\(.*?^}\n"
    return re.sub(entry, lambda found: found[0] if found[1] == kernel else "", ptx)
