"""Compile launch plans for a GPU that is not there: no device, no driver, no CUDA toolkit needed.

Triton kernels only in a process without TRITON_INTERPRET, which is read when they are decorated.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from .plans import LaunchPlan


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one GPU architecture.

    `ptx` and `cubin` are empty for an AMD target, whose machine code `hsaco` holds. `shared` is
    the bytes of shared memory that the launch asks for.
    """

    entry: str
    ptx: str
    cubin: bytes
    shared: int
    hsaco: bytes = b""


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile a plan's kernel as its launch would.

    Args:
        plan: of either GPU backend.
        arch: 80 for sm_80 and so on, or, for Triton, the name of an AMD target such as "gfx942".
    """
    if plan.backend == "cuda":
        from . import nvcc

        return nvcc.compile_plan(plan, arch)
    return _compile_triton(plan, arch)


def _compile_triton(plan: LaunchPlan, arch: int | str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f".{plan.module}", __package__), plan.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    constants = dict(plan.constants)
    signature = dict.fromkeys(constants, "constexpr") | {a.name: a.type for a in plan.arguments}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[a.name],): [["tt.divisibility", 16]] for a in plan.arguments if a.divisible},
    )
    target = (
        GPUTarget("cuda", arch, 32)
        if isinstance(arch, int)
        else GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    )
    options = {"num_warps": plan.num_warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=target, options=options)
    return Compiled(
        entry=built.metadata.name,
        ptx=built.asm.get("ptx", ""),
        cubin=built.asm.get("cubin", b""),
        shared=built.metadata.shared,
        hsaco=built.asm.get("hsaco", b""),
    )
