"""What the logits say about themselves: their number of bins, their order, how sharp they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ..reference.distributions import loss_of_each
from .evidence import Evidence
from .findings import Finding, Severity
from .words import number, percent

ENOUGH = 8  # distributions of four sides, below which no order is read from them
ROUGHER = 0.6  # the share of the zigzag that is left once the order is right
WORSE = 0.3  # nats by which the DFL of the wrong order is higher
FLAT = 1.1  # times 1/K: the largest probability of a distribution that says nothing
SATURATED = 15.0  # nats between the best bin and the second best
STUCK_STEPS = 50


def bins(evidence: Evidence) -> Iterator[Finding]:
    """`extra-bin`: the logits have another number of bins than the targets were made for."""
    logits, expected = evidence.logits, evidence.num_bins
    if logits is None or expected is None:
        return
    found = logits.shape[-1]
    if found != expected:
        words = "one bin too many" if found == expected + 1 else f"{found} bins"
        yield Finding(
            "extra-bin",
            Severity.ERROR,
            f"The logits have {words}: {found}, where num_bins is {expected}.",
            f"4·{found} = {4 * found} box channels in the head instead of 4·{expected} = "
            f"{4 * expected}",
            "reg_max is K in Ultralytics, YOLOv9 and mmyolo's v8, but K − 1 in mmdet, YOLOv6, "
            "PP-YOLOE and YOLO-NAS.",
            f"head = nn.Conv2d(channels, 4 * {expected}, 1)  # or num_bins={found}, everywhere",
        )
    elif (pile := _unused_last_bin(evidence)) is not None:
        yield Finding(
            "extra-bin",
            Severity.WARNING,
            f"The last of the {found} bins is never used: {percent(pile)} of the targets pile up "
            f"at {number(found - 2 - evidence.margin)}, the bound for {found - 1} bins.",
            f"no target lies between {number(found - 2)} and {found - 1}",
            f"The targets were clamped for {found - 1} bins, and the head has {found}: reg_max "
            "read as K in one place and as K − 1 in the other.",
            f"head = nn.Conv2d(channels, 4 * {found - 1}, 1)  # or clamp for num_bins={found}",
            pile,
        )


def _unused_last_bin(evidence: Evidence) -> float | None:
    """The share of targets exactly at the bound for one bin less, if none lies beyond it."""
    given = evidence.given
    if given is None or not given.numel() or evidence.project is not None:
        return None
    bound = evidence.last - 1 - evidence.margin
    if not abs(float(given.max()) - bound) < 1e-4:
        return None
    share = float((given.double() - bound).abs().lt(1e-4).double().mean())
    return share if share > 0.002 else None


def order(evidence: Evidence) -> Iterator[Finding]:
    """`bin-major`: channels ordered as (bin, side), read as (side, bin)."""
    logits = evidence.logits
    if logits is None or logits.ndim != 3 or logits.shape[1] != 4 or len(logits) < ENOUGH:
        return
    if logits.shape[-1] < 4:
        return
    as_read = logits.double()
    if not bool(as_read.isfinite().all()):
        return
    num_bins = logits.shape[-1]
    # The channels as they came, taken for K groups of 4 sides.
    turned = as_read.reshape(-1, num_bins, 4).transpose(1, 2)
    before, after = _roughness(as_read), _roughness(turned)
    wrong = after < ROUGHER * before
    words = (
        f"from bin to bin the logits zigzag by {number(before)} as read, by {number(after)} read "
        "as bin-major"
    )
    targets = evidence.targets
    if evidence.paired and targets is not None and num_bins == evidence.num_bins:
        as_is, right = (
            float(loss_of_each(z, targets, evidence.project, 2, evidence.margin).nanmean())
            for z in (as_read, turned)
        )
        # Where the targets are wrong, any order may win; the right one beats knowing nothing.
        wrong = after < before and right < min(as_is - WORSE, math.log(num_bins))
        words = f"the DFL loss is {number(as_is)} as read, {number(right)} read as bin-major"
    if wrong:
        yield Finding(
            "bin-major",
            Severity.ERROR,
            "The channels are in bin-major order (bin·4 + side), and are read as side-major "
            "(side·K + bin).",
            words,
            "A view(…, 4, K) where the head, or its checkpoint, was trained with view(…, K, 4).",
            f"logits = logits.view(B, A, {num_bins}, 4).transpose(2, 3)  # or view(B, A, 4, "
            f"{num_bins}) in training too",
        )


def _roughness(logits: Tensor) -> float:
    """The mean second difference: slopes are natural, zigzag is not."""
    return float(logits.diff(n=2, dim=-1).abs().mean())


def sharpness(evidence: Evidence) -> Iterator[Finding]:
    """`flat-logits` and `saturated-logits`."""
    if evidence.logits is None or not evidence.logits.numel():
        return
    logits = evidence.logits.double().flatten(0, -2)
    logits = logits[logits.isfinite().all(-1)]
    if not len(logits):
        return
    num_bins = logits.shape[-1]
    best = logits.softmax(-1).amax(-1)
    flat = float((best < FLAT / num_bins).double().mean())
    if flat > 0.5:
        stuck = _stuck_at(evidence, math.log(num_bins))
        yield Finding(
            "flat-logits",
            Severity.WARNING if stuck else Severity.NOTE,
            f"{percent(flat)} of the distributions are uniform: they say nothing yet, and decode "
            "to the middle.",
            f"the largest probability is {number(float(best.median()))}, and 1/K is "
            f"{number(1 / num_bins)}",
            "Normal before the first steps, when the DFL loss is ln K = "
            f"{math.log(num_bins):.3f}. Later: no gradient reaches the box branch.",
            "print([p.grad.norm() for p in box_head.parameters()])  # zero: frozen, or loss "
            "detached",
            flat,
        )
    top = logits.topk(2, dim=-1).values
    gap = top[:, 0] - top[:, 1]
    saturated = gap >= SATURATED
    share = float(saturated.double().mean())
    if share > 0.25:
        worst = int(gap.argmax())
        raw = bool((logits == logits.round()).all())
        yield Finding(
            "saturated-logits",
            Severity.WARNING,
            f"{percent(share)} of the distributions put everything on one bin, with "
            f"{number(SATURATED)} nats or more to the next.",
            f"logits up to {number(float(logits[worst].max()))}, the second best is "
            f"{number(float(gap[worst]))} lower"
            + ("; all are whole numbers, as raw INT8 outputs are" if raw else ""),
            "Logits that are scaled up: INT8 outputs whose dequantization scale is missing or "
            "wrong. In training: a learning rate that is too high, or whole-number targets; a "
            "target between two bins cannot be learnt from here.",
            "logits = scale * (raw - zero_point)  # if quantized; else lower the learning rate and "
            "resume from an earlier checkpoint",
            share,
        )


def _stuck_at(evidence: Evidence, value: float) -> bool:
    losses = evidence.losses
    if losses is None or losses.numel() < STUCK_STEPS:
        return False
    return bool(((losses[-STUCK_STEPS:] - value).abs() < 0.02 * value).all())
