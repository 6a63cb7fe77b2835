"""The compiled code of one Triton launch plan, for a GPU that is not there.

Only in a process without TRITON_INTERPRET, which is read when kernels are decorated.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch import kernel_of
from ..launch_plan import LaunchPlan
from .compiled import Compiled


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile a plan's kernel as its launch would."""
    kernel = kernel_of(plan)
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
