"""A small anchor-free detector: a backbone, a feature pyramid P2 to P5, two heads per level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import make_anchors
from .config import NUM_CLASSES, STRIDES

PRIOR = 0.002  # the score of every class at the start: nearly all anchors are background


class Detector(nn.Module):
    """Raw predictions for grey images whose sides are multiples of 32.

    Every level ends in one 1×1 convolution to 4·K box channels and one to the classes.

    Args:
        num_bins: K, the length of one side's distribution.
        width: channels of the pyramid and the heads.
    """

    def __init__(self, num_bins: int, width: int) -> None:
        super().__init__()
        self.num_bins = num_bins
        stem, *channels = width // 3, width * 2 // 3, width, width * 4 // 3, width * 2
        self.stem = _conv(1, stem, step=2)
        inputs = [stem, *channels[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(i, o, step=2), Residual(o))
            for i, o in zip(inputs, channels, strict=True)
        )
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.box_towers = nn.ModuleList(_conv(width, width) for _ in STRIDES)
        self.class_towers = nn.ModuleList(_conv(width, width) for _ in STRIDES)
        self.box_heads = nn.ModuleList(nn.Conv2d(width, 4 * num_bins, 1) for _ in STRIDES)
        self.class_heads = nn.ModuleList(nn.Conv2d(width, NUM_CLASSES, 1) for _ in STRIDES)
        for head in self.box_heads:
            _start(head, 0.0)  # uniform distributions, whose DFL is ln K
        for head in self.class_heads:
            _start(head, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Box logits (B, 4, K, A) and class logits (B, A, C) for images (B, 1, H, W).

        The box logits are a view of (B, 4·K, A): channel s·K + k is bin k of side s.
        """
        features = []
        x = self.stem(images)
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x)
            features.append(lateral(x))
        for i in reversed(range(len(features) - 1)):
            features[i] = features[i] + F.interpolate(features[i + 1], scale_factor=2.0)
        boxes, classes = [], []
        for i, feature in enumerate(features):
            boxes.append(self.box_heads[i](self.box_towers[i](feature)).flatten(2))
            classes.append(self.class_heads[i](self.class_towers[i](feature)).flatten(2))
        return torch.cat(boxes, 2).unflatten(1, (4, self.num_bins)), torch.cat(
            classes, 2
        ).transpose(1, 2)


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The input plus what the convolutions make of it."""
        result: Tensor = x + self.second(self.first(x))
        return result


def anchors(image_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Anchor points (A, 2) in cells and strides (A, 1) of all levels, in the detector's order."""
    sizes = [(image_size // stride, image_size // stride) for stride in STRIDES]
    return make_anchors(sizes, STRIDES, device=device)


def _start(head: nn.Module, bias: float) -> None:
    """Let a head say nearly the same everywhere at first."""
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, bias)


def _conv(inputs: int, outputs: int, step: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, step, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(inplace=True),
    )
