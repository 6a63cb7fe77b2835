"""Compile launch plans for a GPU that is not there: no device, no driver needed."""

from __future__ import annotations

import importlib

from ..launch_plan import LaunchPlan
from .compiled import Compiled

COMPILERS = {"triton": ".triton", "cuda": ".cuda"}  # modules, of which the first imports Triton


def compile_plan(plan: LaunchPlan, arch: int | str) -> Compiled:
    """Compile a plan's kernel as its launch would.

    Args:
        plan: of either GPU backend.
        arch: 80 for sm_80 and so on, or, for Triton, the name of an AMD target such as "gfx942".
    """
    module = importlib.import_module(COMPILERS[plan.backend], __package__)
    compiled: Compiled = module.compile_plan(plan, arch)
    return compiled
