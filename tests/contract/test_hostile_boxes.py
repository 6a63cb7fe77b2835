"""What box_loss promises for any value, on every backend, the reference included."""

import math

import pytest
import torch

import dflkern

NAN = math.nan


def problem(dim, dtype, device, num_bins=8, batch=3):
    """Logits, anchor points, target boxes, weights, and a foreground of some 60 %."""
    logits = torch.randn(batch, 5, 4, num_bins)
    if dim == 2:
        logits = logits.permute(0, 2, 3, 1).contiguous()
    points = torch.tensor([[0.5, 0.5], [1.5, 0.5], [0.5, 1.5], [1.5, 1.5], [1.0, 1.0]])
    boxes = torch.tensor([-1.0, -1, 3, 3]) + torch.randn(batch, 5, 4) * 0.4
    weight, foreground = torch.rand(batch, 5) + 0.1, torch.rand(batch, 5) > 0.4
    foreground[:, 4] = False  # an anchor that is background in every image
    foreground[0, :3] = torch.tensor([True, False, True])
    weight[0, 2] = 0
    return (t.to(device) for t in (logits.to(dtype), points, boxes, weight, foreground))


def run(logits, points, boxes, weight, foreground, dim, **options):
    """Both losses and the gradient of their sum."""
    leaf = logits.detach().clone().requires_grad_()
    pair = dflkern.box_loss(
        leaf, points, boxes, weight, 2.0, dim=dim, foreground=foreground, **options
    )
    return *pair, *torch.autograd.grad(sum(pair), leaf)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, 1e20, -3e38])
@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_background_and_weightless_anchors_never_matter(backend, device, dim, dtype, value):
    logits, points, boxes, weight, foreground = problem(dim, dtype, device)
    expected = run(logits, points, boxes, weight, foreground, dim)
    matters = foreground & (weight != 0)
    boxes[~matters] = value
    weight[~foreground] = value
    points[4] = value
    rows = logits if dim == -1 else logits.permute(0, 3, 1, 2)
    rows[~matters] = value
    for actual, wanted in zip(
        run(logits, points, boxes, weight, foreground, dim), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", ["points", "boxes", "weight", "logits"])
def test_a_nan_in_the_foreground_is_not_hidden(backend, device, given):
    logits, points, boxes, weight, foreground = problem(-1, torch.float32, device)
    tensors = {"points": points[0], "boxes": boxes[0, 0], "weight": weight[0, :1]}
    tensors["logits"] = logits[0, 0, 0]
    tensors[given][0] = NAN
    iou_loss, dfl_loss, gradient = run(logits, points, boxes, weight, foreground, -1)
    assert iou_loss.isnan()
    assert dfl_loss.isnan()
    assert (gradient[~foreground] == 0).all()
    assert gradient[0, 0].isnan().any()


@pytest.mark.parametrize("normalizer", [0.0, NAN, math.inf, 3.0])
def test_no_foreground_gives_zero_whatever_the_normalizer(backend, device, normalizer):
    logits, points, boxes, weight, foreground = problem(2, torch.float32, device)
    leaf = logits.requires_grad_()
    for options in (
        {"foreground": torch.zeros_like(foreground), "weight": weight},
        {"weight": torch.zeros_like(weight)},
        {"foreground": torch.zeros_like(foreground), "weight": torch.full_like(weight, NAN)},
    ):
        losses = dflkern.box_loss(leaf, points, boxes, normalizer=normalizer, dim=2, **options)
        assert [x.item() for x in losses] == [0, 0]
        (gradient,) = torch.autograd.grad(sum(losses), leaf)
        assert not gradient.any()
    none = torch.zeros(0, 4, 8, 5, device=device, requires_grad=True)
    losses = dflkern.box_loss(none, points, boxes[:0], weight[:0], normalizer, dim=2)
    assert [x.item() for x in losses] == [0, 0]
    sum(losses).backward()


def test_boxes_without_area_have_finite_losses(backend, device):
    """Every side at the anchor point, predicted and wanted."""
    logits = torch.full((1, 2, 4, 8), -1e4, device=device)
    logits[..., 0] = 0
    points = torch.tensor([[3.0, 3.0], [1.0, 2.0]], device=device)
    boxes = points.repeat(1, 2)[None]
    weight = torch.ones(1, 2, device=device)
    for iou in ("iou", "giou", "diou", "ciou"):
        for value in run(logits, points, boxes, weight, None, -1, iou=iou):
            assert value.isfinite().all()


def test_background_does_not_matter_whatever_the_project(backend, device):
    """Equal positions have no two bins of a target, so every loss but 0 would be NaN."""
    logits, points, boxes, weight, foreground = problem(-1, torch.float32, device)
    positions = torch.zeros(8, device=device)
    losses = run(logits, points, boxes, weight, torch.zeros_like(foreground), -1, project=positions)
    assert not any(value.any() for value in losses)
