"""`examine`: everything that can be said about what was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..checks import Project
from . import distributions, precision, ranges, training
from .evidence import Evidence
from .findings import Finding, arrange
from .intake import gather
from .report import Report
from .units import units
from .values import Numbers

CHECKS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    units,
    ranges.ranges,
    ranges.integers,
    ranges.floor,
    distributions.bins,
    distributions.order,
    distributions.sharpness,
    precision.clamp,
    precision.decode,
    precision.anchors,
    training.clamped_loss,
    training.loss_size,
    training.weights,
    training.gradients,
    training.non_finite,
)


def examine(
    *,
    targets: Tensor | None = None,
    num_bins: int | None = None,
    logits: Tensor | None = None,
    boxes: Tensor | None = None,
    anchor_points: Tensor | None = None,
    stride: Tensor | float | None = None,
    losses: Numbers | None = None,
    gradients: Mapping[str, Any] | Numbers | None = None,
    project: Project = None,
    margin: float = 0.01,
    weight: Tensor | None = None,
    normalizer: Numbers | float | None = None,
    foreground: Tensor | None = None,
    dim: int = -1,
) -> Report:
    """Say what is wrong with a DFL training, and why, from whatever is at hand.

    Everything is optional, but one thing must be given; the more there is, the surer the diagnosis.
    With boxes, anchor points and stride beside the targets it is exact: the doctor computes what
    the targets should be. It reads values, so it waits for the device; it changes nothing.

    Args:
        targets: the DFL targets of the foreground, as they go into the loss or before a clamp:
            (N, 4), (B, A, 4), or (N,) for a value per distribution.
        num_bins: K, the number of channels a side has in the head. Taken from project or logits if
            left out.
        logits: raw head output with the bins along dim; 4·K channels along dim are fine, too.
        boxes: (…, 4) as xyxy in pixels, the box assigned to each anchor of the targets.
        anchor_points: (…, 2) as (x, y) in cells, as `make_anchors` gives them; broadcast against
            targets or boxes.
        stride: pixels per cell: a number, or a tensor (A,) or (A, 1) that broadcasts alike.
        losses: the DFL loss over the steps, oldest first; or the losses of many anchors.
        gradients: {layer: its gradient, its norm, or its norms over the steps}, from the head down
            to the backbone; or the norm of all parameters over the steps.
        project: W, the position of each bin; None: 0, 1, …, K − 1.
        margin: how far below the last bin targets are clamped.
        weight: of each foreground anchor.
        normalizer: what the loss is divided by: a number, or one for each step.
        foreground: (…) bool, which anchors of targets, boxes, logits and weight count; None: all.
        dim: the axis of the bins in the logits; 2 for a head's (B, 4, K, A).

    Returns:
        A `Report`: findings, gravest first and causes before their consequences.

    Raises:
        TypeError: for something that is no tensor or number where one is needed.
        ValueError: for nothing at all, shapes that do not fit, or targets without num_bins.

    Generalized Focal Loss, Li et al. 2020, https://arxiv.org/abs/2006.04388.
    """
    given: dict[str, Any] = {
        "targets": targets, "logits": logits, "boxes": boxes, "anchor_points": anchor_points,
        "stride": stride, "losses": losses, "gradients": gradients, "weight": weight,
        "normalizer": normalizer,
    }  # fmt: skip
    evidence = gather(
        num_bins=num_bins, project=project, margin=margin, foreground=foreground, dim=dim, **given
    )
    return Report(
        arrange([finding for check in CHECKS for finding in check(evidence)]),
        ranges.levels(evidence),
        evidence.num_bins,
        tuple(name for name, value in given.items() if value is not None),
    )
