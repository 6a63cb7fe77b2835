"""The three losses of a training step, and the floor of the third."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import decode_boxes, dfl_loss, paired_box_iou, use_backend
from ..doctor import Watch
from .assign import assign
from .config import STRIDES, Config
from .mistakes import box_targets, over_sides
from .scenes import Scenes


class Losses(NamedTuple):
    """Scalars of one step: what is minimised, its parts before their gains, and what they say."""

    total: Tensor
    box: Tensor  # CIoU loss, Σ w (1 − CIoU) / Σ w
    classes: Tensor  # BCE, Σ / Σ w
    dfl: Tensor  # in nats, Σ w (mean over the four sides) / Σ w
    floor: Tensor  # the entropy of the DFL targets, averaged in the same way
    levels: Tensor  # (4,): the share of Σ w that each of P2 to P5 holds


def losses(
    box_logits: Tensor,
    class_logits: Tensor,
    points: Tensor,
    strides: Tensor,
    scenes: Scenes,
    config: Config,
    *,
    static: bool = False,
    watcher: Watch | None = None,
) -> Losses:
    """Assign, then BCE on all anchors, CIoU and DFL on the foreground.

    The weight w of a foreground anchor is its soft class target. Assigned by predictions from the
    first step on, P2, which learns first, would take all objects for good. So training begins, as
    in the code of the method's authors, with an assigner that does not look at predictions: here
    the same one, on squares in the place of predicted boxes.

    Args:
        box_logits: (B, 4, K, A), raw.
        class_logits: (B, A, C), raw.
        points: (A, 2) anchor points in cells.
        strides: (A, 1) pixels per cell.
        scenes: the true boxes and labels.
        config: backend, gains and the assigner's parameters.
        static: assign by squares of `prior_cells` cells instead of by predictions.
        watcher: the doctor's, which is shown what the DFL is computed from.
    """
    with use_backend(config.decode_backend):
        boxes = decode_boxes(box_logits, points, strides, dim=2).transpose(1, 2)  # in pixels
    points_in_pixels = points * strides
    if static:
        half = 0.5 * config.prior_cells * strides
        squares = torch.cat((points_in_pixels - half, points_in_pixels + half), -1)
        seen_scores, seen_boxes = torch.ones_like(class_logits), squares.expand_as(boxes)
    else:
        seen_scores, seen_boxes = class_logits.detach().sigmoid(), boxes.detach()
    foreground, true_boxes, scores = assign(
        seen_scores, seen_boxes, points_in_pixels,
        scenes.boxes, scenes.labels, scenes.valid,
        top_k=config.top_k, alpha=config.alpha, beta=config.beta,
    )  # fmt: skip
    weight = scores.sum(-1)
    image, anchor = foreground.nonzero(as_tuple=True)
    w = weight[image, anchor]
    # A batch without any foreground divides 0 by this, and still gives 0.
    total_weight = weight.sum().clamp(min=1e-6)

    bce = F.binary_cross_entropy_with_logits(class_logits, scores, reduction="sum")
    classes = bce / weight.sum().clamp(min=1)

    wanted = true_boxes[image, anchor]
    ciou = paired_box_iou(boxes[image, anchor], wanted, "ciou")
    box = (w * (1 - ciou)).sum() / total_weight

    targets = box_targets(wanted, points_in_pixels[anchor], strides[anchor], config)  # (N, 4)
    distributions = box_logits.permute(0, 3, 1, 2)[image, anchor]
    with use_backend(config.backend):
        per_anchor = over_sides(dfl_loss(distributions, targets), config)
    dfl = (w * per_anchor).sum() / total_weight
    floor = (w * two_bin_entropy(targets).mean(-1)).sum() / total_weight

    if watcher is not None:
        watcher.record(
            logits=distributions, targets=targets, boxes=wanted, anchor_points=points[anchor],
            stride=strides[anchor], weight=w, normalizer=total_weight, loss=per_anchor,
        )  # fmt: skip

    total = config.box_gain * box + config.class_gain * classes + config.dfl_gain * dfl
    by_level = [weight[:, strides[:, 0] == stride].sum() for stride in STRIDES]
    return Losses(total, box, classes, dfl, floor, torch.stack(by_level) / total_weight)


def two_bin_entropy(targets: Tensor) -> Tensor:
    """The entropy in nats of the two bins around each target: the least that its DFL can be.

    With f the fraction of the target above the bin to its left, −f ln f − (1 − f) ln(1 − f).
    """
    fraction = targets - targets.floor()
    return -(torch.xlogy(fraction, fraction) + torch.xlogy(1 - fraction, 1 - fraction))
