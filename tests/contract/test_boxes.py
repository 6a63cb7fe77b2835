"""Anchors, boxes, IoU, decode_boxes and box_loss."""

import pytest
import torch
import torchvision
from torch.autograd import gradcheck, gradgradcheck

import dflkern
from dflkern import reference
from dflkern.iou import paired_box_iou_gradient
from support import positions_for

KINDS = ("iou", "giou", "diou", "ciou")


def random_boxes(*shape, dtype=torch.float64):
    corner = torch.rand(*shape, 2, dtype=dtype) * 10
    return torch.cat((corner, corner + torch.rand(*shape, 2, dtype=dtype) * 6 + 0.5), -1)


def test_make_anchors():
    anchors, stride = dflkern.make_anchors([(2, 3), (1, 1)], [8, 16])
    expected = [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5]]
    assert anchors.tolist() == expected
    assert stride.flatten().tolist() == [8] * 6 + [16]
    corners, _ = dflkern.make_anchors([(2, 3)], [8], offset=0)
    assert corners[:2].tolist() == [[0, 0], [1, 0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, _ = dflkern.make_anchors([(1, 300)], [8])
    assert wide.dtype == torch.float32
    assert wide[-1, 0] == 299.5
    empty, none = dflkern.make_anchors([], [])
    assert empty.shape == (0, 2)
    assert none.shape == (0, 1)


@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
def test_boxes_come_back_from_distances(box_format):
    anchors = torch.rand(7, 2) * 10
    boxes = random_boxes(3, 7, dtype=torch.float32)
    distances = dflkern.bbox2dist(anchors, boxes)
    back = dflkern.dist2bbox(distances, anchors, box_format=box_format)
    torch.testing.assert_close(back, torchvision.ops.box_convert(boxes, "xyxy", box_format))


@pytest.mark.parametrize("kind", KINDS)
def test_iou_equals_torchvision_on_the_diagonal(kind):
    peers = {
        "iou": torchvision.ops.box_iou,
        "giou": torchvision.ops.generalized_box_iou,
        "diou": torchvision.ops.distance_box_iou,
        "ciou": torchvision.ops.complete_box_iou,
    }
    a, b = random_boxes(200), random_boxes(200)
    expected = peers[kind](a, b).diagonal()
    torch.testing.assert_close(dflkern.paired_box_iou(a, b, kind), expected, atol=1e-5, rtol=0)
    same = dflkern.paired_box_iou(a, a, kind)
    torch.testing.assert_close(same, torch.ones_like(same), atol=1e-5, rtol=0)
    nothing = torch.zeros(1, 4)
    assert dflkern.paired_box_iou(nothing, nothing, kind).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_iou_gradient_equals_autograd(kind):
    """With boxes inside, across and apart, ties and empty boxes among them."""
    a, b = random_boxes(300), random_boxes(300)
    a[:5] = b[:5]
    a[5:9, 2:] = a[5:9, :2]
    b[9:12] = 0
    leaf = a.requires_grad_()
    (expected,) = torch.autograd.grad(dflkern.paired_box_iou(leaf, b, kind).sum(), leaf)
    actual = paired_box_iou_gradient(a.detach(), b, kind)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def head(dim, num_bins=8, dtype=torch.float64, batch=2):
    """Logits of 5 anchors on two levels, with anchor points and strides."""
    shape = (batch, 5, 4, num_bins) if dim == -1 else (batch, 4, num_bins, 5)
    logits = torch.randn(shape, dtype=torch.float64).to(dtype)
    return logits, *dflkern.make_anchors([(2, 2), (1, 1)], [8, 16])


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
@pytest.mark.parametrize("project", [None, "positions"])
def test_decode_boxes_is_its_parts(dim, box_format, project):
    logits, anchors, stride = head(dim)
    project = positions_for(8) if project else None
    boxes = dflkern.decode_boxes(
        logits, anchors, stride, dim=dim, box_format=box_format, project=project
    )
    distances = dflkern.dfl_decode(logits, dim=dim, project=project)
    if dim == 2:
        boxes, distances = boxes.mT, distances.mT
    expected = dflkern.dist2bbox(distances, anchors, box_format=box_format) * stride
    torch.testing.assert_close(boxes, expected)
    flat = dflkern.decode_boxes(logits, anchors, stride[:, 0], dim=dim, box_format=box_format)
    assert flat.shape == ((2, 5, 4) if dim == -1 else (2, 4, 5))
    cells = dflkern.decode_boxes(logits, anchors, dim=dim, box_format=box_format)
    cells = cells if dim == -1 else cells.mT
    flat = flat if dim == -1 else flat.mT
    torch.testing.assert_close(flat, cells * stride)


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
def test_decode_boxes_gradcheck(dim, box_format):
    logits, anchors, stride = head(dim, 4, batch=1)
    leaf = logits.requires_grad_()

    def function(z):
        return dflkern.decode_boxes(z, anchors, stride, dim=dim, box_format=box_format)

    assert gradcheck(function, (leaf,))
    assert gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strides_of_boxes(dtype):
    logits, anchors, stride = head(2, dtype=dtype)
    wide = torch.randn(2, 40, 7).to(dtype)
    view = wide[:, 3:35, :5].view(2, 4, 8, 5)
    for z in (logits, view):
        leaf = z.detach().requires_grad_()
        boxes = dflkern.decode_boxes(leaf, anchors.double(), stride.half(), dim=2)
        assert boxes.dtype == torch.float32
        assert boxes.is_contiguous()
        boxes.square().sum().backward()
        assert leaf.grad.dtype == dtype
        assert leaf.grad.stride() == torch.empty_like(z).stride()


def box_problem(dim, dtype=torch.float64, num_bins=8, batch=3):
    logits, anchors, _ = head(dim, num_bins, dtype, batch)
    target_boxes = torch.tensor([-1.0, -1, 3, 3]) + torch.randn(batch, 5, 4).double() * 0.4
    weight = torch.rand(batch, 5) + 0.1
    return logits, anchors, target_boxes, weight, torch.rand(batch, 5) > 0.4


def spelled_out(logits, anchors, target_boxes, weight, normalizer, foreground, dim, kind):
    """box_loss by gathering the foreground, as the detectors do."""
    rows = logits if dim == -1 else logits.permute(0, 3, 1, 2)
    b, a = foreground.nonzero(as_tuple=True)
    z, box, w = rows[b, a], target_boxes[b, a], weight[b, a]
    predicted = dflkern.dist2bbox(dflkern.dfl_decode(z), anchors[a])
    overlap = dflkern.paired_box_iou(predicted, box, kind)
    target = dflkern.bbox2dist(anchors[a], box, rows.shape[-1] - 1)
    loss = dflkern.dfl_loss(z, target).mean(-1)
    return (w * (1 - overlap)).sum() / normalizer, (w * loss).sum() / normalizer


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_box_loss_is_its_parts(dim, kind):
    logits, anchors, boxes, weight, foreground = box_problem(dim)
    leaf = logits.requires_grad_()
    losses = dflkern.box_loss(
        leaf, anchors, boxes, weight, 2.5, dim=dim, foreground=foreground, iou=kind
    )
    expected = spelled_out(leaf, anchors, boxes, weight, 2.5, foreground, dim, kind)
    for actual, wanted in zip(losses, expected, strict=True):
        assert actual.shape == ()
        torch.testing.assert_close(actual, wanted)
    for scale in ((1.0, 0.0), (0.0, 1.0), (7.5, 1.5)):
        gradients = [
            torch.autograd.grad(scale[0] * x + scale[1] * y, leaf, retain_graph=True)[0]
            for x, y in (losses, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    background = (~foreground)[..., None, None].expand(3, 5, 4, 8)
    last = gradients[0] if dim == -1 else gradients[0].permute(0, 3, 1, 2)
    assert not last[background].any()
    assert last[~background].all()


def test_box_loss_options():
    logits, anchors, boxes, weight, foreground = box_problem(2)
    options = {"dim": 2, "foreground": foreground}
    plain = dflkern.box_loss(logits, anchors, boxes, weight, 2.0, **options)
    for again in (
        dflkern.box_loss(logits, anchors, boxes, weight, torch.tensor(2.0), **options),
        dflkern.box_loss(
            logits, anchors, boxes, torch.stack((weight * 0.25, weight * 0.75), -1), 2, **options
        ),
        dflkern.BoxLoss(dim=2)(logits, anchors, boxes, weight, 2.0, foreground),
    ):
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    everywhere = dflkern.box_loss(logits, anchors, boxes, weight, 2.0, dim=2)
    full = torch.ones(3, 5, dtype=torch.bool)
    for a, b in zip(
        everywhere,
        dflkern.box_loss(logits, anchors, boxes, weight, 2.0, dim=2, foreground=full),
        strict=True,
    ):
        assert torch.equal(a, b)
    positions = positions_for(8)
    with_positions = dflkern.box_loss(
        logits, anchors, boxes, weight, 2.0, project=positions, margin=0.1, **options
    )
    assert all(x.isfinite() for x in with_positions)
    assert not torch.isclose(with_positions[1], plain[1])


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_box_loss_gradcheck(kind):
    logits, anchors, boxes, weight, foreground = box_problem(2, num_bins=4, batch=1)
    foreground[0, 1] = True

    def function(z):
        return dflkern.box_loss(
            z, anchors, boxes, weight, 2.0, dim=2, foreground=foreground, iou=kind
        )

    leaf = logits.requires_grad_()
    assert gradcheck(function, (leaf,))
    assert gradgradcheck(function, (leaf,))


def test_ciou_gradients_equal_those_of_the_reference_by_autograd():
    """α is a constant in backward, so finite differences do not apply; once and twice."""
    logits, anchors, boxes, weight, foreground = box_problem(-1)
    leaf = logits.requires_grad_()
    arguments = (anchors, boxes, weight, torch.tensor(2.0), foreground)
    fused = dflkern.box_loss(leaf, *arguments[:-1], foreground=foreground)
    plain = reference.box_loss(leaf, *arguments, None, None, None, 3, 0.01, "ciou", "sum")
    results = []
    for losses in (fused, plain):
        (first,) = torch.autograd.grad(losses[0] * 2 + losses[1], leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first, second))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_dfl_trains_on_the_clamp_and_iou_on_the_true_box():
    """A box beyond the last bin: DFL sees K − 1 − margin, the IoU the box itself."""
    logits = torch.zeros(1, 1, 4, 8)
    anchor, weight = torch.tensor([[10.0, 10.0]]), torch.ones(1, 1)
    near, far = (
        dflkern.box_loss(logits, anchor, torch.tensor([[[10.0 - d, 0, 20, 20]]]), weight, 1.0)
        for d in (8.0, 80.0)
    )
    assert torch.equal(near[1], far[1])
    assert near[0] < far[0]
