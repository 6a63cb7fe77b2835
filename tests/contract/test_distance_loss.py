"""distance_loss: the definition, its contract, and Ultralytics' loss for heads of one bin."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import dflkern
from support import DTYPES, same_specials

IOUS = ("iou", "giou", "diou", "ciou")


def inputs(batch=2, dtype=torch.float32, integer=torch.int32, objects=6):
    """A head's distances (B, A, 4), anchors of two levels, objects, and an assignment."""
    anchors, stride = dflkern.make_anchors([(4, 6), (2, 3)], [8, 16])
    count = len(anchors)
    corners = torch.rand(objects, 2, dtype=torch.float64) * 30
    boxes = torch.cat((corners, corners + 4 + torch.rand(objects, 2) * 20), -1)
    matched = torch.randint(-objects, objects + 2, (batch, count), dtype=integer)
    return SimpleNamespace(
        distances=(torch.rand(batch, count, 4, dtype=torch.float64) * 4).to(dtype),
        anchor_points=anchors,
        target_boxes=boxes.float(),
        weight=torch.rand(batch, count),
        normalizer=torch.tensor(7.0),
        stride=stride,
        image_size=(32, 48),
        matched=matched,
    )


def by_definition(given, dim=-1, iou="ciou"):
    """Both losses anchor by anchor, in float64."""
    distances = given.distances.double()
    if dim == 1:
        distances = distances.transpose(1, 2)
    height, width = given.image_size
    sides = torch.tensor([width, height, width, height])
    losses = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for image, row in enumerate(given.matched.tolist()):
        for anchor, index in enumerate(row):
            if not 0 <= index < len(given.target_boxes):
                continue
            weight = given.weight[image, anchor].double()
            pixels = given.stride.flatten()[anchor].double()
            x, y = given.anchor_points[anchor].double()
            wanted = given.target_boxes[index].double() / pixels
            found = distances[image, anchor]
            left, top, right, bottom = found
            box = torch.stack((x - left, y - top, x + right, y + bottom))
            goal = torch.stack((x - wanted[0], y - wanted[1], wanted[2] - x, wanted[3] - y))
            losses[0] = losses[0] + weight * (1 - dflkern.paired_box_iou(box, wanted, iou))
            losses[1] = losses[1] + weight * ((found - goal).abs() * pixels / sides).mean()
    return [loss / given.normalizer.double() for loss in losses]


def run(given, dim=-1, iou="ciou", upstream=(0.75, -1.5)):
    """Both losses and the gradient of the distances."""
    leaf = given.distances.detach().requires_grad_()
    others = {name: value for name, value in vars(given).items() if name != "distances"}
    losses = dflkern.distance_loss(leaf, **others, dim=dim, iou=iou)
    grads = [torch.tensor(g, dtype=loss.dtype) for g, loss in zip(upstream, losses, strict=True)]
    return [loss.detach() for loss in losses], torch.autograd.grad(losses, leaf, grads)[0]


@pytest.mark.parametrize("iou", IOUS)
@pytest.mark.parametrize("dim", [-1, 1, 2, -2])
def test_the_definition_anchor_by_anchor(iou, dim):
    given = inputs(dtype=torch.float64)
    if dim in (1, -2):
        given.distances = given.distances.transpose(1, 2).contiguous()
    given.distances.requires_grad_()
    expected = by_definition(given, 1 if dim in (1, -2) else -1, iou)
    upstream = torch.tensor([0.75, -1.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, given.distances, [*upstream])
    actual = run(given, dim, iou)
    torch.testing.assert_close(actual[0], [e.detach() for e in expected])
    torch.testing.assert_close(actual[1], gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_and_strides(dtype):
    given = inputs(dtype=dtype)
    exact = copy.copy(given)
    exact.distances = given.distances.double()
    expected = run(exact)
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-6}
    views = {
        "rows": (given.distances, -1),
        "columns": (given.distances.transpose(1, 2).contiguous(), 1),
        "transposed": (given.distances.transpose(1, 2).contiguous().transpose(1, 2), -1),
        "slice": (torch.cat((given.distances, given.distances), -1)[..., 4:], -1),
    }
    for distances, dim in views.values():
        other = copy.copy(given)
        other.distances = distances
        losses, gradient = run(other, dim)
        assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for loss, value in zip(losses, expected[0], strict=True):
            torch.testing.assert_close(loss.double(), value.double(), rtol=1e-5, atol=0)
        assert gradient.dtype == dtype
        assert gradient.stride() == torch.empty_like(distances).stride()
        found = gradient if dim == -1 else gradient.transpose(1, 2)
        torch.testing.assert_close(found.double(), expected[1].double(), **tolerance)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_matched_and_gathered_boxes_give_the_same_bits(integer):
    given = inputs(integer=integer)
    exists = (given.matched >= 0) & (given.matched < len(given.target_boxes))
    other = copy.copy(given)
    del other.matched
    other.target_boxes = given.target_boxes[given.matched.clamp(0, 5).long()]
    other.foreground = exists
    for a, b in zip(run(given), run(other), strict=True):
        assert all(map(torch.equal, a, b))


def test_stride_as_a_number_a_vector_and_a_column():
    given = inputs()
    found = []
    for stride in (8, torch.full((30,), 8.0), torch.full((30, 1), 8.0)):
        given.stride = stride
        found.append(run(given))
    for other in found[1:]:
        assert torch.equal(other[1], found[0][1])
        assert all(map(torch.equal, other[0], found[0][0]))


def test_class_scores_are_summed():
    given = inputs()
    scores = torch.rand(2, 30, 3)
    given.weight = scores.sum(-1)
    expected = run(given)
    given.weight = scores
    torch.testing.assert_close(run(given), expected)


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf, 1e30])
def test_background_never_matters(hostile):
    given = inputs()
    given.weight[0, :5] = 0
    expected = run(given)
    background = (given.matched < 0) | (given.matched >= 6) | (given.weight == 0)
    for name in ("distances", "weight"):
        other = copy.copy(given)
        where = background & (given.weight != 0) if name == "weight" else background
        value = getattr(given, name).clone()
        value[where] = hostile
        setattr(other, name, value)
        losses, gradient = run(other)
        assert all(map(torch.equal, losses, expected[0]))
        assert torch.equal(gradient, expected[1])
        assert not gradient[background].any()


def test_nan_of_a_foreground_anchor_is_not_hidden():
    given = inputs()
    image, anchor = ((given.matched >= 0) & (given.matched < 6)).nonzero()[4].tolist()
    given.distances[image, anchor, 2] = math.nan
    losses, gradient = run(given)
    assert all(loss.isnan() for loss in losses)
    rows = gradient.isnan().any(-1).nonzero().tolist()
    assert rows == [[image, anchor]]


def test_without_foreground_both_losses_are_zero():
    given = inputs()
    given.normalizer = torch.tensor(0.0)
    for case in ("unmatched", "no objects", "no images"):
        other = copy.copy(given)
        if case == "unmatched":
            other.matched = torch.full_like(given.matched, -1)
        elif case == "no objects":
            other.target_boxes = given.target_boxes[:0]
        else:
            other = inputs(batch=0)
        losses, gradient = run(other)
        assert [loss.item() for loss in losses] == [0, 0]
        assert not gradient.any()


@pytest.mark.parametrize("iou", IOUS)
def test_gradients_of_both_orders(iou):
    given = inputs(dtype=torch.float64)
    given.distances = given.distances.transpose(1, 2)
    others = {name: value for name, value in vars(given).items() if name != "distances"}

    def function(leaf):
        iou_loss, l1_loss = dflkern.distance_loss(leaf, **others, dim=1, iou=iou)
        return iou_loss if iou == "ciou" else (iou_loss, l1_loss)

    leaf = given.distances.clone().requires_grad_()
    if iou != "ciou":  # whose α is a constant in backward
        assert gradcheck(function, (leaf,))
        assert gradgradcheck(function, (leaf,))
    first = torch.autograd.grad(by_definition_of(given, leaf, iou), leaf, create_graph=True)[0]
    mine = torch.autograd.grad(sum(run_on(leaf, others, iou)), leaf, create_graph=True)[0]
    torch.testing.assert_close(mine, first)


def by_definition_of(given, leaf, iou):
    other = copy.copy(given)
    other.distances = leaf
    return sum(by_definition(other, 1, iou))


def run_on(leaf, others, iou):
    return dflkern.distance_loss(leaf, **others, dim=1, iou=iou)


@pytest.mark.parametrize("dim", [1, 2])
def test_opcheck(dim):
    given = inputs()
    leaf = given.distances if dim == 2 else given.distances.transpose(1, 2).contiguous()
    tensors = (
        given.anchor_points,
        given.target_boxes,
        given.weight,
        given.normalizer,
        given.stride,
    )
    settings = (None, given.matched, dim, [32.0, 48.0], "ciou", "auto")
    grads = (torch.ones(()), torch.ones(()))
    opcheck(torch.ops.dflkern.distance_loss, (leaf.requires_grad_(), *tensors, *settings))
    call = (*grads, leaf.detach(), *tensors, *settings)
    opcheck(torch.ops.dflkern.distance_loss_backward, call)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", True), ("inductor", False)])
def test_compile_in_one_graph(compiler, dynamic):
    given = inputs()
    others = {k: v for k, v in vars(given).items() if k not in ("distances", "matched", "weight")}

    def step(distances, matched, weight):
        return sum(dflkern.distance_loss(distances, **others, weight=weight, matched=matched))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    leaf = given.distances.clone().requires_grad_()
    results = [f(leaf, given.matched, given.weight) for f in (step, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(r, leaf)[0] for r in results])


def test_explain():
    given = inputs()
    assert "reference: serves it" in dflkern.explain("distance_loss", **vars(given))


def test_ultralytics_loss_for_heads_of_one_bin():
    """BboxLoss without a DFL, whose boxes are in cells and whose L1 is relative to the image."""
    loss = pytest.importorskip("ultralytics.utils.loss", reason="Ultralytics is not installed")
    upstream = loss.BboxLoss(reg_max=1)
    if "imgsz" not in upstream.forward.__code__.co_varnames:
        pytest.skip("this Ultralytics has no L1 loss for heads of one bin")
    for batch, objects in ((1, 1), (2, 6), (5, 40)):
        given = inputs(batch, objects=objects)
        mask = (given.matched >= 0) & (given.matched < objects)
        scores = given.weight.unsqueeze(-1) * mask.unsqueeze(-1)
        targets = given.target_boxes[given.matched.clamp(0, objects - 1).long()] / given.stride
        leaf = given.distances.clone().requires_grad_()
        boxes = dflkern.dist2bbox(leaf, given.anchor_points)
        expected = upstream(
            leaf, boxes, given.anchor_points, targets, scores, given.normalizer, mask,
            torch.tensor(given.image_size, dtype=torch.float), given.stride,
        )  # fmt: skip
        grads = [torch.tensor(0.75), torch.tensor(-1.5)]
        (gradient,) = torch.autograd.grad(expected, leaf, grads)
        losses, found = run(given)
        torch.testing.assert_close(losses, [e.detach() for e in expected], rtol=1e-5, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
        assert same_specials(found, gradient)
