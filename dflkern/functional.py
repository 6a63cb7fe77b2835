"""The public functions: checks, then one operator call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import (
    IOU_KINDS,
    Project,
    check_anchor_points,
    check_box_format,
    check_box_logits,
    check_choice,
    check_logits,
    check_project,
    check_reduction,
    check_target,
    check_weight,
)
from .detection import class_loss as class_loss
from .detection import distance_loss as distance_loss
from .detection import task_aligned_assign as task_aligned_assign
from .detection.checks import check_box_reduction, check_target_boxes
from .operators import backends
from .operators.run import bind, call
from .operators.table import (
    BOX_LOSS,
    DECODE_BOXES,
    DFL_DECODE,
    DFL_LOSS,
    DFL_LOSS_AND_DECODE,
    TABLE,
)
from .problem import per_anchor, scalar


def dfl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    project: Project = None,
    margin: float = 0.01,
    weight: Tensor | None = None,
    reduction: str = "none",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Distribution Focal Loss: cross entropy of each distribution against two neighbouring bins.

    With p the softmax of the logits along dim, t the target clamped to [W_0, W_{K−1} − margin], and
    l the bin with W_l ≤ t < W_{l+1},

        loss = −(1 − y) log p_l − y log p_{l+1},    y = (t − W_l) / (W_{l+1} − W_l)

    The loss cannot fall below the entropy of (1 − y, y): ln 2 = 0.693 for a target half-way between
    two bins.

    Args:
        logits: raw head output, fp16, bf16, fp32 or fp64, with K = 2 to 256 bins along dim, any
            strides. Read in place, never changed.
        target: the wanted position of each distribution, any float dtype, exactly the shape of
            logits without dim, in the units of project. For boxes: the distance from anchor point
            to side in cells, that is pixels / stride (`dfl_targets`). NaN gives a NaN loss for that
            distribution only, ±inf is clamped.
        dim: the axis of the bins, as in torch.softmax; 2 for a head's (B, 4, K, A).
        project: W, the position of each bin: increasing floats, or a 1-D tensor of length K on the
            logits' device whose values are not checked. None: 0, 1, …, K − 1.
        margin: how far below the last bin the clamp sits, in the units of project; at least 0, and
            below 1 without project. 0.01 as in Ultralytics, 0.1 in GFL, 0 in D-FINE.
        weight: factor of each loss; broadcasts to target's shape.
        reduction: "none" gives w·loss, "sum" Σ w·loss, "mean" Σ w·loss / target.numel(), and
            "side_mean" the mean of w·loss over the sides, the axis before the bins.
            Sums and means over nothing are exactly 0 and part of the graph.
        normalizer: divides the sum, with reduction="sum": a float or a 0-dim tensor, used as given;
            usually the sum of all weights, at least 1.

    Returns:
        The loss, in nats, fp64 for fp64 logits, else fp32, whatever autocast says: of target's
        shape for "none", without its side axis for "side_mean", else 0-dim. Its gradient flows to
        the logits only, in their dtype; it can be differentiated again.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit, a bad dim, project, margin or reduction, a
            normalizer without reduction="sum", tensors on several devices, or a tensor other than
            the logits that requires grad.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    op = "dfl_loss"
    dim = check_logits(op, logits, dim)
    check_target(op, target, logits, dim)
    project, positions = check_project(op, project, margin, logits, logits.shape[dim])
    check_reduction(op, reduction, dim - 1, logits, normalizer)
    if weight is not None:
        check_weight(op, weight, logits, target.shape)
    if normalizer is not None:
        normalizer = scalar(op, "normalizer", normalizer, logits)
    loss: Tensor = call(
        DFL_LOSS, logits=logits, target=target, weight=weight, normalizer=normalizer,
        project=project, positions=positions, dim=dim, margin=float(margin), reduction=reduction,
    )  # fmt: skip
    return loss


def dfl_decode(logits: Tensor, *, dim: int = -1, project: Project = None) -> Tensor:
    """The expected position of each distribution: E = Σ_k p_k W_k, with p the softmax along dim.

    Args:
        logits: raw head output, fp16, bf16, fp32 or fp64, with K = 2 to 256 bins along dim, any
            strides. Read in place, never changed.
        dim: the axis of the bins, as in torch.softmax; 2 for a head's (B, 4, K, A).
        project: W, the position of each bin: increasing floats, or a 1-D tensor of length K on the
            logits' device whose values are not checked. None: 0, 1, …, K − 1.

    Returns:
        E, in the units of project (cells, for boxes), of the shape of logits without dim; fp64 for
        fp64 logits, else fp32, whatever autocast says. Differentiable twice.

    Raises:
        TypeError: for logits that are not floating-point.
        ValueError: for a bad dim or project.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    dim = check_logits("dfl_decode", logits, dim)
    project, positions = check_project("dfl_decode", project, 0.0, logits, logits.shape[dim])
    position: Tensor = call(
        DFL_DECODE, logits=logits, project=project, positions=positions, dim=dim
    )
    return position


def dfl_loss_and_decode(
    logits: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    project: Project = None,
    margin: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """`dfl_loss` (unweighted, unreduced) and `dfl_decode` of the same logits in one pass.

    Args:
        logits: as in `dfl_loss`.
        target: as in `dfl_loss`. A NaN leaves the expected position finite.
        dim: as in `dfl_loss`.
        project: as in `dfl_loss`.
        margin: as in `dfl_loss`.

    Returns:
        (loss, expected position), each of the shape of logits without dim; fp64 for fp64 logits,
        else fp32. Gradients flow through both, to the logits only.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: as `dfl_loss`.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    op = "dfl_loss_and_decode"
    dim = check_logits(op, logits, dim)
    check_target(op, target, logits, dim)
    project, positions = check_project(op, project, margin, logits, logits.shape[dim])
    both: tuple[Tensor, Tensor] = call(
        DFL_LOSS_AND_DECODE, logits=logits, target=target, project=project, positions=positions,
        dim=dim, margin=float(margin),
    )  # fmt: skip
    return both


def decode_boxes(
    logits: Tensor,
    anchor_points: Tensor,
    stride: Tensor | float | None = None,
    *,
    dim: int = -1,
    project: Project = None,
    box_format: str = "xyxy",
) -> Tensor:
    """Boxes from a head's distributions: expected distances, subtracted from and added to anchors.

        x1 = x − E_l,  y1 = y − E_t,  x2 = x + E_r,  y2 = y + E_b,    all times stride if given

    Args:
        logits: (B, A, 4, K) with dim=-1, or (B, 4, K, A) with dim=2, which is a head's (B, 4K, A)
            viewed without a copy; sides in the order left, top, right, bottom.
        anchor_points: (A, 2) as (x, y) in cells, from `make_anchors`.
        stride: pixels per cell: a number, (A,) or (A, 1); None leaves the boxes in cells.
        dim: the axis of the bins, -1 or 2.
        project: W, the position of each bin in cells; see `dfl_decode`.
        box_format: "xyxy", or "cxcywh" for centre, width and height.

    Returns:
        (B, A, 4) for dim=-1, (B, 4, A) for dim=2, in pixels when given stride, else in cells; fp64
        for fp64 logits, else fp32. Differentiable twice, in the logits only.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for logits that are not 4-D, shapes that do not fit, an unknown box_format, or
            anchor points or strides that require grad.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    op = "decode_boxes"
    dim = check_box_logits(op, logits, dim)
    anchors = logits.shape[1 if dim == 3 else 3]
    check_anchor_points(op, anchor_points, logits, anchors)
    if stride is not None:
        stride = per_anchor(op, "stride", stride, anchors, logits)
    check_box_format(op, box_format)
    project, positions = check_project(op, project, 0.0, logits, logits.shape[dim])
    boxes: Tensor = call(
        DECODE_BOXES, logits=logits, anchor_points=anchor_points, stride=stride, project=project,
        positions=positions, dim=dim, box_format=box_format,
    )  # fmt: skip
    return boxes


def box_loss(
    logits: Tensor,
    anchor_points: Tensor,
    target_boxes: Tensor,
    weight: Tensor,
    normalizer: Tensor | float | None,
    *,
    dim: int = -1,
    foreground: Tensor | None = None,
    matched: Tensor | None = None,
    stride: Tensor | float | None = None,
    project: Project = None,
    margin: float = 0.01,
    iou: str = "ciou",
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """The two box losses of a detector's training step, over the foreground anchors.

        iou_loss = Σ w (1 − IoU) / normalizer
        dfl_loss = Σ w (mean over the 4 sides of DFL) / normalizer

    The IoU and the distances are taken in cells. A target box beyond the reach of the last bin
    trains DFL on the clamped distance and the IoU on the true box. Background anchors and anchors
    of weight 0 never matter, whatever stands in them: their losses and gradients are exactly 0.
    Without foreground both sums are 0, whatever the normalizer.

    Args:
        logits: (B, A, 4, K) with dim=-1, or (B, 4, K, A) with dim=2.
        anchor_points: (A, 2) as (x, y) in cells, from `make_anchors`.
        target_boxes: the box of each anchor, (B, A, 4), or with matched the box of each object,
            (N, 4); as xyxy, in pixels with stride, else in cells.
        weight: (B, A), or class scores (B, A, C) that are summed over C.
        normalizer: divides the sums: a float or a 0-dim tensor, used as given; usually the sum of
            all weights, at least 1. None with reduction="none".
        dim: the axis of the bins, -1 or 2.
        foreground: (B, A) bool; None: all anchors. Not together with matched.
        matched: (B, A) int32 or int64: the index of each anchor's box in target_boxes; background
            where it is below 0 or not below N.
        stride: pixels per cell: a number, (A,) or (A, 1); None if target_boxes are in cells.
        project: W, the position of each bin in cells; see `dfl_loss`.
        margin: see `dfl_loss`.
        iou: "iou", "giou", "diou" or "ciou"; see `paired_box_iou`. CIoU's α is a constant in
            backward.
        reduction: "sum" as above; "none" gives w (1 − IoU) and w (mean of DFL) of each anchor.

    Returns:
        (iou_loss, dfl_loss), 0-dim, or (B, A) with reduction="none"; fp64 for fp64 logits, else
        fp32. Gradients flow to the logits only.

    Raises:
        TypeError: for tensors of the wrong dtype, and without a normalizer for reduction="sum".
        ValueError: for shapes that do not fit, an unknown iou or reduction, foreground together
            with matched, a normalizer with reduction="none", or other tensors that require grad.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    op = "box_loss"
    dim = check_box_logits(op, logits, dim)
    anchors = (logits.shape[0], logits.shape[1 if dim == 3 else 3])
    check_anchor_points(op, anchor_points, logits, anchors[1])
    check_target_boxes(op, target_boxes, weight, foreground, matched, logits, anchors)
    check_box_reduction(op, reduction, normalizer)
    if reduction == "sum":
        normalizer = scalar(op, "normalizer", normalizer, logits)
    if stride is not None:
        stride = per_anchor(op, "stride", stride, anchors[1], logits)
    check_choice(op, "iou", iou, IOU_KINDS)
    project, positions = check_project(op, project, margin, logits, logits.shape[dim])
    losses: tuple[Tensor, Tensor] = call(
        BOX_LOSS, logits=logits, anchor_points=anchor_points, target_boxes=target_boxes,
        weight=weight, normalizer=normalizer, foreground=foreground, matched=matched,
        stride=stride, project=project, positions=positions, dim=dim, margin=float(margin),
        iou=iou, reduction=reduction,
    )  # fmt: skip
    return losses


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would serve a call, with which launch, and why the others would not.

    Args:
        op: "dfl_loss", "dfl_decode", "dfl_loss_and_decode", "decode_boxes", "box_loss",
            "class_loss", "distance_loss" or "task_aligned_assign".
        *args: the arguments of that function.
        **kwargs: its keyword arguments.

    Returns:
        A few lines of text. Nothing is computed.

    Raises:
        TypeError: as the function itself.
        ValueError: as the function itself, and for an unknown op.
    """
    check_choice("explain", "op", op, tuple(TABLE))
    arguments = bind(globals()[op], *args, **kwargs)
    return backends.report(TABLE[op], arguments, backends.requested())
