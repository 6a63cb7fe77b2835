"""GPU kernels and the launch plans that say how an operator runs on a `Problem`.

Importing this package imports no Triton; launching does.
"""

from .plans import Argument, LaunchPlan, plan

__all__ = ["Argument", "LaunchPlan", "plan"]
