"""box_loss with the box of each object, boxes in pixels, and the losses of each anchor."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import dflkern
from dflkern.cpu import library as cpu_library
from dflkern.operators import modes
from dflkern.operators.table import BOX_LOSS

SIZES, STRIDES = [(6, 8), (3, 4)], [8, 16]
OBJECTS = 7


@pytest.fixture(params=["reference", "cpu", "cpu-registered"])
def way(request, monkeypatch):
    """Run a test on the reference and on the CPU kernels, both ways."""
    name, _, registered = request.param.partition("-")
    if name == "cpu" and not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    monkeypatch.setattr(modes, "FAST_PATH", not registered)
    with dflkern.use_backend(name):
        yield request.param


def problem(dim=-1, dtype=torch.float32, num_bins=16, index=torch.int32, batch=2, objects=OBJECTS):
    """(logits, points, boxes in pixels, weight), and matched with indices out of range in it."""
    points, stride = dflkern.make_anchors(SIZES, STRIDES)
    anchors = len(points)
    shape = (batch, anchors, 4, num_bins) if dim == -1 else (batch, 4, num_bins, anchors)
    logits = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)
    corner = torch.rand(objects, 2) * 40
    boxes = torch.cat((corner, corner + 4 + torch.rand(objects, 2) * 60), 1)
    matched = torch.randint(-3, objects + 3, (batch, anchors), dtype=index)
    weight = torch.rand(batch, anchors) * (torch.rand(batch, anchors) > 0.2)
    return (logits, points, boxes, weight), {"matched": matched, "stride": stride}


def gathered(given, options):
    """The same call with a box in cells for each anchor, and a mask."""
    logits, points, boxes, weight = given
    matched, stride = options["matched"], options["stride"]
    exists = (matched >= 0) & (matched < len(boxes))
    each = boxes[torch.where(exists, matched, 0).long()] / stride.view(1, -1, 1)
    return (logits, points, each, weight), {"foreground": exists}


def run(given, normalizer, upstream=None, **options):
    """The losses and the gradient of the logits."""
    leaf = given[0].detach().clone().requires_grad_()
    losses = dflkern.box_loss(leaf, *given[1:], normalizer, **options)
    upstream = upstream or [torch.tensor(0.7), torch.tensor(1.3)]
    upstream = [g.to(loss.dtype) for g, loss in zip(upstream, losses, strict=True)]
    (gradient,) = torch.autograd.grad(losses, leaf, upstream)
    return *(loss.detach() for loss in losses), gradient


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matched_gives_exactly_what_the_gathered_boxes_give(way, dim, dtype, index):
    given, options = problem(dim, dtype, index=index)
    actual = run(given, 3.0, dim=dim, **options)
    plain, foreground = gathered(given, options)
    expected = run(plain, 3.0, dim=dim, **foreground)
    for found, wanted in zip(actual, expected, strict=True):
        if dtype == torch.float64:  # its boxes are divided in fp64 here, in fp32 there
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(found, wanted)
    assert actual[2].count_nonzero()


def test_strided_indices_and_strides_of_one_number(way):
    given, options = problem()
    matched = options["matched"]
    wide = torch.stack((matched, matched + 100), -1)[..., 0]
    for index in (wide, matched.t().contiguous().t()):
        assert not index.is_contiguous()
        for found, wanted in zip(
            run(given, 3.0, matched=index, stride=8),
            run(given, 3.0, matched=matched, stride=torch.full((60,), 8.0)),
            strict=True,
        ):
            assert torch.equal(found, wanted)


def test_stride_without_matched(way):
    given, options = problem()
    logits, points, _, weight = given
    (_, _, each, _), foreground = gathered(given, {**options, "stride": torch.ones(60)})
    stride = options["stride"]
    actual = run((logits, points, each, weight), 3.0, stride=stride, **foreground)
    expected = run((logits, points, each / stride, weight), 3.0, **foreground)
    for found, wanted in zip(actual, expected, strict=True):
        assert torch.equal(found, wanted)


def test_nothing_matched(way):
    given, options = problem()
    for matched, boxes in (
        (torch.full_like(options["matched"], -1), given[2]),
        (options["matched"], given[2][:0]),
        (torch.full_like(options["matched"], 2**31 - 1), given[2]),
        (torch.full_like(options["matched"], -(2**31)), given[2]),
    ):
        for normalizer in (3.0, 0.0, float("nan")):
            results = run((*given[:2], boxes, given[3]), normalizer, matched=matched, stride=8)
            assert all(result.eq(0).all() for result in results)


def test_background_and_other_objects_never_matter(way):
    """NaN in logits of the background, and in the box of an object without anchors."""
    given, options = problem()
    logits, points, boxes, weight = given
    matched = options["matched"].masked_fill(options["matched"] == 3, -1)
    clean = run(given, 3.0, matched=matched, stride=8)
    background = (matched < 0) | (matched >= OBJECTS)
    logits, boxes, weight = logits.clone(), boxes.clone(), weight.clone()
    logits[background], weight[background], boxes[3] = float("nan"), float("nan"), float("nan")
    poisoned = run((logits, points, boxes, weight), 3.0, matched=matched, stride=8)
    for found, wanted in zip(poisoned, clean, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("iou", ["iou", "giou", "diou", "ciou"])
def test_losses_of_each_anchor_sum_to_the_sums(way, dim, iou):
    given, options = problem(dim, torch.float64)
    each = run(
        given, None, [torch.full((2, 60), 0.7 / 3), torch.full((2, 60), 1.3 / 3)],
        dim=dim, iou=iou, reduction="none", **options,
    )  # fmt: skip
    sums = run(given, 3.0, [torch.tensor(0.7), torch.tensor(1.3)], dim=dim, iou=iou, **options)
    assert each[0].shape == each[1].shape == (2, 60)
    for found, wanted in zip(each[:2], sums[:2], strict=True):
        torch.testing.assert_close(found.sum() / 3, wanted)
    torch.testing.assert_close(each[2], sums[2], rtol=1e-6, atol=1e-9)


def test_losses_of_each_anchor_are_the_products(way):
    """w (1 − IoU) and w · mean DFL, from the public functions; exactly 0 in the background."""
    given, options = problem()
    logits, points, _, weight = given
    (_, _, boxes, _), mask = gathered(given, options)
    decoded = dflkern.decode_boxes(logits, points)
    target = dflkern.bbox2dist(points, boxes)
    dfl = dflkern.dfl_loss(logits, target, reduction="side_mean")
    active = mask["foreground"] & (weight != 0)
    found = dflkern.box_loss(*given, None, reduction="none", **options)
    expected = 1 - dflkern.paired_box_iou(decoded, boxes, "ciou"), dfl
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual[active], (weight * wanted)[active], rtol=1e-5, atol=1e-6)
        assert actual[~active].eq(0).all()


def test_upstream_gradients_of_the_background_never_matter(way):
    given, options = problem()
    background = (options["matched"] < 0) | (options["matched"] >= OBJECTS)
    upstream = [torch.randn(2, 60), torch.randn(2, 60)]
    spoiled = [g.masked_fill(background, float("nan")) for g in upstream]
    clean, poisoned = (
        run(given, None, g, reduction="none", **options)[2] for g in (upstream, spoiled)
    )
    assert torch.equal(clean, poisoned)


def gradient_by_reference(given, upstream, **options):
    given = (given[0].double(), *given[1:])
    with dflkern.use_backend("reference"):
        return run(given, None, upstream, reduction="none", **options)


@pytest.mark.parametrize("dim", [-1, 2])
def test_upstream_gradients_of_each_anchor(way, dim):
    given, options = problem(dim)
    upstream = [torch.randn(2, 60), torch.randn(60, 2).t()]
    actual = run(given, None, upstream, reduction="none", dim=dim, **options)
    exact = gradient_by_reference(given, upstream, dim=dim, **options)
    for found, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dim", [-1, 2])
def test_gradcheck(way, reduction, dim):
    given, options = problem(dim, torch.float64, num_bins=3, batch=1)
    keep = torch.arange(0, 60, 30)
    options = {"matched": options["matched"][:, keep], "stride": options["stride"][keep]}
    options["matched"][0, 0] = 2
    leaf = given[0].index_select(1 if dim == -1 else 3, keep).requires_grad_()
    normalizer = 2.0 if reduction == "sum" else None

    def function(z):
        return dflkern.box_loss(
            z, given[1][keep], given[2], given[3][:, keep] + 0.1, normalizer, dim=dim, iou="giou",
            reduction=reduction, **options,
        )  # fmt: skip

    assert gradcheck(function, (leaf,))
    assert gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_opcheck(way, reduction):
    (logits, points, boxes, weight), options = problem()
    given = {
        **BOX_LOSS.defaults, **options, "logits": logits.requires_grad_(), "anchor_points": points,
        "target_boxes": boxes, "weight": weight, "project": None, "positions": None, "dim": 3,
        "margin": 0.01, "iou": "ciou", "reduction": reduction, "backend": way.partition("-")[0],
        "normalizer": torch.tensor(2.0) if reduction == "sum" else None,
    }  # fmt: skip
    opcheck(torch.ops.dflkern.box_loss, [given[name] for name in BOX_LOSS.names])
    upstream = torch.rand(() if reduction == "sum" else (2, 60))
    given |= {"grad_iou": upstream, "grad_dfl": upstream, "logits": logits.detach()}
    names = BOX_LOSS.gradient.names
    opcheck(torch.ops.dflkern.box_loss_backward, [given[name] for name in names])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_to_one_graph(reduction):
    given, options = problem(2)
    normalizer = 2.0 if reduction == "sum" else None

    def step(logits):
        losses = dflkern.box_loss(
            logits, *given[1:], normalizer, dim=2, reduction=reduction, **options
        )
        return losses[0].sum() * 7.5 + losses[1].sum() * 1.5

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = given[0].clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)


def test_the_module_is_the_function():
    given, options = problem(2)
    module = copy.deepcopy(dflkern.BoxLoss(dim=2, iou="giou", reduction="none"))
    expected = dflkern.box_loss(*given, None, dim=2, iou="giou", reduction="none", **options)
    for found, wanted in zip(module(*given, **options), expected, strict=True):
        assert torch.equal(found, wanted)
    assert "reduction='none'" in repr(module)


def test_errors_say_what_is_wrong():
    given, options = problem()
    matched = options["matched"]
    for wrong, error, words in (
        ({"matched": matched, "foreground": matched > 0}, ValueError, "Leave foreground out"),
        ({"matched": matched.float()}, TypeError, "an int32 or int64 tensor is needed"),
        ({"matched": matched[:1]}, ValueError, r"matched has shape \(1, 60\); \(2, 60\)"),
        ({}, ValueError, r"target_boxes has shape \(7, 4\); \(2, 60, 4\)"),
        ({"matched": matched, "stride": torch.ones(3)}, ValueError, r"stride has shape \(3,\)"),
        ({"matched": matched, "reduction": "mean"}, ValueError, "reduction='mean' is not known"),
        ({"matched": matched, "reduction": "none"}, ValueError, "Pass normalizer=None"),
    ):
        with pytest.raises(error, match=words):
            dflkern.box_loss(*given, 2.0, **wrong)
    with pytest.raises(ValueError, match="target_boxes has shape"):
        dflkern.box_loss(*given[:2], given[2][:, :3], given[3], 2.0, matched=matched)
    with pytest.raises(ValueError, match="BoxLoss: reduction='mean'"):
        dflkern.BoxLoss(reduction="mean")
