"""Who is measured: dflkern, eager PyTorch in three spellings, and Ultralytics' own classes.

The spellings are written from the formulas of dflkern.reference. Every contender takes the stored
logits, so that a view or a flattening that it needs is part of its time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dflkern

from .cases import MARGIN, Case, Inputs

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[[Tensor], Outputs]

OURS = "dflkern"
OURS_MEAN = "dflkern, mean over sides"
ULTRALYTICS_DECODE = "Ultralytics DFL"
ULTRALYTICS_LOSS = "Ultralytics DFLoss"
COMPILED = ", compiled"


@dataclass(frozen=True)
class Contender:
    """A way to compute a case.

    Attributes:
        label: its name in the tables.
        function: from stored logits to results.
        rival: which of dflkern's contenders does the same work.
    """

    label: str
    function: Function
    rival: str = OURS

    @property
    def mean(self) -> bool:
        """Whether its result is the mean over the four sides."""
        return OURS_MEAN in (self.label, self.rival)


def own(case: Case, inputs: Inputs) -> list[Contender]:
    """dflkern, and where Ultralytics' class ends in a mean, dflkern with that mean."""
    function, target, dim = getattr(dflkern, f"dfl_{case.op}"), inputs.target, case.dim

    def decode(leaf: Tensor) -> Any:
        return function(case.view(leaf), dim=dim)

    def loss(leaf: Tensor) -> Any:
        return function(case.view(leaf), target, dim=dim, margin=MARGIN)

    found = [Contender(OURS, decode if target is None else loss)]
    if _is_dfloss(case):
        mean = functools.partial(function, target=target, margin=MARGIN, reduction="side_mean")
        found.append(Contender(OURS_MEAN, mean))
    return found


def peers(case: Case, inputs: Inputs, compiled: bool) -> list[Contender]:
    """Everyone else; with `compiled`, each of them under torch.compile too."""
    logits, target, dim = case.view(inputs.leaf), inputs.target, case.dim
    bins = torch.arange(case.bins, dtype=torch.float32, device=logits.device)
    along = bins.view([-1 if axis == dim else 1 for axis in range(logits.ndim)])
    weights = bins.to(logits.dtype)  # a matrix product wants one dtype

    spellings: dict[str, Callable[[Tensor], Outputs]]
    if target is None:
        spellings = {
            "weighted sum": lambda z: weighted_sum(z, along, dim),
            "matmul": lambda z: matmul(z, weights, dim),
        }
    else:
        spellings = {
            "two cross_entropy": lambda z: two_cross_entropy(z, target, dim),
            "log_softmax, two gathers": lambda z: log_softmax_gathers(z, target, dim),
            "hat": lambda z: hat(z, target, along, dim),
        }
        if case.op == "loss_and_decode":
            decode = functools.partial(matmul, weights=weights, dim=dim)
            spellings = {name: _with(loss, decode) for name, loss in spellings.items()}
    found = [Contender(name, _of_view(case, spelling)) for name, spelling in spellings.items()]
    found += _ultralytics(case, inputs)
    if compiled:
        found += [
            Contender(
                peer.label + COMPILED,
                torch.compile(peer.function, fullgraph=True, dynamic=False),
                peer.rival,
            )
            for peer in found
        ]
    return found


def two_cross_entropy(z: Tensor, t: Tensor, dim: int) -> Tensor:
    """(1 − y) · CE(z, l) + y · CE(z, l + 1)."""
    left, y = _bin_and_weight(t, z.shape[dim])
    rows, index = z.flatten(0, dim - 1), left.flatten(0, dim - 1)  # the bins become axis 1
    at_left = F.cross_entropy(rows, index, reduction="none").view(t.shape)
    at_right = F.cross_entropy(rows, index + 1, reduction="none").view(t.shape)
    return at_left * (1 - y) + at_right * y


def log_softmax_gathers(z: Tensor, t: Tensor, dim: int) -> Tensor:
    """−(1 − y) · log p_l − y · log p_{l + 1}."""
    left, y = _bin_and_weight(t, z.shape[dim])
    log_p, index = z.log_softmax(dim), left.unsqueeze(dim)
    at_left = log_p.gather(dim, index).squeeze(dim)
    at_right = log_p.gather(dim, index + 1).squeeze(dim)
    return -(at_left * (1 - y) + at_right * y)


def hat(z: Tensor, t: Tensor, along: Tensor, dim: int) -> Tensor:
    """−Σ_k max(0, 1 − |t − k|) · log p_k."""
    t = t.clamp(0, z.shape[dim] - 1 - MARGIN)
    y = (1 - (t.unsqueeze(dim) - along).abs()).clamp(min=0)
    return -(y * z.log_softmax(dim)).sum(dim)


def weighted_sum(z: Tensor, along: Tensor, dim: int) -> Tensor:
    """Σ_k p_k W_k."""
    return (z.softmax(dim) * along).sum(dim)


def matmul(z: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Σ_k p_k W_k as a matrix product."""
    return z.softmax(dim).movedim(dim, -1) @ weights


def ultralytics_class(module: str, name: str) -> Any:
    """A class of Ultralytics; None if that is not installed."""
    with contextlib.suppress(ImportError, AttributeError):
        return getattr(importlib.import_module(f"ultralytics.{module}"), name)
    return None


def _ultralytics(case: Case, inputs: Inputs) -> list[Contender]:
    if case.op == "decode" and case.layout == "columns":
        dfl = ultralytics_class("nn.modules.block", "DFL")
        if dfl is None:
            return []
        module = dfl(case.bins).to(inputs.leaf.device, inputs.leaf.dtype)
        return [Contender(ULTRALYTICS_DECODE, lambda leaf: module(leaf))]
    if _is_dfloss(case) and inputs.target is not None:
        dfloss = ultralytics_class("utils.loss", "DFLoss")
        if dfloss is None:
            return []
        loss, target = dfloss(case.bins), inputs.target.clone()  # it clamps its target in place
        return [
            Contender(
                ULTRALYTICS_LOSS, lambda leaf: loss(leaf.view(-1, case.bins), target), OURS_MEAN
            )
        ]
    return []


def _is_dfloss(case: Case) -> bool:
    return case.op == "loss" and case.layout == "rows"


def _bin_and_weight(t: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    t = t.clamp(0, num_bins - 1 - MARGIN)
    left = t.long()
    return left, t - left


def _with(loss: Function, decode: Function) -> Function:
    return lambda z: (_tensor(loss(z)), _tensor(decode(z)))


def _of_view(case: Case, spelling: Function) -> Function:
    return lambda leaf: spelling(case.view(leaf))


def _tensor(outputs: Outputs) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"one tensor was expected, not {len(outputs)}")
    return outputs
