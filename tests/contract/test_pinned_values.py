"""Values that were computed by hand, on every backend."""

import pytest
import torch

import dflkern

LOGITS = [
    -9.6771, -14.3445, -2.0779, 2.3168, 11.0486, 5.1030, 12.7565, 11.8883, 9.3741, -3.8249, -9.6758,
    -8.6363, 6.8299, -1.3159, 3.2808, 8.3574,
]  # fmt: skip


def close(value, expected, abs=2e-5):
    assert value.item() == pytest.approx(expected, abs=abs)


def test_a_distribution_of_two_humps(backend, device):
    logits = torch.tensor(LOGITS, device=device)
    close(dflkern.dfl_decode(logits), 6.15257)
    for target, expected in ((6.1526, 0.63354), (4.0, 2.20895), (20.0, 4.95092)):
        close(dflkern.dfl_loss(logits, torch.tensor(target, device=device)), expected)


def test_logits_that_are_all_minus_a_thousand_are_uniform(backend, device):
    logits = torch.full((16,), -1000.0, device=device)
    close(dflkern.dfl_decode(logits), 7.5)
    close(dflkern.dfl_loss(logits, torch.tensor(3.0, device=device)), 2.7726, abs=5e-5)


def test_a_wide_project_cancels(backend, device):
    positions = torch.tensor([6e4, -6e4] * 8, device=device)  # a tensor's order is not checked
    assert dflkern.dfl_decode(torch.zeros(16, device=device), project=positions).item() == 0


def test_a_bf16_target_at_the_last_bin(backend, device):
    target = torch.tensor(15.0, dtype=torch.bfloat16, device=device)
    close(dflkern.dfl_loss(torch.zeros(16, device=device), target), 2.7726, abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "kind", "expected"),
    [
        ((0, 0, 4, 4), (1, 2, 3, 2), "ciou", -0.0500),
        ((2, 2, 2, 2), (2, 2, 2, 2), "ciou", 0.0),
        ((0, 0, 4, 4), (1, 1, 5, 5), "iou", 0.3913),
        ((0, 0, 4, 4), (1, 1, 5, 5), "giou", 0.3113),
        ((0, 0, 4, 4), (1, 1, 5, 5), "diou", 0.3513),
        ((0, 0, 4, 4), (1, 1, 5, 5), "ciou", 0.3513),
    ],
)
def test_the_iou_of_two_boxes(backend, device, first, second, kind, expected):
    """By paired_box_iou, and from box_loss of sharp distributions that decode to the first box."""
    a, b = (torch.tensor([box], dtype=torch.float32, device=device) for box in (first, second))
    close(dflkern.paired_box_iou(a, b, kind), expected, abs=5e-5)
    point = torch.tensor([[2.0, 2.0]], device=device)
    logits = torch.full((1, 1, 4, 8), -100.0, device=device)
    logits.scatter_(-1, dflkern.bbox2dist(point, a).long()[None, ..., None], 100.0)
    loss, _ = dflkern.box_loss(
        logits, point, b[None], torch.ones(1, 1, device=device), 1.0, iou=kind
    )
    close(1 - loss, expected, abs=5e-5)


def test_all_foreground_without_weight_or_normalizer(backend, device):
    logits = torch.randn(2, 3, 4, 16, device=device, requires_grad=True)
    losses = dflkern.box_loss(
        logits, torch.rand(3, 2, device=device), torch.rand(2, 3, 4, device=device),
        torch.zeros(2, 3, device=device), 0.0,
        foreground=torch.ones(2, 3, dtype=torch.bool, device=device),
    )  # fmt: skip
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert not logits.grad.any()


def test_more_elements_than_int32_counts():
    """2³¹ + 64 logits that share memory equal a copy of their distinct rows, bit for bit."""
    rows = 2**27 + 4
    logits = torch.randn(16).as_strided((rows, 16), (0, 1))
    with dflkern.use_backend("cpu"):
        position = dflkern.dfl_decode(logits)
        assert torch.equal(position[-9:], dflkern.dfl_decode(logits[:9].contiguous()))
        assert (position == position[0]).all()
