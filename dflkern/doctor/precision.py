"""What half precision costs: the clamp, the decode and the anchor points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.distributions import dfl_decode, positions
from .evidence import Evidence
from .findings import Finding, Severity
from .words import number, percent

HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}
PIXELS_THAT_MATTER = 0.5
CELLS_THAT_MATTER = 0.05  # where no stride is known


def clamp(evidence: Evidence) -> Iterator[Finding]:
    """`half-clamp`: the bound of the clamp, rounded up to the last bin."""
    given = evidence.given
    if given is None or given.dtype not in HALF or evidence.bound < evidence.last:
        return
    if not evidence.margin:
        return  # a bound at the last bin was asked for
    name = HALF[given.dtype]
    at = given.double() >= evidence.last
    share = float(at.double().mean()) if at.numel() else 0.0
    yield Finding(
        "half-clamp",
        Severity.ERROR if share else Severity.NOTE,
        f"In {name} the bound {evidence.last - evidence.margin:g} of the clamp is rounded up to "
        f"{evidence.bound:g}, the last bin; {percent(share)} of the targets are there.",
        f"torch.tensor({evidence.last - evidence.margin:g}, dtype=torch.{name_of(given.dtype)}) "
        f"is {evidence.bound:g}; the bin to its right would be {evidence.bound + 1:g}, and there "
        "is none",
        f"Targets were computed in {name}. Losses that look up both bins read one beyond the end "
        "(IndexError, or a device-side assert on CUDA); dflkern clamps again in fp32.",
        "targets = dflkern.dfl_targets(boxes.float(), anchor_points.float(), stride, "
        f"{evidence.num_bins})",
        share,
    )


def decode(evidence: Evidence) -> Iterator[Finding]:
    """`half-decode`: how far boxes move if the expectation is taken in the logits' dtype."""
    logits = evidence.logits
    if logits is None or logits.dtype not in HALF or not logits.numel():
        return
    wide = logits.float()
    project = None if evidence.project is None else evidence.project.float()
    w = positions(project, wide, -1)
    if len(w) != wide.shape[-1]:
        return
    exact = dfl_decode(wide, project, wide.ndim - 1)
    # As under autocast: softmax in fp32, its result rounded, the product taken in half.
    half = wide.softmax(-1).to(logits.dtype).float()
    rounded = (half * w.to(logits.dtype).float()).sum(-1).to(logits.dtype).float()
    error = (rounded - exact).abs().nan_to_num()
    pixels = _in_pixels(evidence, error)
    worst = int(error.argmax())
    size = float(error.max()) if pixels is None else float(pixels.max())
    unit = "cells" if pixels is None else "pixels"
    limit = CELLS_THAT_MATTER if pixels is None else PIXELS_THAT_MATTER
    mean = float(error.mean() if pixels is None else pixels.mean())
    name = HALF[logits.dtype]
    yield Finding(
        "half-decode",
        Severity.WARNING if size >= limit else Severity.NOTE,
        f"Decoded in {name}, sides would be off by up to {number(size)} {unit}, "
        f"{number(mean)} on average.",
        f"a side at {float(exact.flatten()[worst]):.4f} cells decodes to "
        f"{float(rounded.flatten()[worst]):.4f}",
        f"Under autocast the probabilities are rounded to {name} before they are multiplied "
        "with the bins' positions.",
        "distances = dflkern.dfl_decode(logits)  # fp32 inside, whatever the dtype",
    )


def _in_pixels(evidence: Evidence, error: Tensor) -> Tensor | None:
    """The error times its stride; None without one."""
    if evidence.stride is None:
        return None
    if len(evidence.stride) == len(error):
        return error * evidence.stride.reshape(-1, *[1] * (error.ndim - 1))
    return error * float(evidence.stride.max())


def anchors(evidence: Evidence) -> Iterator[Finding]:
    """`half-anchors`: anchor points that their dtype, now or before, could not tell apart."""
    points = evidence.raw_anchor_points
    if points is None or not points.numel():
        return
    values = points.double().flatten()
    values = values[values.isfinite()]
    if not values.numel():
        return
    largest = float(values.max())
    if points.dtype in HALF:
        # The step between neighbouring numbers at the largest coordinate.
        step = 2.0 ** (torch.tensor(largest).clamp(min=1e-6).log2().floor().item()) * (
            torch.finfo(points.dtype).eps
        )
        if step <= 0.5:
            return
        name = HALF[points.dtype]
    else:
        # Cell centres end in .5; those that went through bf16 no longer do beyond 128.
        fraction = values.remainder(1)
        far = values >= 128
        if not (far.any() and (fraction[~far] == 0.5).all() and (fraction[far] == 0).all()):
            return
        if not bool((~far).any()):
            return
        step, name = 1.0, "bf16"
    limit = 128.0 if name == "bf16" else 1024.0
    share = float((values >= limit).double().mean())
    stride = None if evidence.stride is None else float(evidence.stride.min())
    off = "half a cell" if stride is None else f"half a cell, {number(stride / 2)} pixels"
    yield Finding(
        "half-anchors",
        Severity.ERROR,
        f"{percent(share)} of the anchor coordinates are off by {off} or more: {name} cannot "
        f"tell cells apart beyond column {limit:.0f}.",
        f"the largest is {number(largest)}, and its neighbours are {number(step)} apart; "
        f"{limit + 0.5:g} becomes {limit:g} in {name}",
        f"Anchor points were made in the dtype of the features, {name} under autocast.",
        "anchor_points, stride = dflkern.make_anchors(sizes, strides)  # always fp32",
        share,
    )


def name_of(dtype: torch.dtype) -> str:
    """The dtype without its module: bfloat16."""
    return str(dtype).removeprefix("torch.")
