"""What a training shows over its steps: losses, weights, normalizers and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ..reference.distributions import loss_of_each
from .evidence import Evidence
from .findings import Finding, Severity, by_share
from .words import number, percent

# How many losses are exactly the largest one, as (number, share), before it is no chance.
PINNED = ((5, 0.3), (10, 0.02))
GROWTH = 100.0  # of the gradient norm over the steps, by medians
AMPLIFIED = 1000.0  # of the gradient from the head to a deeper layer
TINY_NORMALIZER = 1e-3
SUMMED = 100.0  # × ln K, which uniform distributions cost: no gain and batch size explain more


def clamped_loss(evidence: Evidence) -> Iterator[Finding]:
    """`loss-clamp`, and what else a loss that does not move can be."""
    losses = evidence.losses
    if losses is None:
        return
    losses = losses[losses.isfinite()]
    if not losses.numel():
        return
    top = float(losses.max())
    pinned = (losses - top).abs() <= 1e-6 * max(1.0, abs(top))
    count, share = int(pinned.sum()), float(pinned.double().mean())
    if not any(count >= least and share >= part for least, part in PINNED):
        return
    if top == 0:
        yield _zero_loss(share)
        return
    if evidence.num_bins is not None and any(
        math.isclose(top, sides * math.log(evidence.num_bins), rel_tol=1e-5) for sides in (1, 4)
    ):
        return  # uniform distributions, which flat-logits is about
    hidden = ""
    if (true := _true_loss(evidence)) is not None:
        hidden = f" The mean DFL of the logits and targets given here is {number(true)} a side."
    yield Finding(
        "loss-clamp",
        by_share(share, 0, 0.3),
        f"{percent(share)} of the losses are exactly {number(top)}: a clamp holds them there, "
        f"and their gradient is zero.{hidden}",
        f"{count} of {losses.numel()} losses equal {number(top)}",
        f"loss.clamp(max={number(top)}) or torch.minimum. Above the bound nothing is learnt; the "
        "number hides whether the loss is a little too high or wrong altogether. Summed over the "
        "four sides, even uniform distributions cost 4·ln K, 11.09 for 16 bins.",
        "loss = dflkern.dfl_loss(logits, targets, weight=weight, reduction='sum') / normalizer  "
        "# no clamp on it; clip the gradient if you must",
        share,
    )


def loss_size(evidence: Evidence) -> Iterator[Finding]:
    """`negative-loss` and `summed-loss`: values that a mean of DFL, or of 1 − IoU, cannot have."""
    losses = evidence.losses
    if losses is None or not bool(losses.isfinite().any()):
        return
    losses = losses[losses.isfinite()]
    if share := float((losses < -1e-6).double().mean()):
        yield Finding(
            "negative-loss",
            Severity.ERROR,
            f"{percent(share)} of the losses are negative. DFL is a cross entropy and a box loss "
            "is 1 − IoU; neither can be.",
            f"loss {int(losses.argmin())} is {number(float(losses.min()))}",
            "A target beyond the last bin that is not clamped, so that one bin's weight is above 1 "
            "and the other's negative; a negative weight or normalizer; a wrong sign; or, in a box "
            "loss, boxes with x2 < x1.",
            "print(targets.aminmax(), weight.min(), normalizer)  # 0 ≤ targets < K − 1, 0 ≤ weight",
            share,
        )
    uniform, typical = math.log(evidence.num_bins or 16), float(losses.median())
    share, true = float((losses > SUMMED * uniform).double().mean()), _true_loss(evidence)
    if share < 0.9 or (true is not None and true > 0.5 * typical):
        return
    yield Finding(
        "summed-loss",
        Severity.WARNING,
        f"The losses are around {number(typical)}, too large for a mean: uniform distributions "
        f"cost ln K = {uniform:.2f} a side.",
        f"with a gain of 1.5 and a batch of 8 that is {number(12 * uniform)}; here it is "
        f"{number(typical)}" + ("" if true is None else f", and a mean of {number(true)} a side"),
        "A sum over sides, anchors or images that is not divided by anything. It grows with the "
        "number of objects and drowns the other losses. If it is a mean after all, the logits have "
        "diverged.",
        "loss = dflkern.dfl_loss(logits, targets, weight=weight, reduction='sum') / "
        "weight.sum().clamp(min=1)",
        share,
    )


def _true_loss(evidence: Evidence) -> float | None:
    """The mean DFL of logits and targets in nats, without any clamp on it."""
    logits, targets = evidence.logits, evidence.targets
    if not evidence.paired or logits is None or targets is None or not logits.numel():
        return None
    if logits.shape[-1] != evidence.num_bins:
        return None
    losses = loss_of_each(
        logits.double(), targets, evidence.project, logits.ndim - 1, evidence.margin
    )
    return float(losses.nanmean())


def _zero_loss(share: float) -> Finding:
    return Finding(
        "zero-weight",
        Severity.ERROR,
        f"{percent(share)} of the losses are exactly 0, which DFL never is by itself.",
        "loss = 0.0",
        "No anchor is foreground, every weight is 0, or the model has no DFL (reg_max 1, or "
        "use_dfl=False).",
        "print(foreground.sum(), weight.sum())  # in the step where the loss is made",
        share,
    )


def weights(evidence: Evidence) -> Iterator[Finding]:
    """`zero-weight` and `zero-normalizer`."""
    if evidence.targets is not None and not evidence.targets.numel():
        yield Finding(
            "zero-weight",
            Severity.ERROR,
            "There is no target at all: no anchor is foreground.",
            "0 rows",
            "An image without objects; or an assigner that finds no anchor in any box, as when "
            "boxes and anchor points are in different units.",
            "print(foreground.sum(), boxes.shape)  # over some batches",
            1.0,
        )
    weight = evidence.weight
    if weight is not None and weight.numel():
        share = float((weight == 0).double().mean())
        if share > 0.5:
            yield Finding(
                "zero-weight",
                Severity.ERROR if share == 1 else Severity.WARNING,
                f"{percent(share)} of the foreground weights are 0: those anchors train nothing.",
                f"{int((weight == 0).sum())} of {weight.numel()} weights; the largest is "
                f"{number(float(weight.max()))}",
                "Scores that are zero where an object was assigned, as when no prediction "
                "overlaps it, or a weight taken from the background.",
                "weight = target_scores.sum(-1)[foreground]  # and an assigner that does not "
                "start from the predictions",
                share,
            )
    normalizer = evidence.normalizer
    if normalizer is not None and normalizer.numel():
        bad = ~(normalizer > TINY_NORMALIZER)
        if bool(bad.any()):
            worst = float(normalizer[bad][0])
            zero = not bool((normalizer > 0).all())
            yield Finding(
                "zero-normalizer",
                Severity.ERROR if zero else Severity.WARNING,
                f"{percent(float(bad.double().mean()))} of the normalizers are "
                f"{'0 or below' if zero else f'below {TINY_NORMALIZER}'}: the loss becomes "
                f"{'NaN or infinite' if zero else 'huge'} there.",
                f"a step divides by {number(worst)}",
                "A batch without foreground, or whose scores are all near zero.",
                "normalizer = target_scores.sum().clamp(min=1)",
                float(bad.double().mean()),
            )


def gradients(evidence: Evidence) -> Iterator[Finding]:
    """`exploding-gradient`: over the steps, or from the head down to the backbone."""
    histories = {
        name: norms[norms.isfinite()]
        for name, norms in evidence.gradients.items()
        if norms.isfinite().any()
    }
    if not histories:
        return
    grown = {name: growth for name, norms in histories.items() if (growth := _growth(norms))}
    strongest = max(grown, key=lambda name: grown[name], default=None)
    if strongest is not None and grown[strongest] >= GROWTH:
        first, last = float(histories[strongest][0]), float(histories[strongest].max())
        yield _exploding(
            f"The gradient norm{_of(strongest)} grew to {number(grown[strongest])} times what it "
            "was.",
            f"{number(first)} at first, up to {number(last)} later",
        )
        return
    layers = [(name, float(norms.median())) for name, norms in histories.items() if name]
    if len(layers) < 3:
        return
    # A head has a branch for each level, and one with hardly any foreground gets next to nothing.
    head, size = max(layers[: -(-len(layers) // 4)], key=lambda layer: layer[1])
    worst, largest = max(layers, key=lambda layer: layer[1])
    if size and largest / size >= AMPLIFIED:
        begins = next(name for name, norm in layers if norm > AMPLIFIED**0.5 * size)
        yield _exploding(
            f"The gradient grows {number(largest / size)}-fold from the head down to {worst}.",
            f"{head}: {number(size)}; {worst}: {number(largest)}; it leaves all proportion at "
            f"{begins}",
        )


def _growth(norms: Tensor) -> float:
    """The median of the last quarter of the steps over that of the first quarter."""
    if norms.numel() < 8:
        return 0.0
    quarter = norms.numel() // 4
    first = float(norms[:quarter].median())
    return float(norms[-quarter:].median()) / first if first > 0 else 0.0


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _exploding(title: str, example: str) -> Finding:
    return Finding(
        "exploding-gradient",
        Severity.ERROR,
        title,
        example,
        "Targets in the wrong units, a division by nearly nothing, a learning rate that is too "
        "high, or layers without normalization.",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)  # holds it; the cause is "
        "elsewhere",
    )


def non_finite(evidence: Evidence) -> Iterator[Finding]:
    """`non-finite`: NaN anywhere; infinity where it is no mask."""
    places: list[tuple[str, Tensor]] = []
    for name, values in _named(evidence):
        bad = values.isnan() | (values.isposinf() if name == "logits" else values.isinf())
        if bool(bad.any()):
            places.append((name, bad))
    if not places:
        return
    first, where = places[0]
    yield Finding(
        "non-finite",
        Severity.ERROR,
        "NaN or infinity in "
        + "; ".join(f"{name}: {int(bad.sum())} of {bad.numel()}" for name, bad in places)
        + ".",
        f"{first} at {where.nonzero()[0].tolist()}",
        "Overflow in fp16, a division by a normalizer of 0, a loss of -inf logits, or a learning "
        "rate that is too high. Look first at what is named first.",
        "torch.autograd.set_detect_anomaly(True)  # for a few steps; and amp off, to see if it "
        "stays",
        max(float(bad.double().mean()) for _, bad in places),
    )


def _named(evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Everything that should be finite, in the order in which a step makes it."""
    named = {
        "anchor_points": evidence.raw_anchor_points,
        "boxes": evidence.boxes,
        "targets": evidence.given,
        "logits": evidence.logits,
        "weight": evidence.weight,
        "normalizer": evidence.normalizer,
        "losses": evidence.losses,
    }
    yield from ((name, values) for name, values in named.items() if values is not None)
    for name, norms in evidence.gradients.items():
        yield f"gradients{_of(name)}", norms
