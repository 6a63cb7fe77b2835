"""decode_boxes and box_loss of the CPU library against the reference."""

import pytest
import torch

import dflkern
from dflkern.cpu import library as cpu_library
from support import DTYPES, positions_for

LAYOUTS = ("rows", "columns", "sliced rows", "sliced columns")
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
KINDS = ("iou", "giou", "diou", "ciou")


@pytest.fixture(autouse=True)
def built():
    if not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")


def logits_of(layout, bins, dtype, anchors, batch=3):
    """Logits, and the axis of their bins."""
    rows = "rows" in layout
    shape = (batch, anchors, 4, bins) if rows else (batch, 4, bins, anchors)
    values = (torch.randn(shape) * 2).to(dtype)
    if "sliced" in layout:
        larger = torch.zeros([size + 3 for size in shape], dtype=dtype)
        view = larger[tuple(slice(1, size + 1) for size in shape)]
        values = view.copy_(values)
    return values, 3 if rows else 2


def both(function, logits, *args, **kwargs):
    """Results and gradient on the CPU kernels, then on the reference."""
    found = []
    for backend in ("cpu", "reference"):
        leaf = logits.detach().requires_grad_()
        with dflkern.use_backend(backend):
            results = function(leaf, *args, **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(5)
        upstream = [torch.randn_like(result) for result in results]
        gradient = torch.autograd.grad(results, leaf, upstream)[0]
        assert gradient.stride() == torch.empty_like(logits).stride()
        found.append((*(result.detach() for result in results), gradient))
    return zip(*found, strict=True)


def check(pairs, dtype):
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        scale = float(expected.double().nan_to_num().abs().max()) if expected.numel() else 0
        close = TOLERANCE[dtype] * max(scale, 1e-3)
        torch.testing.assert_close(actual, expected, rtol=0, atol=close, equal_nan=True)


def step_of(bins, anchors, batch=3):
    """Anchor points, target boxes around them, and a foreground."""
    points = torch.rand(anchors, 2) * 20
    spread = torch.rand(2, batch, anchors, 2) * bins
    boxes = torch.cat((points - spread[0], points + spread[1]), -1)
    return points, boxes, torch.rand(batch, anchors) < 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [8, 16, 17, 33, 70])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_boxes(layout, bins, dtype):
    for anchors, positions in ((1, None), (7, positions_for(bins)), (50, None)):
        logits, dim = logits_of(layout, bins, dtype, anchors)
        points, _, _ = step_of(bins, anchors)
        stride = torch.rand(anchors, 1) * 8 + 1
        for given, box_format in ((None, "xyxy"), (stride, "cxcywh"), (stride.flatten(), "xyxy")):
            pairs = both(
                dflkern.decode_boxes, logits, points, given, dim=dim, project=positions,
                box_format=box_format,
            )  # fmt: skip
            check(pairs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [8, 16, 17, 33, 70])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_box_loss(layout, bins, dtype):
    """Weights and class scores of several types; whatever stands off the foreground."""
    for anchors, positions, kind in (
        (1, None, "ciou"), (7, positions_for(bins), "giou"), (50, None, "ciou"),
        (23, None, "diou"), (9, None, "iou"),
    ):  # fmt: skip
        logits, dim = logits_of(layout, bins, dtype, anchors)
        points, boxes, foreground = step_of(bins, anchors)
        (logits if dim == 3 else logits.permute(0, 3, 1, 2))[~foreground] = torch.nan
        boxes[~foreground] = torch.inf
        scores = torch.rand(3, anchors, 5)
        scores[:, ::3] = 0
        for weight in (scores, scores[..., 0].double(), scores.half().mT.contiguous().mT):
            pairs = both(
                dflkern.box_loss, logits, points, boxes, weight, 3.7, dim=dim,
                foreground=foreground, project=positions, iou=kind,
            )  # fmt: skip
            check(pairs, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_off_the_foreground_is_exactly_zero(layout):
    logits, dim = logits_of(layout, 16, torch.float32, 40)
    points, boxes, foreground = step_of(16, 40)
    leaf = logits.detach().requires_grad_()
    with dflkern.use_backend("cpu"):
        losses = dflkern.box_loss(
            leaf, points, boxes, torch.ones(3, 40), 1.0, dim=dim, foreground=foreground
        )
    gradient = torch.autograd.grad(sum(losses), leaf)[0]
    of_anchors = gradient if dim == 3 else gradient.permute(0, 3, 1, 2)
    assert (of_anchors[~foreground] == 0).all()
    assert (of_anchors[foreground] != 0).any(-1).all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_gradient_larger_than_caches_is_written_whole(layout, share):
    """Its zeros bypass the caches, between the rows of the foreground and in pieces of threads."""
    anchors = 8400
    logits, dim = logits_of(layout, 16, torch.float32, anchors)
    points, boxes, _ = step_of(16, anchors)
    foreground = torch.rand(3, anchors) < share
    foreground[0, :3] = foreground[2, -3:] = True
    weight = torch.rand(3, anchors)
    weight[:, ::7] = 0  # marked, and yet without a gradient

    leaf = logits.detach().requires_grad_()
    found = {}
    for backend in ("reference", "cpu"):
        with dflkern.use_backend(backend):
            losses = dflkern.box_loss(
                leaf, points, boxes, weight, 50.0, dim=dim, foreground=foreground
            )
        torch.full_like(leaf, torch.nan)  # what is allocated next finds this
        found[backend] = torch.autograd.grad(sum(losses), leaf)[0]
    check([(found["cpu"], found["reference"])], torch.float32)
    of_anchors = found["cpu"] if dim == 3 else found["cpu"].permute(0, 3, 1, 2)
    active = foreground & (weight != 0)
    assert (of_anchors[~active] == 0).all()
    assert (of_anchors[active] != 0).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_anchors_and_any_number_of_threads(kind):
    """Without a mask every anchor counts; the sums do not depend on the threads."""
    logits, _ = logits_of("rows", 16, torch.float32, 3000, batch=2)
    points, boxes, _ = step_of(16, 3000, batch=2)
    weight = torch.rand(2, 3000)
    check(both(dflkern.box_loss, logits, points, boxes, weight, 50.0, iou=kind), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = logits.detach().requires_grad_()
            with dflkern.use_backend("cpu"):
                losses = dflkern.box_loss(leaf, points, boxes, weight, 50.0, iou=kind)
            results.append((*losses, *torch.autograd.grad(sum(losses), leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
