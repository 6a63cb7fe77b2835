"""Launch plans of the operators on boxes."""

from __future__ import annotations

from typing import Any

from ..box_problem import BoxProblem
from .plans import ELEMENT, UNROLLED_BINS, Argument, LaunchPlan, blocks

BLOCK = 128  # anchors of a program
SUMS_BLOCK = 1024
KERNELS = {
    "decode_boxes": "boxes_decode_forward_kernel",
    "decode_boxes_backward": "boxes_decode_backward_kernel",
    "box_loss": "boxes_loss_forward_kernel",
    "box_loss_sums": "boxes_loss_sums_kernel",
    "box_loss_backward": "boxes_loss_backward_kernel",
}


def steps(op: str) -> tuple[str, ...]:
    """The launches of an operator, by the names that `plan` knows them by."""
    return ("box_loss", "box_loss_sums") if op == "box_loss" else (op,)


def plan_triton_boxes(op: str, problem: BoxProblem) -> LaunchPlan:
    """The launch of one step of an operator: box_loss has two, the second "box_loss_sums"."""
    if op == "box_loss_sums":
        grid, warps = (1, 1, 1), 4
        constants: dict[str, Any] = {"BLOCK": SUMS_BLOCK}
    else:
        grid, warps = box_grid(problem, BLOCK), BLOCK // 32
        constants = _constants(op, problem)
    arguments = []
    for role, element in pointers_of(op, problem).items():
        if element is None:
            constants[f"{role}_ptr"] = None
        else:
            aligned = problem.aligned if role == "logits" else role not in UNALIGNED
            arguments.append(Argument(f"{role}_ptr", f"*{element}", role, aligned))
    for name, value in numbers_of(op, problem, grid).items():
        if value == 1:  # as Triton specialises it
            constants[name] = 1
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            arguments.append(Argument(name, kind, value, value % 16 == 0))
    return LaunchPlan(
        op, "triton", KERNELS[op], grid, (32 * warps, 1, 1), tuple(arguments),
        tuple(constants.items()),
    )  # fmt: skip


# Read where they are, while everything else is allocated or made aligned for the launch
UNALIGNED = ("weight", "foreground", "normalizer", "grad_iou", "grad_dfl")


def box_grid(problem: BoxProblem, block: int) -> tuple[int, int, int]:
    """Blocks of anchors, and images."""
    return blocks(problem.anchors, block), problem.batch, 1


def _constants(op: str, problem: BoxProblem) -> dict[str, Any]:
    bins, granule = problem.num_bins, 16 // problem.dtype.itemsize
    unroll = bins <= UNROLLED_BINS
    chunk = granule if unroll and whole_granules(op, problem) else 1
    if op.endswith("_backward") and bins < 16:
        chunk = 1  # Triton would take these tiles through shared memory
    constants: dict[str, Any] = {"K": bins, "PROJECT": problem.project}
    if op.startswith("decode_boxes"):
        constants |= {"STRIDE": problem.stride, "XYWH": problem.box_format == "xywh"}
    else:
        assert problem.weight is not None
        constants |= {
            "MARGIN": problem.margin,
            "KIND": problem.iou,
            "FOREGROUND": problem.foreground,
            "SCORES": problem.weight.classes is not None,
        }
    return {**constants, "UNROLL": unroll, "CHUNK": chunk, "BLOCK": BLOCK}


def whole_granules(op: str, problem: BoxProblem) -> bool:
    """Whether every distribution, and its gradient in backward, is whole 16-byte granules."""
    granule = 16 // problem.dtype.itemsize
    places = [problem.logits]
    if op.endswith("_backward"):
        places.append(problem.gradient)
    return (
        problem.aligned
        and problem.num_bins % granule == 0
        and all(place.bin == 1 for place in places)
        and all(stride % granule == 0 for place in places for stride in place[:3])
    )


def pointers_of(op: str, problem: BoxProblem) -> dict[str, str | None]:
    """Element type of each tensor by role, None for those the call does not have."""
    logits, wide = ELEMENT[problem.dtype], ELEMENT[problem.compute_dtype]
    stride = wide if problem.stride else None
    project = wide if problem.project else None
    if op == "decode_boxes":
        return {"logits": logits, "anchor_points": wide, "stride": stride, "project": project,
                "boxes": wide}  # fmt: skip
    if op == "decode_boxes_backward":
        return {"logits": logits, "stride": stride, "project": project, "grad_boxes": wide,
                "grad_logits": logits}  # fmt: skip
    if op == "box_loss_sums":
        return dict.fromkeys(("partials", "normalizer", "iou_loss", "dfl_loss"), wide)
    assert problem.weight is not None
    pointers: dict[str, str | None] = {
        "logits": logits,
        "anchor_points": wide,
        "target_boxes": wide,
        "weight": ELEMENT[problem.weight.dtype],
        "foreground": "u8" if problem.foreground else None,
        "project": project,
    }
    if op == "box_loss":
        return {**pointers, "partials": wide}
    return {**pointers, "normalizer": wide, "grad_iou": wide, "grad_dfl": wide,
            "grad_logits": logits}  # fmt: skip


def numbers_of(op: str, problem: BoxProblem, grid: tuple[int, int, int]) -> dict[str, int]:
    """Lengths and strides, as the kernels take them."""
    if op == "box_loss_sums":
        return {"programs": programs_of(problem, BLOCK)}
    numbers = {
        "n": problem.anchors,
        "batch_stride": problem.logits.batch,
        "anchor_stride": problem.logits.anchor,
        "side_stride": problem.logits.side,
        "bin_stride": problem.logits.bin,
    }
    if op.startswith("decode_boxes"):
        numbers |= {
            "box_batch_stride": 4 * problem.anchors,
            "box_anchor_stride": 4 if problem.sides_last else 1,
            "box_side_stride": 1 if problem.sides_last else problem.anchors,
        }
    if op.endswith("_backward"):
        numbers |= {
            "batch_grad_stride": problem.gradient.batch,
            "anchor_grad_stride": problem.gradient.anchor,
            "side_grad_stride": problem.gradient.side,
            "grad_bin_stride": problem.gradient.bin,
        }
    if op.startswith("box_loss"):
        assert problem.weight is not None
        numbers |= {
            "weight_batch_stride": problem.weight.batch,
            "weight_anchor_stride": problem.weight.anchor,
            "weight_class_stride": problem.weight.score,
            "classes": problem.weight.classes or 0,
        }
    if op == "box_loss":
        numbers["programs"] = grid[0] * grid[1]
    return numbers


def programs_of(problem: BoxProblem, block: int) -> int:
    """How many sums the first launch of box_loss writes of each kind."""
    across, images, _ = box_grid(problem, block)
    return across * images
