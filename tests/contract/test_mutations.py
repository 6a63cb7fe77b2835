"""Faults put into a correct kernel, each of which the suite's comparison must reject.

The kernel here is a plain transcription in NumPy-like PyTorch, with a switch for every way in which
a DFL kernel is known to go wrong. Unswitched it must pass; this is what gives the budget its teeth.
"""

import pytest
import torch

from support import assert_within_budget, logits_of, run, targets_for, truth, upstream_for

FAULTS = (
    "swapped weights",
    "no maximum",
    "stored log-sum-exp",
    "off-by-one clamp",
    "margin forgotten",
    "off-by-one bin",
    "ignored stride",
    "ignored upstream gradient",
    "upstream gradient of the wrong result",
    "int32 offset",
    "tail unwritten",
    "mutated target",
    "swallowed NaN target",
    "swallowed NaN logit",
    "half-precision accumulation",
    "gradient without its target",
    "gradient twice",
    "expectation of the wrong positions",
)


def kernel(logits, target, grads, fault=None):
    """Loss, expected position and gradient of logits (N, K), with one fault or none."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_bins = logits.shape[1]
    z = logits.to(dtype)
    if fault == "ignored stride":
        z = torch.as_strided(logits, logits.shape, (num_bins, 1)).to(dtype)
    if fault == "int32 offset":  # a wrapped offset reads another row
        z = z.roll(1, 0)
    if fault == "swallowed NaN logit":
        z = z.nan_to_num(0.0)
    if fault == "half-precision accumulation":
        z = z.half().to(dtype)
    upper = num_bins - 1 - 0.01
    upper = {"off-by-one clamp": upper - 1, "margin forgotten": num_bins - 1.0}.get(fault, upper)
    t = target.to(dtype)
    if fault == "mutated target":
        t = target.clamp_(0, upper)
    if fault == "swallowed NaN target":
        t = t.nan_to_num(0.0)
    t = t.clamp(0, upper)
    m = 0.0 if fault == "no maximum" else z.amax(1, keepdim=True)
    e = (z - m).exp()
    s = e.sum(1)
    k = torch.arange(num_bins, dtype=dtype)
    if fault == "expectation of the wrong positions":
        k = k + 1
    left = t.to(torch.int64).clamp(0, num_bins - 2)
    if fault == "off-by-one bin":
        left = (left + 1).clamp(max=num_bins - 2)
    right_weight = t - left
    if fault == "swapped weights":
        right_weight = 1 - right_weight
    y = torch.zeros_like(z) + (right_weight * 0)[:, None]
    y.scatter_(1, left[:, None], 1 - right_weight[:, None])
    y.scatter_(1, left[:, None] + 1, right_weight[:, None])
    x = z - m
    if fault == "stored log-sum-exp":
        x, s_log = z, s.log() + m.squeeze(1)
    else:
        s_log = s.log()
    loss = s_log - torch.where(y == 0, 0, y * x).sum(1)
    position = (e * k).sum(1) / s
    p = e / s[:, None]
    grad_loss, grad_position = (g.to(dtype) for g in grads)
    if fault == "ignored upstream gradient":
        grad_loss = torch.ones_like(grad_loss)
    if fault == "upstream gradient of the wrong result":
        grad_loss, grad_position = grad_position, grad_loss
    wanted = 0 if fault == "gradient without its target" else y
    gradient = grad_loss[:, None] * (p - wanted)
    gradient = gradient + grad_position[:, None] * p * (k - position[:, None])
    if fault == "gradient twice":
        gradient = gradient * 2
    gradient = gradient.to(logits.dtype)
    if fault == "tail unwritten":
        gradient[-1] = float("nan")
    return [loss, position], gradient


def problems():
    """Ordinary logits, strided ones, large ones, and ones with NaN."""
    for layout, dtype, scale in (
        ("rows", torch.float32, 3.0), ("strided", torch.float32, 3.0),
        ("rows", torch.float32, 300.0), ("rows", torch.bfloat16, 3.0),
    ):  # fmt: skip
        logits, dim = logits_of(layout, 16, dtype, scale=scale)
        yield logits, targets_for(logits, dim)
    logits, dim = logits_of("rows", 17, torch.float32)
    target = targets_for(logits, dim)
    logits[3, 5], target[7] = float("nan"), float("nan")
    yield logits, target
    shifted, _ = logits_of("rows", 16, torch.float32)
    yield shifted + 1e4, targets_for(shifted, 1)


def verdicts(fault):
    """For each problem, whether the comparison and the check of the inputs accept the kernel."""
    accepted = []
    for logits, target in problems():
        before = target.clone()
        exact = truth("both", logits, target, 1)
        peer = run("both", logits, target, 1)
        actual = kernel(logits, target, upstream_for(exact[0]), fault)
        try:
            assert_within_budget(actual, peer, exact)
            accepted.append(torch.equal(before.nan_to_num(7), target.nan_to_num(7)))
        except AssertionError:
            accepted.append(False)
    return accepted


def test_the_faultless_kernel_is_accepted():
    assert all(verdicts(None))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_rejected(fault):
    assert not all(verdicts(fault))
