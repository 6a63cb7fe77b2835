"""The loss of a real Ultralytics training step, from a model built from its YAML file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GAINS = (7.5, 1.5)  # of the IoU loss and of DFL, Ultralytics' own
OBJECTS = 7  # an image
Step = tuple[Callable[[Tensor], Tensor], Tensor]


def criterion_step(model: str, images: int, size: int, device: str = "cpu") -> tuple[Step, Step]:
    """The whole loss, and the part of it that DFL is: decode, IoU and DFL.

    Args:
        model: such as "yolov8n".
        images: in the batch.
        size: their height and width in pixels.
        device: a torch device.

    Returns:
        Two pairs of a function from the head's output of boxes to a loss, and that output.
    """
    criterion, predictions, batch = real_batch(model, images, size, device)
    captured: list[tuple[Any, ...]] = []
    hook = criterion.bbox_loss.register_forward_pre_hook(lambda _, args: captured.append(args))
    criterion(predictions, batch)
    hook.remove()
    pred_dist, _, anchor_points, *targets = captured[0]

    def whole(boxes: Tensor) -> Tensor:
        total: Tensor = criterion({**predictions, "boxes": boxes}, batch)[0].sum()
        return total

    def part(distances: Tensor) -> Tensor:
        boxes = criterion.bbox_decode(anchor_points, distances)
        iou_loss, dfl_loss = criterion.bbox_loss(distances, boxes, anchor_points, *targets)
        total: Tensor = GAINS[0] * iou_loss + GAINS[1] * dfl_loss
        return total

    return (whole, predictions["boxes"]), (part, pred_dist.detach().requires_grad_())


def real_batch(
    model: str, images: int, size: int, device: str = "cpu"
) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A criterion, the head's output for random images as leaves, and objects for each image."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    network: Any = DetectionModel(f"{model}.yaml", verbose=False)
    network.args = get_cfg()
    with torch.no_grad():
        predictions = network.to(device).train()(torch.rand(images, 3, size, size, device=device))
    predictions = {
        name: value.requires_grad_() if name != "feats" else value
        for name, value in predictions.items()
    }
    objects = OBJECTS * images
    centre, extent = torch.rand(objects, 2) * 0.6 + 0.2, torch.rand(objects, 2) * 0.35 + 0.05
    batch = {
        "batch_idx": torch.arange(images).repeat_interleave(OBJECTS).float(),
        "cls": torch.randint(80, (objects, 1)).float(),
        "bboxes": torch.cat((centre, extent), -1),
    }
    return network.init_criterion(), predictions, batch
