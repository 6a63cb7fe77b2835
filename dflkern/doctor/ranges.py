"""Where the targets lie on the bins: below, above, at the bound, between two bins or never."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.distributions import two_bins
from .evidence import AGREE, Evidence, agreement
from .findings import Finding, Level, Severity, by_share
from .units import may_be_cells
from .words import number, percent, row

COVERED = 0.995  # of the sides, by the K that the doctor proposes
ENOUGH = 20
MAX_LEVELS = 8
FLOOR_WORTH_NOTING = 0.1  # nats


def levels(evidence: Evidence) -> tuple[Level, ...]:
    """The targets of each stride: unclamped where boxes tell, else as they were given."""
    targets, steps = evidence.targets, evidence.stride
    if targets is None:
        return ()
    given, values = evidence.at_bound(targets), _unclamped(evidence, targets)
    sensible = evidence.project is None and may_be_cells(evidence)
    if steps is None or len(steps.unique()) > MAX_LEVELS:
        return (_level(evidence, None, values, given, sensible),)
    return tuple(
        _level(evidence, float(s), values[steps == s], given[steps == s], sensible)
        for s in steps.unique()
    )


def _level(
    evidence: Evidence, stride: float | None, values: Tensor, at_bound: Tensor, sensible: bool
) -> Level:
    values = values[~values.isnan()]
    finite = values[values.isfinite()]
    edges = evidence.project
    if edges is None:
        edges = torch.arange(evidence.last + 1, dtype=torch.float64)
    place = torch.bucketize(values, edges, right=True)
    place = torch.where(values == evidence.last, len(edges) - 1, place)
    return Level(
        stride=stride,
        count=len(values),
        below=_share(values < evidence.low),
        above=_share(values > evidence.bound + 1e-6),
        at_bound=_share(at_bound),
        largest=float(finite.max()) if len(finite) else None,
        reach=evidence.last * (stride or 1.0),
        wanted_bins=_bins_for(finite, evidence.margin) if sensible and len(finite) else None,
        counts=tuple(torch.bincount(place, minlength=len(edges) + 1).tolist()),
    )


def _bins_for(values: Tensor, margin: float) -> int:
    """The K that reaches nearly all of the values."""
    covered = float(values.sort().values[min(int(COVERED * len(values)), len(values) - 1)])
    return max(2, math.ceil(covered + margin) + 1)


def _unclamped(evidence: Evidence, targets: Tensor) -> Tensor:
    """What the given targets were before their clamp, where the boxes tell; else as given."""
    if evidence.geometry is None or evidence.geometry.distances.shape != targets.shape:
        return targets
    distances = evidence.geometry.distances
    beyond = (targets > evidence.bound + 1e-6) | (targets < evidence.low)
    made_of_them = agreement(evidence, targets, distances) >= AGREE
    return distances if made_of_them and not bool(beyond.any()) else targets


def _by_design(evidence: Evidence, values: Tensor) -> Tensor:
    """Which sides are below 0 only because an assigner enlarges tiny objects.

    Ultralytics 8.4 takes a side shorter than the second stride, 16 px, for that long when it looks
    for anchors inside a box. Such an anchor is at most (16 px − side) / 2 outside the object.
    """
    if evidence.stride is None or values.shape[-1] != 4 or not len(values):
        return torch.zeros_like(values, dtype=torch.bool)
    stride = evidence.stride[:, None]
    side = (values[:, :2] + values[:, 2:]) * stride
    allowed = (_second_stride(evidence) - side) / 2 * (side >= -1e-3)
    return (values < 1e-6) & (-values * stride <= allowed.repeat(1, 2) + 1e-3)


def _second_stride(evidence: Evidence) -> float:
    """Each level's stride is twice the one before; no anchor of the second may be foreground."""
    assert evidence.stride is not None
    return 2 * float(evidence.stride.min())


def ranges(evidence: Evidence) -> Iterator[Finding]:
    """`negative`, `tiny-objects`, `above-range` and `at-clamp`."""
    if evidence.targets is None or not evidence.targets.numel():
        return
    values = _unclamped(evidence, evidence.targets)
    designed = _by_design(evidence, values)
    yield from _negative(evidence, values, designed)
    yield from _above(evidence, values)
    if evidence.given is not None:
        yield from _at_clamp(evidence, evidence.given.double(), designed)


def _negative(evidence: Evidence, values: Tensor, designed: Tensor) -> Iterator[Finding]:
    below = (values < evidence.low - 1e-6) & values.isfinite()
    if share := _share(below & designed):
        least = number(_second_stride(evidence))
        yield Finding(
            "tiny-objects",
            Severity.NOTE,
            f"{percent(share)} of the distances lie below the first bin, all of objects under "
            f"{least} px wide or high, whose anchor point is just outside.",
            _worst(values.where(below & designed, 0).amin(-1).argmin(), values),
            "Ultralytics 8.4's assigner enlarges sides below the second stride to it, so that tiny "
            "objects get more anchors. This is by design. DFL trains these sides on the first bin.",
            f"nothing to do; under {least} px, a finer level (P2) or larger images help",
            share,
        )
    below &= ~designed
    if share := _share(below):
        yield Finding(
            "negative",
            by_share(share, 0.05, 0.25),
            f"{percent(share)} of the distances lie below the first bin: the anchor point is "
            "outside its box there.",
            _worst(values.where(below, 0).amin(-1).argmin(), values),
            "The assigner gives objects to anchors outside their box, or boxes and anchor points "
            "are in different units or in another order.",
            "inside = (dflkern.bbox2dist(points, boxes) > 0).all(-1)  # keep only these as "
            "foreground",
            share,
        )


def _worst(index: Tensor, values: Tensor) -> str:
    return f"row {int(index)}: {row(values[int(index)])}"


def _above(evidence: Evidence, values: Tensor) -> Iterator[Finding]:
    above = (values > evidence.bound + 1e-6) & values.isfinite()
    if not (share := _share(above)):
        return
    last, table = evidence.last, levels(evidence)
    wanted = max((i.wanted_bins for i in table if i.wanted_bins), default=None)
    enough = "" if wanted is None else f" {wanted} bins would cover 99.5 % of each level's sides."
    worst = int(values.where(above, 0).amax(-1).argmax())
    largest = float(values[worst].where(above[worst], 0).max())
    weights, given = "", evidence.given
    if evidence.project is None and given is not None and bool((given > last).any()):
        weights = (
            f"; without a clamp, {number(largest)} weighs the last bin with "
            f"{number(largest - last + 1)} and the one before with {number(last - largest)}"
        )
    reach = "; ".join(
        f"{'' if i.stride is None else f'stride {number(i.stride)}: {percent(i.above)}, '}"
        f"no side longer than {number(i.reach)} {'cells' if i.stride is None else 'px'} from its "
        "anchor"
        for i in table
    )
    cause, fix = _too_long(evidence, values, above, wanted)
    yield Finding(
        "above-range",
        by_share(share, 0.02, 0.25),
        f"{percent(share)} of the distances lie beyond the last bin at {number(last)} ({reach})."
        f"{enough}",
        f"row {worst}: {row(values[worst])}{weights}",
        cause,
        fix,
        share,
    )


def _too_long(
    evidence: Evidence, values: Tensor, above: Tensor, wanted: int | None
) -> tuple[str, str]:
    """Cause and fix: objects that no anchor can express, or anchors that cannot and others can."""
    bins = "extend project" if wanted is None else f"num_bins = {wanted}"
    rows = above.any(-1)
    if values.shape[-1] != 4:
        return "Objects too large for their level, too few bins, or targets in a wrong unit.", bins
    steps, unit = evidence.stride, "cells" if evidence.stride is None else "px"
    scale = torch.ones(len(values)) if steps is None else steps
    widest = 2 * evidence.last * float(scale.max())
    size = ((values[:, :2] + values[:, 2:]) * scale[:, None]).amax(-1)
    never = _share((size > widest)[rows])
    trained = "DFL trains them on the clamped distance, so their boxes come out too small."
    if never:
        level = (
            "" if steps is None else f"; or add a level of stride {number(2 * float(scale.max()))}"
        )
        return (
            f"{percent(never)} of these anchors belong to objects longer than {number(widest)} "
            f"{unit}, which no anchor given here can express; the others to objects that an anchor "
            f"nearer the centre, or of a larger stride, can. {trained}",
            f"{bins}{level}",
        )
    return (
        f"All these objects are within {number(widest)} {unit}: an anchor nearer their centre, or "
        f"of a larger stride, can express them; these anchors cannot. {trained}",
        f"foreground &= (distances <= {number(evidence.last)}).all(-1)  # or {bins}",
    )


def _at_clamp(evidence: Evidence, values: Tensor, designed: Tensor) -> Iterator[Finding]:
    high, low = evidence.at_bound(values), (values == evidence.low) & ~designed
    share = _share(high | low)
    if share < 0.002:
        return
    bound = float(values[high].max()) if bool(high.any()) else evidence.bound
    row_number = int((high | low).any(-1).nonzero()[0])
    yield Finding(
        "at-clamp",
        by_share(share, 0.05, 0.4),
        f"{percent(share)} of the targets sit exactly at a bound: {percent(_share(high))} at "
        f"{number(bound)}, {percent(_share(low))} at {number(evidence.low)}.",
        f"row {row_number}: {row(values[row_number])}",
        "A clamp hides what the targets were before: objects too large for their level if they "
        "are few, wrong units or coordinates if they are many, anchor points outside their box if "
        f"they sit at {number(evidence.low)}.",
        "dflkern.doctor.examine(targets=before_the_clamp, ...)  # or give boxes, anchor_points "
        "and stride",
        share,
    )


def integers(evidence: Evidence) -> Iterator[Finding]:
    """`integer-only`: targets that use one bin each, never two."""
    if evidence.given is None or evidence.project is not None:
        return
    values = evidence.given.double().flatten()
    inside = values[(values > evidence.low) & (values < evidence.last) & values.isfinite()]
    whole = inside == inside.round()
    if inside.numel() < ENOUGH or _share(whole) < 0.99:
        return
    yield Finding(
        "integer-only",
        Severity.WARNING,
        f"{percent(_share(whole))} of the targets are whole numbers: every one trains a single "
        "bin.",
        row(inside[:4]),
        "Targets were rounded, cast to integers, or snapped to the grid on the way. Up to half a "
        "cell of every side is lost.",
        "targets = targets.float()  # before the division by the stride, and no .long() or "
        ".round() after it",
        _share(whole),
    )


def floor(evidence: Evidence) -> Iterator[Finding]:
    """`entropy-floor`: what a perfect fit still costs."""
    targets, num_bins = evidence.targets, evidence.num_bins
    if targets is None or num_bins is None:
        return
    finite = targets[targets.isfinite()]
    if not finite.numel():
        return
    _, left, right = two_bins(finite, evidence.project, num_bins, evidence.margin)
    least = -(torch.xlogy(left, left) + torch.xlogy(right, right))
    mean = float(least.mean())
    if mean < FLOOR_WORTH_NOTING:
        return
    worst = int(least.argmax())
    yield Finding(
        "entropy-floor",
        Severity.NOTE,
        f"A perfect fit of these targets still costs {mean:.3f} nats a side (mean over sides, "
        "before any gain).",
        f"target {number(float(finite[worst]))} costs {float(least[worst]):.3f}; one half-way "
        "between two bins costs ln 2 = 0.693",
        "DFL compares with two neighbouring bins, and their entropy remains. It is no bug.",
        f"print(loss - {mean:.3f})  # how much there is left to learn, for a mean over sides",
    )


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0
