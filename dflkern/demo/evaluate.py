"""Detections on the validation scenes, and their mean average precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import decode_boxes, use_backend
from .config import Config
from .model import Detector
from .scenes import Scenes

MIN_SCORE = 0.01
NMS_IOU = 0.6
MAX_DETECTIONS = 50  # of an image


class Detections(NamedTuple):
    """What was found: image (N,), ascending; box (N, 4) as xyxy in pixels; score and label (N,)."""

    image: Tensor
    box: Tensor
    score: Tensor
    label: Tensor


@torch.no_grad()
def detect(
    model: Detector, points: Tensor, strides: Tensor, images: Tensor, config: Config
) -> Detections:
    """Decode, keep what scores, and suppress what overlaps a better one of its class."""
    from torchvision.ops import batched_nms  # type: ignore[import-untyped]

    model.eval()
    found = []
    for start in range(0, len(images), config.batch_size):
        box_logits, class_logits = model(images[start : start + config.batch_size])
        with use_backend(config.decode_backend):
            boxes = decode_boxes(box_logits, points, strides, dim=2).transpose(1, 2)
        scores, labels = class_logits.sigmoid().max(-1)
        image, anchor = (scores > MIN_SCORE).nonzero(as_tuple=True)
        box, score = boxes[image, anchor].clamp(0, config.image_size), scores[image, anchor]
        label = labels[image, anchor]
        kept = batched_nms(box, score, image * class_logits.shape[-1] + label, NMS_IOU)
        kept = kept[_rank_within(image[kept]) < MAX_DETECTIONS]  # best first, within its image
        found.append((start + image[kept], box[kept], score[kept], label[kept]))
    model.train()
    detections = Detections(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
    order = detections.image.argsort(stable=True)
    return Detections(*(part[order] for part in detections))


def _rank_within(groups: Tensor) -> Tensor:
    """How many earlier elements belong to the same group."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    first = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(groups), device=groups.device) - first
    return rank


def mean_average_precision(detections: Detections, scenes: Scenes) -> dict[str, float]:
    """COCO's mAP over all classes, by torchmetrics: at IoU 0.5, at 0.75, and from 0.5 to 0.95."""
    from torchmetrics.detection import MeanAveragePrecision

    predicted, true = [], []
    for i in range(len(scenes.images)):
        mine, valid = detections.image == i, scenes.valid[i]
        predicted.append(
            {
                "boxes": detections.box[mine],
                "scores": detections.score[mine],
                "labels": detections.label[mine],
            }
        )
        true.append(
            {"boxes": scenes.boxes[i][valid].cpu(), "labels": scenes.labels[i][valid].cpu()}
        )
    metric = MeanAveragePrecision(backend="pycocotools")
    metric.update(predicted, true)
    result = metric.compute()
    return {name: float(result[name]) for name in ("map", "map_50", "map_75")}
