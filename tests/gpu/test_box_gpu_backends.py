"""decode_boxes and box_loss of the GPU backends, Triton interpreted here, against the reference."""

import pytest
import torch

import dflkern
from dflkern.operators.requests import requested
from support import positions_for

BATCH, ANCHORS = 2, 21
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def logits_of(layout, bins, dtype, device):
    """Logits, and the axis of their bins."""
    if layout == "rows":
        return (torch.randn(BATCH, ANCHORS, 4, bins) * 2).to(device, dtype), 3
    head = (torch.randn(BATCH, 4 * bins + 3, ANCHORS + 2) * 2).to(device, dtype)
    boxes = head[:, 1 : 1 + 4 * bins].view(BATCH, 4, bins, ANCHORS + 2)
    return boxes[..., :ANCHORS], 2


def check(function, logits, *args, **kwargs):
    """Results and gradient of the chosen backend and of the reference agree."""
    found = []
    for name in (requested(), "reference"):
        leaf = logits.detach().requires_grad_()
        with dflkern.use_backend(name):
            results = function(leaf, *args, **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(5)
        upstream = [torch.randn_like(result) for result in results]
        gradient = torch.autograd.grad(results, leaf, upstream)[0]
        assert gradient.stride() == torch.empty_like(logits).stride()
        found.append((*(result.detach() for result in results), gradient))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        scale = float(expected.double().nan_to_num().abs().max())
        close = TOLERANCE[logits.dtype] * max(scale, 1e-3)
        torch.testing.assert_close(actual, expected, rtol=0, atol=close, equal_nan=True)
    return found[0]


def step_of(bins, device):
    points = torch.rand(ANCHORS, 2) * 20
    spread = torch.rand(2, BATCH, ANCHORS, 2) * bins
    boxes = torch.cat((points - spread[0], points + spread[1]), -1)
    foreground = torch.rand(BATCH, ANCHORS) < 0.4
    return points.to(device), boxes.to(device), foreground.to(device)


@pytest.mark.parametrize(
    ("layout", "bins", "dtype", "box_format", "project"),
    [
        ("rows", 16, torch.float32, "xyxy", False),
        ("rows", 16, torch.float16, "cxcywh", False),
        ("rows", 17, torch.bfloat16, "xyxy", True),
        ("columns", 16, torch.float32, "cxcywh", True),
        ("columns", 70, torch.float64, "xyxy", False),
    ],
)
def test_decode_boxes(gpu_kernels, device, poisoned, layout, bins, dtype, box_format, project):
    logits, dim = logits_of(layout, bins, dtype, device)
    points, _, _ = step_of(bins, device)
    stride = (torch.rand(ANCHORS, 1) * 8 + 1).to(device)
    positions = positions_for(bins) if project else None
    for given in (None, stride):
        check(dflkern.decode_boxes, logits, points, given, dim=dim, project=positions,
              box_format=box_format)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "bins", "dtype", "iou", "project"),
    [
        ("rows", 16, torch.float32, "ciou", False),
        ("rows", 16, torch.float16, "giou", False),
        ("rows", 17, torch.bfloat16, "iou", True),
        ("columns", 16, torch.float32, "diou", True),
        ("columns", 70, torch.float64, "ciou", False),
    ],
)
def test_box_loss(gpu_kernels, device, poisoned, layout, bins, dtype, iou, project):
    """Weights and class scores; whatever stands off the foreground; all anchors."""
    logits, dim = logits_of(layout, bins, dtype, device)
    points, boxes, foreground = step_of(bins, device)
    positions = positions_for(bins) if project else None
    scores = torch.rand(BATCH, ANCHORS, 3).to(device)
    scores[:, ::3] = 0
    options = {"dim": dim, "project": positions, "iou": iou}
    check(dflkern.box_loss, logits, points, boxes, scores[..., 0].double(), 3.7, **options)
    (logits if dim == 3 else logits.permute(0, 3, 1, 2))[~foreground] = torch.nan
    boxes[~foreground] = torch.inf
    *_, gradient = check(
        dflkern.box_loss, logits, points, boxes, scores.half().mT.contiguous().mT,
        torch.tensor(3.7, device=device), foreground=foreground, **options,
    )  # fmt: skip
    of_anchors = gradient if dim == 3 else gradient.permute(0, 3, 1, 2)
    assert (of_anchors[~foreground | (scores.sum(-1) == 0)] == 0).all()


def test_the_gradient_keeps_one_weight_an_anchor(gpu_kernels, device):
    """In place of class scores and mask, and the gradient can still be differentiated."""
    logits, dim = logits_of("rows", 8, torch.float32, device)
    points, boxes, foreground = step_of(8, device)
    scores = torch.rand(BATCH, ANCHORS, 20).to(device)
    saved, found = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dflkern.box_loss(
            logits.requires_grad_(), points, boxes, scores, 2.0, dim=dim, foreground=foreground
        )
    assert max(t.numel() for t in saved if t is not logits) == boxes.numel()
    assert not any(t.dtype == torch.bool for t in saved)
    weight = next(t for t in saved if t.shape == (BATCH, ANCHORS))
    torch.testing.assert_close(weight, torch.where(foreground, scores.sum(-1), 0))
    for name in (requested(), "reference"):
        with dflkern.use_backend(name):
            losses = dflkern.box_loss(
                logits, points, boxes, scores, 2.0, dim=dim, foreground=foreground
            )
            first = torch.autograd.grad(sum(losses), logits, create_graph=True)[0]
            found.append(torch.autograd.grad(first.square().sum(), logits)[0])
    torch.testing.assert_close(*found)


def test_no_anchors(gpu_kernels, device):
    leaf = torch.randn(2, 0, 4, 16, device=device, requires_grad=True)
    points, boxes = torch.empty(0, 2, device=device), torch.empty(2, 0, 4, device=device)
    assert dflkern.decode_boxes(leaf, points).shape == (2, 0, 4)
    losses = dflkern.box_loss(leaf, points, boxes, torch.empty(2, 0, device=device), 1.0)
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert leaf.grad.shape == leaf.shape


def test_explain(gpu_kernels, device):
    """Says what is launched: two kernels for the loss, one for each other way."""
    logits, _ = logits_of("rows", 16, torch.float32, device)
    points, boxes, foreground = step_of(16, device)
    weight = torch.ones(BATCH, ANCHORS, device=device)
    text = dflkern.explain("box_loss", logits, points, boxes, weight, 1.0, foreground=foreground)
    assert f"{gpu_kernels[0]}: serves it" in text
    assert text.count(", then ") == 1
    assert "decode" in dflkern.explain("decode_boxes", logits, points)


def test_a_choice_for_one_reduction_is_not_taken_for_another(gpu_kernels, device):
    """No GPU kernel has the losses of each anchor, whatever was called before."""
    logits, _ = logits_of("rows", 16, torch.float32, device)
    points, boxes, foreground = step_of(16, device)
    weight = torch.ones(BATCH, ANCHORS, device=device)
    given = (logits, points, boxes, weight)
    dflkern.box_loss(*given, 1.0, foreground=foreground)
    with pytest.raises(RuntimeError, match='no kernel of box_loss with reduction="none"'):
        dflkern.box_loss(*given, None, foreground=foreground, reduction="none")
