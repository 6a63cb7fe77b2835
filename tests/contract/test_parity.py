"""Every backend against the reference and float64, by an error budget."""

import pytest
import torch

import dflkern
from support import (
    BINS,
    DTYPES,
    LAYOUTS,
    OPS,
    assert_within_budget,
    logits_of,
    positions_for,
    run,
    targets_for,
    truth,
)


def check(op, logits, target, dim, project=None, margin=0.01, upstream=None):
    actual = run(op, logits, target, dim, project, margin, upstream)
    with dflkern.use_backend("reference"):
        peer = run(op, logits, target, dim, project, margin, upstream)
    assert_within_budget(actual, peer, truth(op, logits, target, dim, project, margin, upstream))
    assert actual[1].stride() == torch.empty_like(logits).stride()
    assert all(result.is_contiguous() for result in actual[0])


@pytest.mark.parametrize("num_bins", BINS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bins_and_dtypes(backend, device, poisoned, layout, dtype, num_bins):
    logits, dim = logits_of(layout, num_bins, dtype, device)
    check("both", logits, targets_for(logits, dim), dim)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_bins", [16, 17])
def test_layouts(backend, device, poisoned, layout, num_bins, op):
    logits, dim = logits_of(layout, num_bins, torch.float32, device)
    check(op, logits, targets_for(logits, dim), dim)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("layout", "num_bins"), [("rows", 33), ("columns", 17), ("rows", 91)])
@pytest.mark.parametrize("kind", ["floats", "tensor"])
def test_project(backend, device, poisoned, layout, num_bins, kind, op):
    logits, dim = logits_of(layout, num_bins, torch.float32, device)
    positions = positions_for(num_bins)
    target = targets_for(logits, dim, positions[0] - 1, positions[-1] + 1)
    if kind == "tensor":
        positions = torch.tensor(positions, device=device)
    check(op, logits, target, dim, positions)


@pytest.mark.parametrize("num_bins", [2, 3, 64, 65, 256])
def test_extreme_numbers_of_bins(backend, device, poisoned, num_bins):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, num_bins, torch.float32, device)
        check("both", logits, targets_for(logits, dim), dim)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 127, 128, 129, 131])
@pytest.mark.parametrize("num_bins", [16, 17])
def test_counts_around_a_tile(backend, device, poisoned, count, num_bins):
    logits = torch.randn(count, num_bins, device=device)
    check("both", logits, targets_for(logits, 1), 1)


@pytest.mark.parametrize("margin", [0, 1e-9, 0.1, 0.5])
def test_margins(backend, device, margin):
    logits, dim = logits_of("rows", 16, torch.float32, device)
    check("loss", logits, targets_for(logits, dim), dim, margin=margin)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_target_dtypes(backend, device, target_dtype):
    logits, dim = logits_of("columns", 16, torch.float32, device)
    target = targets_for(logits, dim, dtype=target_dtype)
    actual = run("loss", logits, target, dim)
    assert actual[0][0].dtype == torch.float32
    assert_within_budget(actual, actual, truth("loss", logits, target.float(), dim))


def test_stride_zero_upstream_gradient(backend, device):
    logits, dim = logits_of("columns", 16, torch.float32, device)
    target = targets_for(logits, dim)
    one = torch.ones((), device=device).expand(target.shape)
    assert one.stride() == (0, 0, 0)
    check("loss", logits, target, dim, upstream=[one])
    leaf = logits.clone().requires_grad_()
    dflkern.dfl_loss(leaf, target, dim=dim).sum().backward()
    assert torch.equal(leaf.grad, run("loss", logits, target, dim, upstream=[one])[1])


def test_one_of_two_upstream_gradients(backend, device):
    logits, dim = logits_of("rows", 16, torch.float32, device)
    target = targets_for(logits, dim)
    target[3] = float("nan")
    for i, op in enumerate(("loss", "decode")):
        leaf = logits.clone().requires_grad_()
        result = dflkern.dfl_loss_and_decode(leaf, target, dim=dim)[i]
        result.sum().backward()
        one = [torch.ones_like(result)]
        assert torch.equal(
            leaf.grad.nan_to_num(7), run(op, logits, target, dim, upstream=one)[1].nan_to_num(7)
        )
        assert leaf.grad.isnan().any() == (op == "loss")


def test_large_logits_do_not_cancel(backend, device):
    logits = torch.zeros(1, 16, device=device)
    logits[0, 3:5] = 1e4
    loss = dflkern.dfl_loss(logits, torch.tensor([3.5], device=device))
    assert loss.item() == pytest.approx(0.69314718, abs=1e-7)
    huge = torch.tensor([[1e38, -1e38, 3.0, 1e38]], device=device)
    assert dflkern.dfl_decode(huge).item() == pytest.approx(1.5)
