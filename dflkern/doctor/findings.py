"""What the doctor can find, what explains what, and the order that puts causes first."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


class Severity(enum.IntEnum):
    """How grave a finding is; a command's exit code is the gravest one's number."""

    NOTE = 0  # good to know, nothing to do
    WARNING = 1  # costs accuracy, or will bite later
    ERROR = 2  # the training cannot work like this

    def __str__(self) -> str:
        return self.name.lower()


# Every code, causes before what follows from them, with the codes it explains when both are found.
_RANGES = ("negative", "tiny-objects", "above-range", "at-clamp", "entropy-floor")
_UNITS = (*_RANGES, "integer-only", "half-clamp", "exploding-gradient")
EXPLAINS: dict[str, tuple[str, ...]] = {
    "box-format": _RANGES,
    "anchor-units": _RANGES,
    "box-units": _RANGES,
    "coordinates": ("pixels", "normalized", *_UNITS),
    "pixels": _UNITS,
    "normalized": _RANGES,
    "half-anchors": ("negative", "tiny-objects", "integer-only"),
    "no-targets": (),
    "extra-bin": (),
    "bin-major": ("saturated-logits", "exploding-gradient"),
    "zero-weight": ("zero-normalizer", "flat-logits"),
    "zero-normalizer": ("negative-loss", "summed-loss", "non-finite", "exploding-gradient"),
    "loss-clamp": ("flat-logits",),
    "summed-loss": ("exploding-gradient",),
    "exploding-gradient": ("non-finite", "saturated-logits"),
    "non-finite": (),
    "negative": ("at-clamp",),
    "above-range": ("negative-loss", "at-clamp"),
    "negative-loss": (),
    "half-clamp": ("at-clamp",),
    "integer-only": ("at-clamp",),
    "at-clamp": (),
    "saturated-logits": (),
    "flat-logits": (),
    "half-decode": (),
    "tiny-objects": (),
    "entropy-floor": (),
}
CODES = tuple(EXPLAINS)


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has to say.

    Attributes:
        code: one of `CODES`.
        severity: note, warning or error.
        title: what was seen, with numbers.
        example: one case out of the data.
        cause: where it most likely comes from.
        fix: a line of code, or what to do.
        share: the part of the elements it concerns, from 0 to 1; None where nothing is counted.
        because: the code of the finding that explains this one; None if it stands for itself.
    """

    code: str
    severity: Severity
    title: str
    example: str
    cause: str
    fix: str
    share: float | None = None
    because: str | None = None


@dataclass(frozen=True)
class Level:
    """The targets of one stride, before any clamp where that is known.

    Attributes:
        stride: pixels per cell; None if no stride was given.
        count: how many sides.
        below: the share of sides below the first bin.
        above: the share above the last bin that the clamp leaves.
        at_bound: the share exactly at that bound.
        largest: the largest finite target; None if there is none.
        reach: the longest distance from an anchor point to a side that the bins can express, in
            pixels (in cells without stride).
        wanted_bins: the K that would cover 99.5 % of the sides of this level; None with a project,
            and where the targets are not in cells.
        counts: how many sides fall below W_0, into each [W_k, W_{k+1}), and above W_{K−1}.
    """

    stride: float | None
    count: int
    below: float
    above: float
    at_bound: float
    largest: float | None
    reach: float
    wanted_bins: int | None
    counts: tuple[int, ...]


def by_share(share: float, warning: float, error: float) -> Severity:
    """The severity of something whose weight is how often it happens."""
    if share >= error:
        return Severity.ERROR
    return Severity.WARNING if share >= warning else Severity.NOTE


def arrange(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The gravest cause first, and what follows from it right behind it.

    A consequence loses its own cause and fix, which would lead astray, and is left out where it is
    a mere note.
    """
    found = {finding.code for finding in findings}
    marked = []
    for finding in findings:
        cause = _cause(finding.code, found)
        if cause is None:
            marked.append(finding)
        elif finding.severity > Severity.NOTE:
            follows, fix = f"It follows from {cause}.", f"repair {cause} first"
            marked.append(replace(finding, because=cause, cause=follows, fix=fix))
    marked.sort(key=lambda finding: (-finding.severity, CODES.index(finding.code)))
    ordered: list[Finding] = []
    for root in marked:
        if root.because is None:
            ordered += [root, *_consequences(root.code, marked)]
    return tuple(ordered)


def _cause(code: str, found: set[str]) -> str | None:
    return next((cause for cause in CODES if cause in found and code in EXPLAINS[cause]), None)


def _consequences(code: str, findings: Sequence[Finding]) -> Iterator[Finding]:
    for finding in findings:
        if finding.because == code:
            yield finding
            yield from _consequences(finding.code, findings)
