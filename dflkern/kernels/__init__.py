"""GPU kernels and the launch plans that say how an operator runs on a `Problem`.

Importing this package imports no Triton; launching does.
"""

from .box_plans import steps
from .cuda_plans import prefers_triton
from .plans import Argument, LaunchPlan, beyond_grid, plan

__all__ = ["Argument", "LaunchPlan", "beyond_grid", "plan", "prefers_triton", "steps"]
