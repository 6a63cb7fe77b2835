"""task_aligned_assign: its rules one by one, numbers nobody means to give, forms of one call."""

import pytest
import torch

import dflkern
from assignment import by_loops, differences, run, same, scene, transposed


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    return request.param


def row(scores, boxes, objects, points=None, backend="cpu", labels=None, **options):
    """One image with one class: its logits, its boxes, and its objects."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    points = [[i + 0.5, 0.5] for i in range(len(scores))] if points is None else points
    options = {"topk": 10, "iou": "iou", **options}
    with dflkern.use_backend(backend):
        return dflkern.task_aligned_assign(
            scores.reshape(1, -1, 1), torch.tensor(boxes, dtype=torch.float32)[None],
            torch.tensor(points), 8.0, torch.tensor(objects, dtype=torch.float32).reshape(-1, 4),
            torch.zeros(len(objects), dtype=torch.int64) if labels is None else labels,
            torch.zeros(len(objects), dtype=torch.int64), **options,
        )  # fmt: skip


OBJECT = [0.0, 0, 32, 8]  # holds the first four anchors of a row
HALF = [0.0, 0, 16, 8]  # overlaps it by a half


# --- the rules ----------------------------------------------------------------------------------


def test_scores_by_hand(backend):
    """Metrics 0.5^0.5 · 1 and 0.5^0.5 · (1/2)^6; the largest overlap is 1."""
    found = row([0.0, 0, 9], [OBJECT, HALF, [100.0, 0, 132, 8]], [OBJECT], backend=backend)
    assert found.matched.tolist() == [[0, 0, -1]]
    torch.testing.assert_close(found.score, torch.tensor([[1.0, 0.5**6, 0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.score_sum, found.score.sum())
    assert (found.matched.dtype, found.score.dtype) == (torch.int32, torch.float32)


def test_the_largest_overlap_may_be_that_of_another_anchor(backend):
    found = row([-20.0, 3], [OBJECT, HALF], [OBJECT], backend=backend, beta=1.0)
    metric = torch.tensor([-20.0, 3]).sigmoid().sqrt() * torch.tensor([1.0, 0.5])
    torch.testing.assert_close(found.score, (metric / metric.max())[None], rtol=1e-4, atol=0)


def test_of_equal_metrics_the_first_anchor_is_claimed(backend):
    found = row([1.0] * 4, [OBJECT] * 4, [OBJECT], backend=backend, topk=2)
    assert found.matched.tolist() == [[0, 0, -1, -1]]


def test_of_equal_overlaps_the_first_object_wins(backend):
    found = row([1.0] * 4, [OBJECT] * 4, [OBJECT, OBJECT], backend=backend, topk=3)
    assert found.matched.tolist() == [[0, 0, 0, -1]]


def test_a_metric_of_zero_is_not_claimed(backend):
    apart = [200.0, 0, 232, 8]
    found = row([1.0] * 4, [apart, OBJECT, apart, apart], [OBJECT], backend=backend)
    assert found.matched.tolist() == [[-1, 0, -1, -1]]


def test_an_anchor_on_the_side_of_an_object_is_outside(backend):
    points = [[0.0, 0.5], [4.0, 0.5], [2.0, 0.0], [2.0, 1.0], [2.0, 0.5]]
    found = row([1.0] * 5, [OBJECT] * 5, [OBJECT], points, backend)
    assert found.matched.tolist() == [[-1, -1, -1, -1, 0]]


def test_a_short_side_is_enlarged_for_candidacy_alone(backend):
    thin = [14.0, 0, 15, 8]  # 1 pixel wide, between anchors at 12 and 20
    assert row([1.0] * 4, [thin] * 4, [thin], backend=backend).matched.max() == -1
    found = row([1.0] * 4, [thin] * 4, [thin], backend=backend, min_side=16.0)
    assert found.matched.tolist() == [[-1, 0, 0, -1]]
    torch.testing.assert_close(found.score[0, 1:3], torch.ones(2))


def test_an_object_may_win_an_anchor_that_it_did_not_claim(backend):
    """Objects 0 and 1 claim anchor 0; object 2 overlaps it more, and claims anchor 1 instead."""
    objects = torch.tensor([[0.0, 0, 12, 8], [0.0, 0, 14, 8], [0.0, 0, 18, 8]])
    logits = torch.tensor([[[1.0, 1, -9], [-9, -9, 1]]])
    boxes = torch.tensor([[[0.0, 0, 20, 8], [0.0, 0, 18, 8]]])
    points = torch.tensor([[0.5, 0.5], [1.0, 0.5]])
    image = torch.zeros(3, dtype=torch.int64)
    for conflicts, winner in (("claimed", 1), ("inside", 2), ("all", 2)):
        with dflkern.use_backend(backend):
            found = dflkern.task_aligned_assign(
                logits, boxes, points, 8.0, objects, torch.arange(3), image, topk=1, iou="iou",
                conflicts=conflicts,
            )  # fmt: skip
        assert found.matched.tolist() == [[winner, 2]]


def test_all_objects_of_an_image_may_win_an_anchor(backend):
    """Object 2 does not hold the anchor point and overlaps its box the most."""
    objects = [[0.0, 0, 10, 8], [0.0, 0, 11, 8], [4.5, 0, 40, 8]]
    options = {"backend": backend, "topk": 1}
    boxes = [[0.0, 0, 40, 8]]
    assert row([1.0], boxes, objects, conflicts="inside", **options).matched.tolist() == [[1]]
    assert row([1.0], boxes, objects, conflicts="all", **options).matched.tolist() == [[2]]


def test_topk2_counts_what_is_left_after_conflicts(backend):
    """Object 1 loses its best anchor, and keeps the second."""
    objects = [OBJECT, [0.0, 0, 30, 8]]
    boxes = [OBJECT, [0.0, 0, 28, 8], [0.0, 0, 26, 8], [0.0, 0, 8, 8]]
    found = row([1.0] * 4, boxes, objects, backend=backend, topk=3)
    assert found.matched.tolist() == [[0, 1, 1, -1]]
    found = row([1.0] * 4, boxes, objects, backend=backend, topk=3, topk2=1)
    assert found.matched.tolist() == [[0, 1, -1, -1]]


# --- numbers that no user means to give ---------------------------------------------------------

BAD_BOXES = {
    "NaN": [float("nan"), 0, 32, 8],
    "infinite": [0.0, 0, float("inf"), 8],
    "swapped corners": [32.0, 0, 0, 8],
    "no area": [16.0, 0, 16, 8],
    "padding": [0.0, 0, 0, 0],
    "beyond the corner": [-32.0, -8, 30, 8],
}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_objects_with_such_boxes_are_ignored(backend, kind):
    options = {"backend": backend, "min_side": 16.0}
    alone = row([1.0] * 4, [OBJECT] * 4, [OBJECT], **options)
    both = row([1.0] * 4, [OBJECT] * 4, [BAD_BOXES[kind], OBJECT], **options)
    assert both.matched.tolist() == [[1, 1, 1, 1]]
    assert torch.equal(both.score, alone.score)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["gt_labels", "gt_image"])
@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1, -(2**31)])
def test_objects_with_indices_out_of_range_are_ignored(backend, name, value, dtype):
    given = scene(0, classes=3)
    keep = torch.arange(len(given["gt_boxes"])) != 5
    others = {key: given[key][keep] for key in ("gt_boxes", "gt_labels", "gt_image")}
    expected = run({**given, **others}, backend)
    indices = given[name].to(dtype)
    indices[5] = value
    found = run({**given, name: indices}, backend)
    shifted = torch.where(found.matched > 5, found.matched - 1, found.matched)
    assert torch.equal(shifted, expected.matched)
    assert torch.equal(found.score, expected.score)


def test_huge_indices_are_ignored(backend):
    given = scene(0, batch=1)
    for value in (2**32, 2**63 - 1, -(2**63)):
        found = run({**given, "gt_image": torch.full_like(given["gt_image"], value)}, backend)
        assert found.matched.max() == -1


def test_nan_logits_and_boxes_count_as_zero(backend):
    nan = float("nan")
    boxes = [OBJECT, OBJECT, [nan, 0, 32, 8], OBJECT]
    found = row([1.0, nan, 1, -float("inf")], boxes, [OBJECT], backend=backend)
    assert found.matched.tolist() == [[0, -1, -1, -1]]
    assert found.score_sum == found.score[0, 0]


def test_finite_results_for_any_prediction(backend):
    special = torch.tensor([0.0, -0.0, 1e38, -1e38, 1e-40, *map(float, ("nan", "inf", "-inf"))])
    given = scene(1, batch=1)
    g = torch.Generator().manual_seed(0)
    for name in ("boxes", "class_logits"):
        chosen = special[torch.randint(0, 8, given[name].shape, generator=g)]
        given[name] = torch.where(
            torch.rand(given[name].shape, generator=g) < 0.3, chosen, given[name]
        )
    for iou in ("iou", "giou", "diou", "ciou"):
        found = run(given, backend, iou=iou)
        assert ((found.score >= 0) & (found.score <= 1)).all()
        assert found.matched.max() >= 0
        assert ((found.score > 0) <= (found.matched >= 0)).all()


@pytest.mark.parametrize("axis", ["batch", "anchors", "classes", "objects"])
def test_nothing_of_something(backend, axis):
    sizes = {"batch": 2, "anchors": 5, "classes": 3, "objects": 4} | {axis: 0}
    batch, anchors, classes, objects = sizes.values()
    with dflkern.use_backend(backend):
        found = dflkern.task_aligned_assign(
            torch.zeros(batch, anchors, classes), torch.zeros(batch, anchors, 4),
            torch.zeros(anchors, 2), torch.ones(anchors), torch.ones(objects, 4),
            torch.zeros(objects, dtype=torch.int64), torch.zeros(objects, dtype=torch.int64),
        )  # fmt: skip
    assert found.matched.shape == found.score.shape == (batch, anchors)
    assert (found.matched == -1).all()
    assert found.score_sum == 0


# --- forms of one call --------------------------------------------------------------------------


def strided(given):
    """The same numbers with gaps of NaN between them."""
    apart = {}
    for name in ("class_logits", "boxes"):
        wide = torch.full((*given[name].shape[:2], 2 * given[name].shape[2]), float("nan"))
        apart[name] = wide[..., ::2].copy_(given[name])
    wide = torch.zeros(len(given["gt_image"]), 2, dtype=torch.int64)
    wide[:, 0], wide[:, 1] = given["gt_image"], given["gt_labels"]
    boxes = torch.cat((given["gt_boxes"], given["gt_boxes"]), 1)[:, :4]
    return {
        **given, **apart, "gt_image": wide[:, 0], "gt_labels": wide[:, 1], "gt_boxes": boxes,
        "stride": given["stride"].squeeze(1), "anchor_points": given["anchor_points"].mT.clone().mT,
    }  # fmt: skip


@pytest.mark.parametrize(
    "form", [transposed, strided, lambda g: transposed(strided(g)),
             lambda g: {**transposed(g), "class_logits": g["class_logits"].mT.contiguous()},
             lambda g: {**g, "gt_image": g["gt_image"].int(), "gt_labels": g["gt_labels"].int()}],
    ids=["head's layout", "strided", "both", "contiguous head", "int32"],
)  # fmt: skip
def test_layouts_give_the_same_bits(backend, form):
    given = scene(2, "crowd")
    assert same(run(form(given), backend), run(given, backend))


def test_the_order_of_the_objects_renames_them(backend):
    given = scene(3, "crowd")
    order = torch.randperm(len(given["gt_boxes"]), generator=torch.Generator().manual_seed(0))
    mixed = {key: given[key][order] for key in ("gt_boxes", "gt_labels", "gt_image")}
    found, expected = run({**given, **mixed}, backend), run(given, backend)
    renamed = torch.where(found.matched >= 0, order[found.matched.long()].int(), -1)
    assert torch.equal(renamed, expected.matched)
    assert torch.equal(found.score, expected.score)


def test_images_do_not_depend_on_each_other(backend):
    given = scene(4, "crowd")
    whole = run(given, backend)
    for image in range(3):
        mine = given["gt_image"] == image
        alone = {name: given[name][mine] for name in ("gt_boxes", "gt_labels")}
        alone |= {name: given[name][image : image + 1] for name in ("class_logits", "boxes")}
        alone["gt_image"] = torch.zeros(int(mine.sum()), dtype=torch.int64)
        assert torch.equal(run({**given, **alone}, backend).score[0], whole.score[image])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(backend, dtype):
    given = scene(5)
    halves = {name: given[name].to(dtype) for name in ("class_logits", "boxes")}
    widened = {name: tensor.float() for name, tensor in halves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run({**given, **halves}, backend)
    assert found.score.dtype == torch.float32
    assert same(found, run({**given, **widened}, backend))


def test_double_precision(backend):
    given = scene(6, "crowd", trained=True)
    wide = {name: tensor.double() for name, tensor in given.items() if tensor.is_floating_point()}
    found = run({**given, **wide}, backend)
    assert found.score.dtype == found.score_sum.dtype == torch.float64
    wanted = by_loops(given)
    assert differences(found, wanted)[0] == 0
    torch.testing.assert_close(found.score, wanted[1].double(), rtol=0, atol=1e-7)


def test_threads_give_the_same_bits():
    given = scene(7, "crowd", batch=5)
    expected = run(given)
    torch.set_num_threads(2)
    for _ in range(5):
        assert same(run(given), expected)


def test_no_gradient_and_nothing_changed(backend):
    given = scene(8)
    leaves = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in given.items()
    }
    found = run(leaves, backend)
    assert not found.score.requires_grad
    assert not found.score_sum.requires_grad
    assert same(found, run(given, backend))
    assert all(torch.equal(given[name], leaves[name]) for name in given)
    gradient = torch.func.grad(lambda z: run({**given, "class_logits": z}, backend).score_sum)
    assert not gradient(given["class_logits"]).any()


def test_a_stride_for_all_anchors(backend):
    given = scene(9, batch=1)
    given["stride"] = torch.full_like(given["stride"], 8.0)
    assert same(run({**given, "stride": 8}, backend), run(given, backend))
