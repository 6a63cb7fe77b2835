"""Whether the targets are what DFL wants: distances from the anchor point, in cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import bbox2dist
from .evidence import Evidence, Geometry
from .findings import Finding, Severity
from .words import number, percent, row

AGREE = 0.8  # the share of targets that a formula must give, before it counts as theirs
TOLERANCE = 0.05  # cells
ENOUGH = 20  # rows, below which nothing is concluded from how targets are distributed
RIGHT = "targets = dflkern.dfl_targets(boxes, anchor_points * stride, stride, {num_bins})"


class Guess(NamedTuple):
    """A formula that the targets may have been made by."""

    codes: tuple[str, ...]
    values: Tensor


def units(evidence: Evidence) -> Iterator[Finding]:
    """`coordinates`, `pixels`, `normalized`: by formula with boxes, by their looks without."""
    targets, geometry = evidence.targets, evidence.geometry
    if targets is None or not len(targets):
        return
    if geometry is None:
        yield from _by_looks(evidence, targets[targets.isfinite().all(-1)])
    elif evidence.given is None or targets.shape[-1] != 4:
        yield from _boxes_in_pixels(evidence, geometry)
    else:
        yield from _by_formula(evidence, targets, geometry)


def _by_formula(evidence: Evidence, targets: Tensor, geometry: Geometry) -> Iterator[Finding]:
    """Compare the targets with what known mistakes would have made of these boxes."""
    if _agreement(evidence, targets, geometry.distances) >= AGREE:
        return
    guesses = list(_guesses(evidence, targets, geometry))
    shares = [_agreement(evidence, targets, guess.values) for guess in guesses]
    best = max(range(len(guesses)), key=lambda i: shares[i])
    if shares[best] < AGREE:
        return
    middle = _middle(geometry)
    should_be = geometry.distances[middle].clamp(evidence.low, evidence.bound)
    example = (
        f"{_described(geometry, middle)}: the target is {row(targets[middle])}, "
        f"and should be {row(should_be)}"
    )
    for code in guesses[best].codes:
        yield _finding(evidence, code, shares[best], example, certain=True)


def _guesses(evidence: Evidence, targets: Tensor, geometry: Geometry) -> Iterator[Guess]:
    boxes, points, stride, distances = geometry
    small = bool((targets.abs() <= 1).all())
    yield Guess(("coordinates", "pixels"), boxes)
    yield Guess(("coordinates",), boxes / stride)
    if scale := _scale(evidence, targets, boxes):
        yield Guess(("coordinates", "normalized")[: 1 + small], boxes * scale)
    yield Guess(("pixels",), distances * stride)
    yield Guess(("pixels",), bbox2dist(points, boxes))
    yield Guess(("pixels",), bbox2dist(points * stride, boxes / stride))
    if small and (scale := _scale(evidence, targets, distances * stride)):
        yield Guess(("normalized",), distances * stride * scale)


def _middle(geometry: Geometry) -> int:
    """A row for an example that is not extreme."""
    return int(geometry.distances[:, 0].argsort()[len(geometry.distances) // 2])


def _described(geometry: Geometry, row_number: int) -> str:
    boxes, points, stride, _ = (values[row_number] for values in geometry)
    return (
        f"box {row(boxes)} in pixels, anchor point {row(points)} in cells of "
        f"{number(float(stride))} pixels"
    )


def _scale(evidence: Evidence, targets: Tensor, values: Tensor) -> float | None:
    """The factor from values to targets, where no clamp has touched them."""
    inside = (targets > evidence.low) & ~evidence.at_bound(targets) & (values.abs() > 1e-6)
    ratios = (targets / values)[inside]
    return float(ratios.median()) if ratios.numel() >= ENOUGH else None


def _agreement(evidence: Evidence, targets: Tensor, values: Tensor) -> float:
    """The share of targets that are these values, clamped to the bins or where the targets were."""
    finite = targets[targets.isfinite()]
    if not finite.numel():
        return 0.0
    # Where all targets are small, so is what makes a difference.
    tolerance = TOLERANCE * float(finite.abs().max().clamp(max=1))
    low, high = min(float(finite.min()), evidence.low), max(float(finite.max()), evidence.bound)
    return float(((targets - values.clamp(low, high)).abs() <= tolerance).double().mean())


def _boxes_in_pixels(evidence: Evidence, geometry: Geometry) -> Iterator[Finding]:
    """Boxes that would only fit their anchor points if they were divided by the stride again."""
    boxes, points, stride, distances = geometry
    middle = _middle(geometry)
    if float(boxes.abs().max()) <= 1 and float(stride.max()) > 1:
        example = f"{_described(geometry, middle)}: distances {row(distances[middle])}"
        yield _finding(evidence, "normalized", 1.0, example, certain=True)
        return
    before = _inside(evidence, distances)
    after = _inside(evidence, bbox2dist(points, boxes / stride**2))
    if before < 0.6 and after > 0.9:
        example = (
            f"anchor point {row(points[middle])} of stride {number(float(stride[middle]))}, box "
            f"{row((boxes / stride)[middle])} beside it: distances {row(distances[middle])}"
        )
        yield _finding(evidence, "pixels", 1 - before, example, certain=True)


def _inside(evidence: Evidence, values: Tensor) -> float:
    """The share of sides that the bins reach, with a cell to spare below."""
    return float(((values > evidence.low - 1) & (values <= evidence.last)).double().mean())


def _by_looks(evidence: Evidence, targets: Tensor) -> Iterator[Finding]:
    """Without boxes: what only coordinates, pixels or normalised lengths look like."""
    if len(targets) < ENOUGH:
        return
    example = f"a target is {row(targets[len(targets) // 2])}"
    above = float((targets > evidence.last).double().mean())
    if (share := _ordered(evidence, targets)) is not None:
        words = f"{example}: right above left, bottom above top"
        yield _finding(evidence, "coordinates", share, words)
        if above > 0.2:
            yield _finding(evidence, "pixels", above, example)
    elif evidence.stride is not None and _in_pixels(evidence, targets, evidence.stride):
        stride = number(float(evidence.stride.median()))
        yield _finding(evidence, "pixels", above, f"{example}, with a stride of {stride}")
    largest = float(targets.abs().max())
    if largest <= 1 and evidence.last >= 4 and evidence.low >= 0:
        words = f"{example}; the largest of all is {number(largest)}"
        yield _finding(evidence, "normalized", 1.0, words)


def _ordered(evidence: Evidence, targets: Tensor) -> float | None:
    """The share of pairs with right > left, or bottom > top, if it is that of coordinates.

    Right − left is the width of a box then, always positive; of distances it is as often negative.
    With anchor points given, the middle of left and right must also follow their position.
    """
    if targets.shape[-1] != 4:
        return None
    low, high = targets[:, :2], targets[:, 2:]
    # What sits at a bound may have been made equal, or put in order, by the clamp alone.
    inside = (targets > evidence.low) & ~evidence.at_bound(targets)
    usable = inside[:, :2] & inside[:, 2:]
    if int(usable.sum(0).min()) < ENOUGH:
        return None
    share = min(float((high > low)[usable[:, i], i].double().mean()) for i in (0, 1))
    if share < 0.98:
        return None
    points = evidence.anchor_points
    if points is not None and len(points) == len(targets):
        places = [points.double()]  # coordinates in cells follow these, in pixels the next
        if evidence.stride is not None:
            places.append(places[0] * evidence.stride[:, None])
        if max(_follows(low + high, place, usable) for place in places) < 0.8:
            return None
    return share


def _follows(values: Tensor, points: Tensor, usable: Tensor) -> float:
    """The smaller one of the correlations along x and y."""
    pairs = (torch.stack((values, points))[:, usable[:, i], i] for i in (0, 1))
    return min(float(torch.corrcoef(pair)[0, 1]) for pair in pairs)


def _in_pixels(evidence: Evidence, targets: Tensor, stride: Tensor) -> bool:
    """Many targets are out of reach, and dividing by the stride brings them all into it.

    Objects that are merely too large for the head look alike where there is a single stride, so
    only a majority counts; with several strides, pixels grow with the stride and cells do not.
    """
    if len(stride) != len(targets):
        return False
    above = float((targets > evidence.last).double().mean())
    reached = float((targets / stride[:, None] <= evidence.last).double().mean())
    if above < 0.2 or reached < 0.99:
        return False
    strides = stride.unique()
    if len(strides) == 1:
        return above >= 0.5
    medians = [targets[stride == s].median() for s in strides]
    growth = (medians[-1] / medians[0].clamp(min=1e-6)).log() / (strides[-1] / strides[0]).log()
    return float(growth) > 0.5


def _finding(
    evidence: Evidence, code: str, share: float, example: str, *, certain: bool = False
) -> Finding:
    title, cause, fix = _TEXTS[code]
    return Finding(
        code,
        Severity.WARNING if code == "normalized" and not certain else Severity.ERROR,
        title.format(share=percent(share)),
        example,
        cause,
        fix.format(right=RIGHT.format(num_bins=evidence.num_bins)),
        share,
    )


_TEXTS = {
    "coordinates": (
        "{share} of the targets are box coordinates, not distances from the anchor point.",
        "The target is x1, y1, x2, y2 (perhaps scaled). A head does not know where in the image "
        "its cell is, so it can only guess coordinates; and the IoU loss, which wants distances, "
        "pulls the other way.",
        "{right}",
    ),
    "pixels": (
        "{share} of the targets only make sense in pixels; DFL counts in cells.",
        "The division by the stride is missing, for the boxes or for the anchor points.",
        "{right}  # pixels in, cells out; or divide boxes AND anchor points by stride",
    ),
    "normalized": (
        "Targets never pass 1: boxes as fractions of the image, it seems, not in cells.",
        "Boxes in 0 to 1, as label files have them, were not multiplied by the image size.",
        "boxes = boxes * image_size; {right}",
    ),
}  # fmt: skip
