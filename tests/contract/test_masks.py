"""A foreground mask means "nonzero": a bool tensor can hold any byte, such as a view of uint8."""

import pytest
import torch

import dflkern


def losses(foreground, device, dim=-1):
    """Both losses of random boxes with this mask, and the gradient of the logits."""
    generator = torch.Generator().manual_seed(1)
    batch, anchors = foreground.shape
    logits = torch.randn(batch, anchors, 4, 16, generator=generator)
    if dim == 2:
        logits = logits.permute(0, 2, 3, 1).contiguous()
    points = torch.rand(anchors, 2, generator=generator) * 10
    boxes = torch.cat((points - 2, points + 3), -1).expand(batch, -1, -1)
    weight = torch.rand(batch, anchors, generator=generator) + 0.1
    leaf, *others = (t.to(device) for t in (logits, points, boxes, weight, foreground))
    leaf.requires_grad_()
    pair = dflkern.box_loss(leaf, *others[:3], 3.0, foreground=others[3], dim=dim)
    return *pair, *torch.autograd.grad(sum(pair), leaf)


def as_mask(values):
    return torch.tensor(values, dtype=torch.uint8).view(torch.bool)


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_nonzero_byte_is_foreground(backend, device, byte, dim):
    odd = torch.full((2, 67), byte, dtype=torch.uint8).view(torch.bool)
    for actual, expected in zip(
        losses(odd, device, dim),
        losses(torch.ones(2, 67, dtype=torch.bool), device, dim),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_each_anchor_counts_once_whatever_its_bits(backend, device):
    """All 256 bytes, in groups of eight, which the CPU kernel reads as one word."""
    byte = torch.arange(512) * 37 % 256
    odd, plain = as_mask(byte.tolist())[None], (byte != 0)[None]
    for actual, expected in zip(losses(odd, device), losses(plain, device), strict=True):
        assert torch.equal(actual, expected)


def test_a_strided_mask_of_odd_bytes(backend, device):
    byte = torch.arange(2 * 70 * 3).view(2, 70, 3) * 91 % 256
    odd = byte.to(torch.uint8).view(torch.bool)[..., 1]
    for actual, expected in zip(
        losses(odd, device), losses(byte[..., 1] != 0, device), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("candidates", [[-1, 2], [2, 2], [3, 1], [0, 8]])
def test_the_cpu_backward_refuses_indices_that_are_no_anchors(candidates):
    logits, points = torch.randn(1, 8, 4, 16), torch.rand(8, 2)
    one = torch.ones(())
    dflkern.box_loss(logits, points, torch.rand(1, 8, 4), torch.ones(1, 8), 1.0)
    with pytest.raises(RuntimeError, match="ascending indices of anchors"):
        torch.ops.dflkern._cpu_box_loss_backward_kept(
            one, one, logits, points, torch.tensor(candidates), torch.ones(2, 5), one, None, 3,
            0.01, "ciou", "sum",
        )  # fmt: skip
