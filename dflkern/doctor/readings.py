"""What boxes and anchor points may be, where they are not what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import bbox2dist
from .evidence import Evidence, Geometry

BEYOND = 1.25  # the largest number that a box leaving its image has as a fraction of it
INVERTED = (3, 0.05)  # boxes with x2 < x1 or y2 < y1, as number and share, that no slip explains
OUT, FITS = 0.6, 0.9  # shares of sides on the bins: below OUT is wrong, above FITS is right


class Guess(NamedTuple):
    """What may be wrong, and the targets that it leads to."""

    codes: tuple[str, ...]
    values: Tensor
    form: str = "xyxy"


def readings(geometry: Geometry) -> Iterator[Guess]:
    """What boxes and anchor points may be instead of xyxy in pixels and points in cells."""
    boxes, points, stride, _ = geometry
    # Centres or corners of cells, in cells, are multiples of one half.
    may_be_pixels = _on_grid(points / stride) or not _on_grid(points)
    yield Guess(("pixels",), bbox2dist(points, boxes / stride**2))
    for form, xyxy in _forms(boxes).items():
        codes = () if form == "xyxy" else ("box-format",)
        yield Guess(codes, bbox2dist(points, xyxy / stride), form)
        if may_be_pixels:
            yield Guess((*codes, "anchor-units"), bbox2dist(points / stride, xyxy / stride), form)
        yield Guess((*codes, "box-units"), bbox2dist(points, xyxy), form)


def _forms(boxes: Tensor) -> dict[str, Tensor]:
    """The boxes as xyxy, by what they were; the names are those of torchvision's box_convert."""
    first, size = boxes.chunk(2, -1)
    return {
        "xyxy": boxes,
        "xywh": torch.cat((first, first + size), -1),
        "cxcywh": torch.cat((first - size / 2, first + size / 2), -1),
    }


def _on_grid(points: Tensor) -> bool:
    return bool(((2 * points - (2 * points).round()).abs() < 1e-3).double().mean() > 0.99)


def best_reading(evidence: Evidence, geometry: Geometry) -> Guess | None:
    """The reading that puts most anchor points into their boxes; None if none does.

    What is small fits in pixels and in cells: of readings that are as good, the first counts.
    """
    fitting = [guess for guess in readings(geometry) if on_bins(evidence, guess.values) > FITS]
    return max(fitting, key=lambda guess: on_bins(evidence, guess.values, spare=0), default=None)


def inverted(boxes: Tensor) -> float:
    """The share of boxes with x2 < x1 or y2 < y1; 0 where it is no more than a slip."""
    count, (least, share) = int((boxes[:, 2:] < boxes[:, :2]).any(-1).sum()), INVERTED
    return count / len(boxes) if count >= max(least, share * len(boxes)) else 0.0


def fractions(values: Tensor) -> bool:
    """All within 0 to 1, but for a few of boxes that leave the image."""
    sizes = values[values.isfinite()].abs()
    few = max(2.0, 0.02 * sizes.numel())
    return bool(sizes.numel() and 0 < sizes.max() <= BEYOND and (sizes > 1).sum() <= few)


def on_bins(evidence: Evidence, values: Tensor, spare: float = 1.0) -> float:
    """The share of sides that the bins reach, with some cells to spare below."""
    on = (values > evidence.low - spare) & (values <= evidence.last)
    return float(on.double().mean())
