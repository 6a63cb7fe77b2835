"""What the doctor looks at, in one form: a row for each anchor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PILE, MIN_PILE = 0.01, 5  # equal targets, as a share and a number, that only a clamp makes
AGREE = 0.8  # the share of targets that a formula must give, before it counts as theirs
TOLERANCE = 0.05  # cells


class Geometry(NamedTuple):
    """What the targets are made of, for N anchors, and what they should be."""

    boxes: Tensor  # (N, 4), pixels
    anchor_points: Tensor  # (N, 2), cells
    stride: Tensor  # (N, 1)
    distances: Tensor  # (N, 4), cells, unclamped


@dataclass(frozen=True)
class Evidence:
    """All that was given; None where something was not. N rows, of S = 4 sides or of S = 1.

    Lengths are in cells but for the boxes. Nothing here is clamped by the doctor.
    """

    num_bins: int | None
    margin: float
    project: Tensor | None  # (K,)
    given: Tensor | None  # (N, S), in the dtype it came in
    geometry: Geometry | None  # where boxes, anchor points and stride are all there
    boxes: Tensor | None  # (N, 4), pixels
    anchor_points: Tensor | None  # (N, 2)
    raw_anchor_points: Tensor | None  # (…, 2), in the dtype they came in
    stride: Tensor | None  # (N,)
    logits: Tensor | None  # (M, K) or (N, S, K), in the dtype they came in
    weight: Tensor | None
    normalizer: Tensor | None
    losses: Tensor | None
    gradients: Mapping[str, Tensor]  # the norms of each layer over the steps; "" for all together

    @property
    def targets(self) -> Tensor | None:
        """(N, S) in fp64: those given, else those that boxes, anchor points and stride imply."""
        if self.given is not None:
            return self.given.double()
        return None if self.geometry is None else self.geometry.distances

    @property
    def paired(self) -> bool:
        """There is a target for each distribution of the logits."""
        return (
            self.logits is not None
            and self.targets is not None
            and self.logits.shape[:-1] == self.targets.shape
        )

    @property
    def low(self) -> float:
        """The position of the first bin."""
        return 0.0 if self.project is None else float(self.project[0])

    @property
    def last(self) -> float:
        """The position of the last bin."""
        assert self.num_bins is not None
        return float(self.num_bins - 1 if self.project is None else self.project[-1])

    @property
    def bound(self) -> float:
        """Where targets are clamped from above, as the dtype of the given targets has it."""
        bound = self.last - self.margin
        return bound if self.given is None else float(torch.tensor(bound, dtype=self.given.dtype))

    def at_bound(self, targets: Tensor) -> Tensor:
        """Which targets sit exactly at the upper bound, or piled up at one beyond it."""
        if not targets.numel():
            return targets > self.bound
        at_top = targets == targets.nan_to_num(nan=-math.inf, posinf=-math.inf).amax()
        piled = int(at_top.sum()) >= max(MIN_PILE, PILE * targets.numel())
        return (targets == self.bound) | (at_top & (targets > self.bound) & piled)


def agreement(evidence: Evidence, targets: Tensor, values: Tensor) -> float:
    """The share of targets that are these values, clamped to the bins or where the targets were."""
    finite = targets[targets.isfinite()]
    if not finite.numel():
        return 0.0
    # Where all targets are small, so is what makes a difference.
    tolerance = TOLERANCE * float(finite.abs().max().clamp(max=1))
    low, high = min(float(finite.min()), evidence.low), max(float(finite.max()), evidence.bound)
    return float(((targets - values.clamp(low, high)).abs() <= tolerance).double().mean())
