"""GPU kernels and the launch plans that say how an operator runs on a `Problem`.

Importing this package imports no Triton; launching does.
"""

from .box_plans import steps
from .cuda_plans import prefers_triton
from .plans import Argument, LaunchPlan, plan, too_long

__all__ = ["Argument", "LaunchPlan", "plan", "prefers_triton", "steps", "too_long"]
