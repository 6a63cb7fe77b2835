"""What must hold for any logits and targets, whatever the kernel."""

import pytest
import torch
import torch.nn.functional as F

import dflkern
from support import logits_of, positions_for, run, targets_for


def two_cross_entropies(logits, target, margin=0.01):
    """DFL as the detectors first spelled it, for logits (N, K) and targets (N,)."""
    target = target.clamp(0, logits.shape[1] - 1 - margin)
    left = target.long()
    right_weight = target - left
    return (
        F.cross_entropy(logits, left, reduction="none") * (1 - right_weight)
        + F.cross_entropy(logits, left + 1, reduction="none") * right_weight
    )


def eager_rows(num_bins, count=50, device="cpu"):
    logits = torch.randn(count, num_bins, dtype=torch.float64, device=device) * 3
    return logits, torch.rand(count, dtype=torch.float64, device=device) * (num_bins + 1) - 1


@pytest.mark.parametrize("num_bins", [8, 16, 17, 33])
def test_equals_two_cross_entropies_and_softmax_sum(backend, device, num_bins):
    logits, target = eager_rows(num_bins, device=device)
    leaf = logits.requires_grad_()
    results = dflkern.dfl_loss_and_decode(leaf, target)
    positions = torch.arange(num_bins, dtype=torch.float64, device=device)
    expected = two_cross_entropies(leaf, target), leaf.softmax(1) @ positions
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
        g = torch.randn_like(wanted)
        (gradient,) = torch.autograd.grad(actual, leaf, g, retain_graph=True)
        (wanted_gradient,) = torch.autograd.grad(wanted, leaf, g)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-12)


def test_shift_invariance(backend, device):
    logits, target = eager_rows(16, device=device)
    shift = torch.randn(50, 1, dtype=torch.float64, device=device) * 10
    (loss, position), gradient = run("both", logits, target, 1)
    (loss2, position2), gradient2 = run("both", logits + shift, target, 1)
    for a, b in ((loss, loss2), (position, position2), (gradient, gradient2)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", ["loss", "decode", "both"])
def test_gradient_of_a_distribution_sums_to_zero(backend, device, op):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, 17, torch.float64, device)
        _, gradient = run(op, logits, targets_for(logits, dim), dim)
        assert gradient.sum(dim).abs().max() < 1e-12


def test_gradient_is_linear_in_the_upstream_gradient(backend, device):
    logits, target = eager_rows(16, device=device)
    g, h = (torch.randn(50, dtype=torch.float64, device=device) for _ in range(2))
    gradients = [run("loss", logits, target, 1, upstream=[u])[1] for u in (g, h, 2 * g - 3 * h)]
    torch.testing.assert_close(2 * gradients[0] - 3 * gradients[1], gradients[2])


def test_flip_symmetry(backend, device):
    logits, target = eager_rows(16, device=device)
    target = target.clamp(0, 14.5)
    (loss, position), _ = run("both", logits, target, 1, margin=0)
    (loss2, position2), _ = run("both", logits.flip(1), 15 - target, 1, margin=0)
    torch.testing.assert_close(loss, loss2)
    torch.testing.assert_close(position, 15 - position2)


def test_integer_target_is_cross_entropy(backend, device):
    logits = torch.randn(15, 16, dtype=torch.float64, device=device)
    target = torch.arange(15, device=device)
    loss = dflkern.dfl_loss(logits, target.double())
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    last = dflkern.dfl_loss(logits[:1], torch.full((1,), 15.0, device=device), margin=0)
    torch.testing.assert_close(last, -logits[:1].log_softmax(1)[:, 15])


def test_loss_mixes_its_neighbours_linearly(backend, device):
    logits, _ = eager_rows(16, device=device)
    left = torch.full((50,), 6.0, device=device)
    ends = [dflkern.dfl_loss(logits, left + k) for k in (0, 1)]
    between = dflkern.dfl_loss(logits, left + 0.3)
    torch.testing.assert_close(between, 0.7 * ends[0] + 0.3 * ends[1], rtol=1e-6, atol=1e-6)


def test_entropy_is_the_floor(backend, device):
    fraction = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75], dtype=torch.float64, device=device)
    y = torch.stack((1 - fraction, fraction), 1)
    floor = -torch.xlogy(y, y).sum(1)
    perfect = torch.full((5, 16), -1e4, dtype=torch.float64, device=device)
    perfect[:, 3:5] = y.log().clamp(min=-1e4)
    loss = dflkern.dfl_loss(perfect, 3 + fraction)
    torch.testing.assert_close(loss, floor, atol=1e-9, rtol=0)
    assert floor[3].item() == pytest.approx(0.693147, abs=1e-6)
    worse = dflkern.dfl_loss(perfect + torch.randn_like(perfect), 3 + fraction)
    assert (worse >= floor - 1e-9).all()


def test_one_hot_and_uniform_decode(backend, device):
    hot = torch.eye(16, device=device) * 200
    assert dflkern.dfl_decode(hot).tolist() == pytest.approx(list(range(16)), abs=1e-6)
    positions = positions_for(16)
    decoded = dflkern.dfl_decode(hot, project=positions)
    assert decoded.tolist() == pytest.approx(positions, abs=1e-5)


def test_default_positions_given_as_floats_change_nothing(backend, device):
    logits, _ = logits_of("rows", 16, torch.float32, device)
    assert torch.equal(
        dflkern.dfl_decode(logits, project=list(range(16))), dflkern.dfl_decode(logits)
    )


COMPILED = [("rows", 16), ("rows", 17), ("rows", 91), ("columns", 16), ("columns", 91)]


@pytest.mark.parametrize(("layout", "num_bins"), COMPILED)
@pytest.mark.parametrize("project", [None, "positions"])
def test_bits_do_not_depend_on_the_neighbours(kernels, device, layout, num_bins, project):
    """Within one compiled kernel: row permutation and batch split give the same bits."""
    project = positions_for(num_bins) if project else None
    logits, dim = logits_of("rows", num_bins, torch.float32, device)
    target = targets_for(logits, dim)
    upstream = [torch.randn(41, device=device) for _ in range(2)]
    order = torch.randperm(41)

    def bits(rows, t, g):
        z, axis = (rows, 1) if layout == "rows" else (rows.t().contiguous(), 0)
        (loss, position), gradient = run("both", z, t, axis, project, upstream=g)
        return loss, position, gradient.movedim(axis, -1)

    whole = bits(logits, target, upstream)
    shuffled = bits(logits[order], target[order], [g[order] for g in upstream])
    for a, b in zip(whole, shuffled, strict=True):
        assert torch.equal(a[order], b)
    first, second = (
        bits(logits[part].clone(), target[part], [g[part] for g in upstream])
        for part in (slice(0, 20), slice(20, 41))
    )
    for a, b, c in zip(whole, first, second, strict=True):
        assert torch.equal(a, torch.cat((b, c)))


@pytest.mark.parametrize("step", [1, 2])
def test_bits_do_not_depend_on_padding_and_offset(kernels, device, step):
    """Rows with gaps and misaligned rows are served by one kernel; so are rows of spaced bins."""
    values = torch.randn(19, 16, device=device)
    target = torch.rand(19, device=device) * 15
    results = []
    for offset, width, first in ((5, 36, 2), (1, 40, 3), (0, 32, 0)):
        storage = torch.zeros(19 * width + offset, device=device)
        view = storage[offset:].view(19, width)[:, first : first + 16 * step : step]
        view.copy_(values)
        results.append(run("both", view, target, 1))
    for (loss, position), gradient in results[1:]:
        assert torch.equal(loss, results[0][0][0])
        assert torch.equal(position, results[0][0][1])
        assert torch.equal(gradient, results[0][1])


def test_same_bits_twice(kernels, device):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, 17, torch.bfloat16, device)
        target = targets_for(logits, dim)
        (first, gradient), (second, gradient2) = (run("both", logits, target, dim) for _ in "ab")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(gradient, gradient2)
