"""Units and formats: targets in cells, boxes as xyxy in pixels, anchor points in cells."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..geometry import bbox2dist
from .evidence import AGREE, Evidence, Geometry, agreement
from .findings import Finding, Severity
from .readings import FITS, OUT, Guess, best_reading, fractions, inverted, on_bins, readings
from .words import number, percent, row

ENOUGH = 20  # rows, below which nothing is concluded from how targets are distributed
RIGHT = "targets = dflkern.dfl_targets(boxes, anchor_points, stride, {num_bins})"


def units(evidence: Evidence) -> Iterator[Finding]:
    """`coordinates`, `pixels`, `normalized`, `anchor-units`, `box-units` and `box-format`.

    Where boxes, anchor points and stride are there, by comparing; else by how the values look.
    """
    targets, geometry = evidence.targets, evidence.geometry
    if geometry is None:
        if evidence.boxes is not None:
            yield from _boxes_by_looks(evidence, evidence.boxes.double())
        if targets is not None:
            yield from _by_looks(evidence, targets[targets.isfinite().all(-1)])
    elif len(geometry.boxes):
        found: list[Finding] = []
        if evidence.given is not None and evidence.given.shape[-1] == 4:
            found = list(_by_formula(evidence, evidence.given.double(), geometry))
        yield from found or _by_fit(evidence, geometry)


def may_be_cells(evidence: Evidence) -> bool:
    """Whether the targets are in cells for all that is known; pixels by looks may be."""
    codes = [finding.code for finding in units(evidence)]
    return not codes or (codes == ["pixels"] and evidence.geometry is None)


def _by_formula(evidence: Evidence, targets: Tensor, geometry: Geometry) -> Iterator[Finding]:
    """Compare the targets with what known mistakes would have made of these boxes."""
    if agreement(evidence, targets, geometry.distances) >= AGREE:
        return
    # A reading that puts the targets on the bins says that they are right and the geometry is not.
    misread = [
        guess
        for guess in readings(geometry)
        if guess.codes not in ((), ("pixels",)) and on_bins(evidence, guess.values) > FITS
    ]
    guesses = [*misread, *_mistakes(evidence, targets, geometry)]
    shares = [agreement(evidence, targets, guess.values) for guess in guesses]
    best = max(range(len(guesses)), key=lambda i: shares[i])
    if shares[best] < AGREE:
        return
    if best < len(misread):
        yield from _misread(evidence, geometry, guesses[best], Severity.WARNING)
        return
    middle, described = _example(geometry)
    should_be = geometry.distances[middle].clamp(evidence.low, evidence.bound)
    example = f"{described}: the target is {row(targets[middle])}, and should be {row(should_be)}"
    for code in guesses[best].codes:
        yield _finding(evidence, code, shares[best], example)


def _mistakes(evidence: Evidence, targets: Tensor, geometry: Geometry) -> Iterator[Guess]:
    """Wrong ways to make targets of boxes and anchor points that are right."""
    boxes, points, stride, distances = geometry
    small = fractions(targets)
    yield Guess(("coordinates", "pixels"), boxes)
    yield Guess(("coordinates",), boxes / stride)
    if scale := _scale(evidence, targets, boxes):
        yield Guess(("coordinates", "normalized")[: 1 + small], boxes * scale)
    yield Guess(("pixels",), distances * stride)
    yield Guess(("pixels",), bbox2dist(points, boxes))
    yield Guess(("pixels",), bbox2dist(points * stride, boxes / stride))
    if small and (scale := _scale(evidence, targets, distances * stride)):
        yield Guess(("normalized",), distances * stride * scale)


def _by_fit(evidence: Evidence, geometry: Geometry) -> Iterator[Finding]:
    """Boxes and anchor points that only fit each other if they are read differently."""
    boxes = geometry.boxes
    if fractions(boxes) and float(geometry.stride.max()) > 1:
        yield from _boxes_by_looks(evidence, boxes)
        return
    if on_bins(evidence, geometry.distances) >= OUT and not inverted(boxes):
        return
    best = best_reading(evidence, geometry)
    if best is None:
        yield from _boxes_by_looks(evidence, boxes)
    else:
        yield from _misread(evidence, geometry, best, Severity.ERROR)


def _misread(
    evidence: Evidence, geometry: Geometry, guess: Guess, severity: Severity
) -> Iterator[Finding]:
    middle, described = _example(geometry)
    example = (
        f"{described}: distances {row(geometry.distances[middle])} cells as given, "
        f"{row(guess.values[middle])} once corrected"
    )
    share = 1 - on_bins(evidence, geometry.distances)
    for code in guess.codes:
        yield _finding(evidence, code, share, example, severity, subject="boxes", form=guess.form)


def _boxes_by_looks(evidence: Evidence, boxes: Tensor) -> Iterator[Finding]:
    """`box-format` by boxes that end before they begin, `normalized` by their size."""
    boxes = boxes[boxes.isfinite().all(-1)]
    if share := inverted(boxes):
        first, size = boxes.chunk(2, -1)
        # A centre is half a side or more from the edge of the image; a corner need not be.
        corner = bool((first < 0.45 * size).any(-1).double().mean() >= 0.01)
        example = f"a box is {row(boxes[(size < first).any(-1)][0])}"
        yield _finding(evidence, "box-format", share, example, form="xywh" if corner else "cxcywh")
    if fractions(boxes):
        example = f"a box is {row(boxes[len(boxes) // 2])}"
        yield _finding(evidence, "normalized", 1.0, example, subject="boxes")


def _example(geometry: Geometry) -> tuple[int, str]:
    """A row that is not extreme, and what is in it."""
    middle = int(geometry.distances[:, 0].argsort()[len(geometry.distances) // 2])
    boxes, points, stride, _ = (values[middle] for values in geometry)
    words = f"box {row(boxes)}, anchor point {row(points)}, stride {number(float(stride))}"
    return middle, words


def _scale(evidence: Evidence, targets: Tensor, values: Tensor) -> float | None:
    """The factor from values to targets, where no clamp has touched them."""
    inside = (targets > evidence.low) & ~evidence.at_bound(targets) & (values.abs() > 1e-6)
    ratios = (targets / values)[inside]
    return float(ratios.median()) if ratios.numel() >= ENOUGH else None


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
        words = f"{example}, with a stride of {stride}"
        yield _finding(evidence, "pixels", above, words, subject="either")
    # Sides below 0 are those of tiny objects in cells, whose anchor points lie just outside.
    within = float((targets < 0).double().mean()) < 0.05
    if within and fractions(targets) and evidence.last >= 4 and evidence.low >= 0:
        words = f"{example}; the largest of all is {number(float(targets.abs().max()))}"
        yield _finding(evidence, "normalized", 1.0, words, Severity.WARNING)


def _ordered(evidence: Evidence, targets: Tensor) -> float | None:
    """The share of pairs with right > left, or bottom > top, if it is that of coordinates.

    Right − left is the width of a box then, always positive; of distances it is as often negative.
    With anchor points given, they must also lie between left and right, scaled as those are.
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
        places = [points.double()]  # coordinates in cells contain these, in pixels the next
        if evidence.stride is not None:
            places.append(places[0] * evidence.stride[:, None])
        if max(_contains(low, high, place, usable) for place in places) < 0.8:
            return None
    return share


def _contains(low: Tensor, high: Tensor, place: Tensor, usable: Tensor) -> float:
    """The share of places, in the unit that suits best, between low and high: the lower of x, y."""
    shares = []
    for i in (0, 1):
        some = usable[:, i] & (place[:, i] > 0)
        start, end, at = (values[some, i] for values in (low, high, place))
        at = at * ((start + end) / (2 * at)).median()
        shares.append(float(((start < at) & (at < end)).double().mean()))
    return min(shares)


def _in_pixels(evidence: Evidence, targets: Tensor, stride: Tensor) -> bool:
    """Many targets are out of reach, and dividing by the stride brings them all into it.

    Objects that are merely too large for the head look alike, so a majority must be out of reach;
    or there are several strides, and targets grow with them as pixels do and cells do not.
    """
    if len(stride) != len(targets):
        return False
    above = float((targets > evidence.last).double().mean())
    reached = float((targets / stride[:, None] <= evidence.last).double().mean())
    if above < 0.2 or reached < 0.99:
        return False
    strides = stride.unique()
    if above >= 0.5 or len(strides) == 1:
        return above >= 0.5
    medians = [targets[stride == s].median() for s in strides]
    growth = (medians[-1] / medians[0].clamp(min=1e-6)).log() / (strides[-1] / strides[0]).log()
    return float(growth) > 0.5


def _finding(
    evidence: Evidence,
    code: str,
    share: float,
    example: str,
    severity: Severity = Severity.ERROR,
    *,
    subject: str = "targets",
    form: str = "",
) -> Finding:
    """The finding, in the words for its subject where there are several."""
    title, cause, fix = _TEXTS.get(f"{code} {subject}") or _TEXTS[code]
    words = {
        "share": percent(share),
        "right": RIGHT.format(num_bins=evidence.num_bins),
        "form": form,
        "other": "cxcywh" if form == "xywh" else "xywh",
        "parts": "the first corner and the size" if form == "xywh" else "the centre and the size",
    }
    return Finding(
        code, severity, title.format(**words), example, cause, fix.format(**words), share
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
    "pixels either": (
        "{share} of the targets lie beyond the last bin, and all would fit if they were divided by "
        "the stride: they are in pixels, or in cells and the objects are too large for the head.",
        "In pixels: the division by the stride is missing. In cells: too few bins, and above-range "
        "says how many are needed. Targets alone cannot tell; with boxes and anchor_points, "
        "examine can.",
        "{right}  # if they are in pixels",
    ),
    "normalized": (
        "The targets are at most about 1: fractions of the image, it seems, not cells.",
        "Boxes in 0 to 1, as label files have them, were not multiplied by the image size.",
        "boxes = boxes * image_size; {right}",
    ),
    "normalized boxes": (
        "The boxes are fractions of the image, from 0 to 1; they should be in pixels.",
        "Boxes in 0 to 1, as label files have them, were not multiplied by the image size.",
        "boxes = boxes * torch.tensor([width, height, width, height])",
    ),
    "anchor-units": (
        "The anchor points are in pixels; they should be in cells, (column + 0.5, row + 0.5).",
        "They were multiplied by the stride, as detectors do for inference. With boxes in cells, "
        "nearly every anchor point then lies far outside its box.",
        "anchor_points = anchor_points / stride",
    ),
    "box-units": (
        "The boxes are in cells; they should be in pixels.",
        "They were divided by the stride already, and so will be divided twice.",
        "boxes = boxes * stride  # or leave out the first division",
    ),
    "box-format": (
        "The boxes are not x1, y1, x2, y2: they hold {parts} ({form}).",
        "COCO and MOT label files hold corner, width and height, YOLO label files centre, width "
        "and height. Read as two corners, many such boxes have x2 < x1 or y2 < y1.",
        'boxes = torchvision.ops.box_convert(boxes, "{form}", "xyxy")  # try "{other}" if they do '
        "not fit",
    ),
}  # fmt: skip
