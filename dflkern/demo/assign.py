"""Task-aligned assignment: which anchors answer for which object, and how strongly.

The alignment of anchor a with object g of class c is t = s^α · u^β, with s the score of c at a and
u the IoU of the predicted box with the true one. The k best aligned anchors inside g's box answer
for g; one that would answer for several takes the object with the largest IoU. Its class target is
t scaled so that the best of each object gets that object's largest IoU.

TOOD, Feng et al. 2021, https://arxiv.org/abs/2108.07755.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import paired_box_iou


class Assignment(NamedTuple):
    """The targets of every anchor.

    foreground (B, A) bool; boxes (B, A, 4), the true box of each foreground anchor, in the unit of
    the given ones; scores (B, A, C), one soft score per foreground anchor, else 0.
    """

    foreground: Tensor
    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    valid: Tensor,
    *,
    top_k: int = 10,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Assignment:
    """Assign objects to anchors.

    Args:
        scores: (B, A, C) predicted class scores from 0 to 1.
        boxes: (B, A, 4) predicted boxes as xyxy.
        points: (A, 2) anchor points as (x, y), in the unit of the boxes.
        true_boxes: (B, M, 4) as xyxy.
        true_labels: (B, M) classes as integers.
        valid: (B, M) bool, which of the M places hold an object.
        top_k: how many anchors answer for an object at most.
        alpha: the exponent of the score.
        beta: the exponent of the IoU.

    Returns:
        The assignment; nothing in it requires grad.
    """
    low, high = true_boxes[:, :, None, :2], true_boxes[:, :, None, 2:]
    inside = ((points > low) & (points < high)).all(-1) & valid[..., None]  # (B, M, A)
    iou = paired_box_iou(boxes[:, None], true_boxes[:, :, None]).clamp(min=0) * inside
    classes = true_labels[..., None].expand(-1, -1, scores.shape[1])
    own_score = scores.transpose(1, 2).gather(1, classes)  # (B, M, A): the score of g's class
    alignment = own_score**alpha * iou**beta

    best = alignment.topk(min(top_k, alignment.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(inside).scatter(-1, best, True) & inside
    # An anchor in several boxes goes to the one it overlaps most.
    contested = torch.where(chosen, iou, -1)
    owner = contested.argmax(1)  # (B, A)
    chosen &= torch.zeros_like(chosen).scatter(1, owner[:, None], True)
    foreground = chosen.any(1)

    alignment, iou = alignment * chosen, iou * chosen
    scale = iou.amax(-1, keepdim=True) / alignment.amax(-1, keepdim=True).clamp(min=1e-30)
    strength = (alignment * scale).amax(1)  # (B, A)
    label = true_labels.gather(1, owner)
    target_scores = torch.zeros_like(scores).scatter(2, label[..., None], strength[..., None])
    assigned = true_boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    return Assignment(foreground, assigned, target_scores)
