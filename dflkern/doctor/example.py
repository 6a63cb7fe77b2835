"""The mistakes that dflkern grew out of, as data: what `python -m dflkern doctor --demo` shows.

Images of 640 × 640, 16 bins. The targets are box coordinates scaled to the bins instead of
distances, the head has 17 bins, and the loss is clamped at 10.
"""

from __future__ import annotations

from typing import Any

import torch

from ..geometry import make_anchors

IMAGE, NUM_BINS, STRIDES = 640, 16, (8, 16, 32)


def seed() -> dict[str, Any]:
    """The arguments of `examine` for it."""
    generator = torch.Generator().manual_seed(0)
    points, strides = make_anchors([(IMAGE // s, IMAGE // s) for s in STRIDES], STRIDES)
    anchor = torch.randint(len(points), (1000,), generator=generator)
    points, strides = points[anchor], strides[anchor]
    sides = (0.2 + 8 * torch.rand(1000, 4, generator=generator)) * strides
    centres = points * strides
    boxes = torch.cat((centres - sides[:, :2], centres + sides[:, 2:]), -1).clamp(0, IMAGE)
    return {
        "targets": (boxes / IMAGE * NUM_BINS).clamp(0, NUM_BINS - 1e-6),
        "num_bins": NUM_BINS,
        "logits": torch.randn(1000, 4, NUM_BINS + 1, generator=generator),
        "boxes": boxes,
        "anchor_points": points,
        "stride": strides,
        "losses": [10.0] * 50,
    }
