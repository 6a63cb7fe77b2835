"""Launch plans of the CUDA C++ kernels on boxes, in csrc/cuda/boxes.cu."""

from __future__ import annotations

from ...checks import IOU_KINDS
from ..box_arguments import BLOCK, SUMS, box_grid, pointers_of, programs_of, whole_granules
from ..box_problem import BoxProblem
from ..launch_plan import ELEMENT, Argument, LaunchPlan, Step
from .plans import FIXED_BINS

ELEMENTS = ("fp16", "bf16", "fp32", "fp64")  # as the kernels number the types of weights


def plan_boxes(step: Step, problem: BoxProblem) -> LaunchPlan:
    """The launch of one step of an operator."""
    element = ELEMENT[problem.dtype]
    fixed = problem.num_bins in FIXED_BINS and element != "fp64" and step is not SUMS
    kernel = f"{NAMES[step.name]}<{element}, {problem.num_bins if fixed else 0}>"
    if step is SUMS:
        kernel = f"boxes_loss_sums<{ELEMENT[problem.compute_dtype]}>"
    arguments = [
        Argument(role, f"*{kind}", role) if kind else Argument(role, "null", 0)
        for role, kind in pointers_of(step, problem).items()
    ]
    bound = problem.margin if problem.project else problem.num_bins - 1 - problem.margin
    arguments.append(Argument("bound", ELEMENT[problem.compute_dtype], float(bound)))
    arguments += [Argument(name, "i64", number) for name, number in _numbers(step, problem).items()]
    return LaunchPlan(
        step.name,
        "cuda",
        kernel,
        grid=(1, 1, 1) if step is SUMS else box_grid(problem),
        block=(BLOCK, 1, 1),
        arguments=tuple(arguments),
        constants=(),
        shared=0,
        scratch=("partials", 3) if step.name == "box_loss" else None,
    )


NAMES = {
    "decode_boxes": "boxes_decode_forward",
    "decode_boxes_backward": "boxes_decode_backward",
    "box_loss": "boxes_loss_forward",
    "box_loss_sums": "boxes_loss_sums",
    "box_loss_backward": "boxes_loss_backward",
}


def _numbers(step: Step, problem: BoxProblem) -> dict[str, int]:
    if step is SUMS:
        return {"programs": programs_of(box_grid(problem))}
    at, to, weight = problem.logits, problem.gradient, problem.weight
    numbers = {
        "n": problem.anchors,
        "bins": problem.num_bins,
        "granules": int(whole_granules(step, problem)),
        "batch_stride": at.batch,
        "anchor_stride": at.anchor,
        "side_stride": at.side,
        "bin_stride": at.bin,
    }
    if step.decode:
        numbers |= {
            "cxcywh": int(problem.box_format == "cxcywh"),
            "box_batch_stride": 4 * problem.anchors,
            "box_anchor_stride": 4 if problem.sides_last else 1,
            "box_side_stride": 1 if problem.sides_last else problem.anchors,
        }
    else:
        assert weight is not None
        numbers |= {
            "iou": IOU_KINDS.index(problem.iou),
            "weight_type": ELEMENTS.index(ELEMENT[weight.dtype]),
            "classes": 1 if weight.classes is None else weight.classes,
            "weight_batch_stride": weight.batch,
            "weight_anchor_stride": weight.anchor,
            "weight_class_stride": weight.score,
        }
    if step.backward:
        numbers |= {
            "grad_batch_stride": to.batch,
            "grad_anchor_stride": to.anchor,
            "grad_side_stride": to.side,
            "grad_bin_stride": to.bin,
        }
    if step.loss and not step.backward:
        numbers["programs"] = programs_of(box_grid(problem))
    return numbers
