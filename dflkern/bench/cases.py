"""What is measured: the cases, their inputs, and the least bytes that each must move."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward", "both")
BYTE_MODEL = (
    "least bytes per distribution, with K bins of s bytes each, targets and results of 4 bytes: "
    "forward reads K·s, and 4 for the target of a loss, and writes 4 per result; backward reads "
    "K·s, 4 for the target and 4 per upstream gradient, and writes K·s; both is their sum"
)
RESULTS = {"loss": 1, "decode": 1, "loss_and_decode": 2}


@dataclass(frozen=True)
class Case:
    """One operator on logits of one shape, layout and dtype.

    Attributes:
        op: "loss", "decode" or "loss_and_decode", of dflkern's functions dfl_….
        layout: "rows" has logits (N, 4, K) or (B, A, 4, K), "columns" a head's (B, 4K, A).
        shape: of the logits as they are stored.
        dtype: a key of DTYPES.
        regime: "call", "middle" or "bandwidth", by what bounds the time on a CPU.
        quick: whether `--quick` keeps it.
    """

    op: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    regime: str
    quick: bool = False

    @property
    def name(self) -> str:
        """Such as decode-columns-16x64x8400-fp32."""
        return f"{self.op}-{self.layout}-{'x'.join(map(str, self.shape))}-{self.dtype}"

    @property
    def bins(self) -> int:
        """K."""
        return self.shape[-1] if self.layout == "rows" else self.shape[1] // 4

    @property
    def count(self) -> int:
        """How many distributions."""
        return math.prod(self.shape) // self.bins

    @property
    def dim(self) -> int:
        """The axis of the bins in `view` of the logits."""
        return len(self.shape) - 1 if self.layout == "rows" else 2

    @property
    def has_target(self) -> bool:
        """Whether a loss is part of it."""
        return self.op != "decode"

    def view(self, leaf: Tensor) -> Tensor:
        """The logits with the bins in an axis of their own."""
        if self.layout == "rows":
            return leaf
        batch, _, anchors = self.shape
        return leaf.view(batch, 4, self.bins, anchors)

    def traffic(self, direction: str) -> int:
        """The bytes of BYTE_MODEL, of all distributions, in one of PASSES."""
        results = 4 * RESULTS[self.op]
        target = 4 if self.has_target else 0
        logits = self.bins * DTYPES[self.dtype].itemsize
        forward = logits + target + results
        backward = logits + target + results + logits
        each = {"forward": forward, "backward": backward, "both": forward + backward}
        return self.count * each[direction]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: `leaf` are the logits as stored; `target` is None for decode."""

    leaf: Tensor
    target: Tensor | None


def make_inputs(case: Case, device: str) -> Inputs:
    """Random logits, and targets over all bins and a little beyond, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(case.shape, generator=generator) * 2
    target = None
    if case.has_target:
        shape = list(case.view(leaf).shape)
        del shape[case.dim]
        target = torch.rand(shape, generator=generator) * (case.bins - 0.5) - 0.25
        target = target.to(device)
    return Inputs(leaf.to(DTYPES[case.dtype]).to(device), target)


def _in_all(op: str, layout: str, shape: tuple[int, ...], regime: str) -> list[Case]:
    """A case in fp32, which `--quick` keeps, and its fellows of half the bytes."""
    return [Case(op, layout, shape, dtype, regime, quick=dtype == "fp32") for dtype in DTYPES]


CASES = (
    Case("loss", "rows", (64, 4, 16), "fp32", "call", quick=True),
    Case("loss", "rows", (1000, 4, 16), "fp32", "call", quick=True),
    Case("loss", "rows", (1000, 4, 16), "bf16", "call"),
    Case("decode", "rows", (64, 4, 16), "fp32", "call", quick=True),
    Case("decode", "rows", (1000, 4, 16), "fp32", "call"),
    Case("loss_and_decode", "rows", (1000, 4, 16), "fp32", "call"),
    Case("loss", "rows", (8000, 4, 16), "fp32", "middle"),
    *_in_all("decode", "columns", (1, 64, 8400), "middle"),
    Case("loss", "columns", (1, 64, 8400), "fp32", "middle"),
    Case("loss_and_decode", "rows", (8000, 4, 16), "fp32", "middle"),
    *_in_all("decode", "columns", (16, 64, 8400), "bandwidth"),
    Case("decode", "rows", (16, 8400, 4, 16), "fp32", "bandwidth"),
    *_in_all("loss", "rows", (64000, 4, 16), "bandwidth"),
    Case("loss", "rows", (64000, 4, 17), "fp32", "bandwidth"),
    Case("loss", "columns", (16, 64, 4000), "fp32", "bandwidth"),
    Case("loss_and_decode", "rows", (64000, 4, 16), "fp32", "bandwidth"),
)
STUDIES = ("calls", "dtypes", "threads", "boxes", "ultralytics")


def select(pattern: str | None, quick: bool) -> tuple[list[Case], list[str]]:
    """The cases and studies whose names a regular expression finds."""

    def wanted(name: str) -> bool:
        return pattern is None or re.search(pattern, name) is not None

    cases = [case for case in CASES if (case.quick or not quick) and wanted(case.name)]
    return cases, [name for name in STUDIES if wanted(name)]


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
