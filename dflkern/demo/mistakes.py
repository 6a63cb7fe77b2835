"""The mistakes of the training that dflkern grew out of, made on purpose.

Its post-mortem names four. Its code is known for three of them: targets that are the coordinates of
the box, scaled to the bins; nothing divided by a stride; a head of K + 1 bins. For the fourth, a
loss clamped at 10, it does not say over what. Here it is the sum over a box's four sides, which is
4 ln 16 = 11.1 for the uniform distributions a head begins with.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .. import dfl_targets
from .config import Config

MISTAKES = ("coordinates", "pixels", "extra-bin", "loss-clamp")
ALL = "all"
LOSS_CLAMP = 10.0


def broken(config: Config, name: str) -> Config:
    """The same training with one of the mistakes, or with all of them."""
    mistakes = MISTAKES if name == ALL else (name,)
    # A sum over four sides in the place of their mean shall not train DFL four times as hard.
    gain = config.dfl_gain / 4 if "loss-clamp" in mistakes else config.dfl_gain
    return dataclasses.replace(config, mistakes=mistakes, dfl_gain=gain)


def box_targets(boxes: Tensor, points: Tensor, strides: Tensor, config: Config) -> Tensor:
    """DFL targets (N, 4) of boxes and anchor points in pixels: right, or as the config has them.

    With coordinates box / image size · K, with pixels distances that no stride divides, with both
    coordinates in pixels.
    """
    if "coordinates" in config.mistakes:
        scale = 1 if "pixels" in config.mistakes else config.num_bins / config.image_size
        return (boxes * scale).clamp(0, config.num_bins - 1e-6)
    unit = 1.0 if "pixels" in config.mistakes else strides
    return dfl_targets(boxes, points / unit, unit, config.num_bins)


def over_sides(losses: Tensor, config: Config) -> Tensor:
    """(N, 4) losses of the sides as (N,) of the anchors: their mean, or their sum in a clamp."""
    if "loss-clamp" in config.mistakes:
        return losses.sum(-1).clamp(max=LOSS_CLAMP)
    return losses.mean(-1)
