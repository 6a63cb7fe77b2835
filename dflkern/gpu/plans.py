"""The launch plan of a step of an operator, on the backend that is asked for."""

from __future__ import annotations

import functools

from ..problem import Problem
from .arguments import grid_axes
from .box_problem import BoxProblem
from .cuda.box_plans import plan_boxes as plan_cuda_boxes
from .cuda.plans import plan_distributions as plan_cuda_distributions
from .launch_plan import GRID_LIMIT, STEPS, LaunchPlan
from .triton.box_plans import plan_boxes as plan_triton_boxes
from .triton.plans import plan_distributions as plan_triton_distributions


@functools.lru_cache(maxsize=4096)
def plan(name: str, problem: Problem, backend: str) -> LaunchPlan:
    """The launch of a step on problem.

    Args:
        name: of `launch_plan.STEPS`: an operator's, "dfl_loss_backward" for the gradient of
            dfl_loss, and "box_loss_sums", the second launch of box_loss.
        problem: with at least one distribution.
        backend: "triton" or "cuda".

    Returns:
        A pure value; the same for the same arguments.

    Raises:
        ValueError: for a backend without launch plans, or a problem without distributions.
    """
    if backend not in ("triton", "cuda"):
        raise ValueError(
            f'plan: the backend "{backend}" has no launch plans; "triton" and "cuda" have.'
        )
    if not problem.count:
        raise ValueError("plan: the problem has no distributions, so nothing is launched.")
    step = STEPS[name]
    if isinstance(problem, BoxProblem):
        return (plan_cuda_boxes if backend == "cuda" else plan_triton_boxes)(step, problem)
    if backend == "cuda":
        return plan_cuda_distributions(step, problem)
    return plan_triton_distributions(step, problem)


def beyond_grid(problem: Problem) -> list[str]:
    """Why a problem does not fit a GPU's grid; empty if it does."""
    if isinstance(problem, BoxProblem):
        if problem.batch <= GRID_LIMIT:
            return []
        return [f"there are more than {GRID_LIMIT} images, the limit of a GPU's grid"]
    _, middle, outer = grid_axes(problem)
    if max(middle.size, outer.size) <= GRID_LIMIT:
        return []
    return [f"two axes are longer than {GRID_LIMIT}, the limit of a GPU's grid"]
