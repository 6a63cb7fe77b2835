"""The compiled code of one CUDA launch plan, for a GPU that is not there: needs NVRTC alone."""

from __future__ import annotations

import functools

from ..cuda import nvrtc
from ..launch_plan import LaunchPlan
from .compiled import Compiled


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile a plan's kernel.

    Args:
        plan: with the backend "cuda".
        arch: 80 for sm_80 and so on.

    Raises:
        BuildError: from NVRTC.
    """
    entry, ptx, cubin = _compile(plan.kernel, int(arch))
    return Compiled(entry, ptx, cubin, plan.shared or 0)


_compile = functools.lru_cache(maxsize=256)(nvrtc.compile_kernel)
