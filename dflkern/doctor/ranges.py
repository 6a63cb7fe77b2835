"""Where the targets lie on the bins: below, above, at the bound, between two bins or never."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import two_bins
from .evidence import Evidence
from .findings import Finding, Level, Severity
from .words import by_share, number, percent, row

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
    if steps is None or len(steps.unique()) > MAX_LEVELS:
        return (_level(evidence, None, values, given),)
    return tuple(
        _level(evidence, float(s), values[steps == s], given[steps == s]) for s in steps.unique()
    )


def _level(evidence: Evidence, stride: float | None, values: Tensor, at_bound: Tensor) -> Level:
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
        reach=2 * evidence.last * (stride or 1.0),
        wanted_bins=_bins_for(values, evidence) if len(finite) else None,
        counts=tuple(torch.bincount(place, minlength=len(edges) + 1).tolist()),
    )


def _bins_for(values: Tensor, evidence: Evidence) -> int | None:
    """The K that reaches nearly all of the values; None with a project, whose steps are its own."""
    if evidence.project is not None:
        return None
    ordered = values[values.isfinite()].sort().values
    covered = float(ordered[min(int(COVERED * len(ordered)), len(ordered) - 1)])
    return max(2, math.ceil(covered + evidence.margin) + 1)


def _unclamped(evidence: Evidence, targets: Tensor) -> Tensor:
    """The given targets if a clamp has left some beyond the bins, else what the boxes imply."""
    if evidence.geometry is None or evidence.geometry.distances.shape != targets.shape:
        return targets
    beyond = (targets > evidence.bound + 1e-6) | (targets < evidence.low)
    return targets if bool(beyond.any()) else evidence.geometry.distances


def ranges(evidence: Evidence) -> Iterator[Finding]:
    """`negative`, `above-range` and `at-clamp`."""
    if evidence.targets is None or not evidence.targets.numel():
        return
    values = _unclamped(evidence, evidence.targets)
    yield from _negative(evidence, values)
    yield from _above(evidence, values)
    if evidence.given is not None:
        yield from _at_clamp(evidence, evidence.given)


def _negative(evidence: Evidence, values: Tensor) -> Iterator[Finding]:
    share = _share((values < evidence.low - 1e-6) & values.isfinite())
    if not share:
        return
    worst = int(values.nan_to_num(nan=0, neginf=0).amin(-1).argmin())
    yield Finding(
        "negative",
        by_share(share, 0.05, 0.25),
        f"{percent(share)} of the distances lie below the first bin: the anchor point is outside "
        "its box there.",
        f"row {worst}: {row(values[worst])}",
        "The assigner gives objects to anchors outside their box, or boxes and anchor points are "
        "in different units or in another order.",
        "inside = (dflkern.bbox2dist(points, boxes) > 0).all(-1)  # keep only these as foreground",
        share,
    )


def _above(evidence: Evidence, values: Tensor) -> Iterator[Finding]:
    above = (values > evidence.bound + 1e-6) & values.isfinite()
    share = _share(above)
    if not share:
        return
    if evidence.stride is not None and len(evidence.stride.unique()) <= MAX_LEVELS:
        per_level = "; ".join(
            f"stride {number(float(s))}: {percent(_share(above[evidence.stride == s]))}, "
            f"no box wider than {number(2 * evidence.last * float(s))} px"
            for s in evidence.stride.unique()
        )
    else:
        per_level = f"no box wider than {number(2 * evidence.last)} cells"
    worst = int(values.nan_to_num(nan=0, posinf=0).amax(-1).argmax())
    fix = "give larger objects to a larger stride, or extend project"
    wanted = _bins_for(values, evidence) if bool(values.isfinite().any()) else None
    if wanted is not None and wanted > evidence.last + 1:
        fix = f"num_bins = {wanted}  # covers 99.5 %; or give larger objects a larger stride"
    yield Finding(
        "above-range",
        by_share(share, 0.02, 0.25),
        f"{percent(share)} of the distances lie beyond the last bin at {number(evidence.last)} "
        f"and cannot be expressed ({per_level}).",
        f"row {worst}: {row(values[worst])}",
        "Objects too large for their level, too few bins, or targets in the wrong unit. DFL "
        "trains on the clamped distance, so these boxes come out too small.",
        fix,
        share,
    )


def _at_clamp(evidence: Evidence, given: Tensor) -> Iterator[Finding]:
    values = given.double()
    high, low = evidence.at_bound(values), values == evidence.low
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
