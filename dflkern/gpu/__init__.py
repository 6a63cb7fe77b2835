"""GPU kernels, the launch plans that say how an operator runs on a `Problem`, and launching.

Importing this package imports no Triton; launching does.
"""

from .cuda.plans import prefers_triton
from .launch_plan import Argument, LaunchPlan, steps
from .plans import beyond_grid, plan

__all__ = ["Argument", "LaunchPlan", "beyond_grid", "plan", "prefers_triton", "steps"]
