"""Compile launch plans for a GPU that is not there: no device, no driver, no CUDA toolkit needed.

Only in a process without TRITON_INTERPRET, which is read when kernels are decorated.
"""

from __future__ import annotations

import importlib
from typing import Any

from .plans import LaunchPlan


def compile_plan(plan: LaunchPlan, arch: int | str) -> Any:
    """Compile a plan's kernel as its launch would.

    Args:
        plan: a Triton launch plan.
        arch: 80 for sm_80 and so on, or the name of an AMD target such as "gfx942".

    Returns:
        Triton's compiled kernel: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`.
    """
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
    return triton.compile(source, target=target, options=options)
