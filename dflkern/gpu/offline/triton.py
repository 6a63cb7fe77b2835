"""The compiled code of one Triton launch plan, for a GPU that is not there.

Only in a process without TRITON_INTERPRET, which is read when kernels are decorated.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget

from ..launch_plan import LaunchPlan
from ..triton.loading import options_of, source_of
from .compiled import Compiled


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile a plan's kernel as its launch would."""
    target = (
        GPUTarget("cuda", arch, 32)
        if isinstance(arch, int)
        else GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    )
    built = triton.compile(source_of(plan), target=target, options=options_of(plan))
    return Compiled(
        entry=built.metadata.name,
        ptx=built.asm.get("ptx", ""),
        cubin=built.asm.get("cubin", b""),
        shared=built.metadata.shared,
        hsaco=built.asm.get("hsaco", b""),
    )
