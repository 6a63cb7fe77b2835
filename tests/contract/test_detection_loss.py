"""DetectionLoss against a composition of the references, and its contract."""

import copy
import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import dflkern
from assignment import KINDS, STRIDES, scene
from dflkern.bench.counts import count_kernels
from dflkern.bench.timing import Work
from dflkern.cpu import library as cpu_library

IMAGE, CLASSES, BATCH = 96, 5, 3
SIZES = [(IMAGE // stride,) * 2 for stride in STRIDES]


@pytest.fixture(params=["auto", "reference"])
def way(request):
    """Run a test on the kernels and on the reference."""
    with dflkern.use_backend(request.param):
        yield request.param


@pytest.fixture
def kernels():
    """Run a test on the CPU kernels."""
    if not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")


def problem(kind="usual", seed=0, num_bins=16, dtype=torch.float32, batch=BATCH):
    """(box logits, class logits, the tensors of the objects), and anchor points and strides."""
    given = scene(seed, kind, batch=batch, image=IMAGE, classes=CLASSES)
    g = torch.Generator().manual_seed(seed)
    anchors = len(given["anchor_points"])
    boxes = torch.randn(batch, 4 * num_bins, anchors, generator=g)
    if num_bins == 1:
        boxes = boxes.exp()
    tensors = (boxes.to(dtype), given["class_logits"].mT.contiguous().to(dtype))
    objects = tuple(given[name] for name in ("gt_boxes", "gt_labels", "gt_image"))
    return (*tensors, *objects), {name: given[name] for name in ("anchor_points", "stride")}


def maps(tensor):
    """A map of each level from (B, channels, A)."""
    parts = tensor.split([height * width for height, width in SIZES], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, SIZES, strict=True)]


def composed(given, grid, num_classes=CLASSES, gains=(7.5, 0.5, 1.5), weights=None):
    """(total, box, cls, dfl, matched) by the public functions and dense targets of PyTorch."""
    box_logits, class_logits, gt_boxes, gt_labels, gt_image = given
    points, stride = grid["anchor_points"], grid["stride"]
    rows = box_logits.unflatten(1, (4, -1)).permute(0, 3, 1, 2)
    with torch.no_grad(), dflkern.use_backend("reference"):
        found = dflkern.task_aligned_assign(
            class_logits.mT, dflkern.decode_boxes(rows, points, stride), points, stride, gt_boxes,
            gt_labels, gt_image, min_side=STRIDES[1],
        )  # fmt: skip
    normalizer = found.score_sum.clamp(min=1)
    foreground = found.matched >= 0
    target = torch.zeros_like(class_logits.mT, dtype=found.score.dtype)
    index = found.matched.clamp(min=0).long()
    label = gt_labels[index] if len(gt_labels) else torch.zeros_like(index)
    target.scatter_(2, label[..., None], found.score[..., None])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        class_logits.mT.to(target.dtype), target, reduction="none"
    )
    if weights is not None:
        bce = bce * torch.tensor(weights)
    boxes = gt_boxes[index] if len(gt_boxes) else torch.zeros(*index.shape, 4)
    with dflkern.use_backend("reference"):
        box, dfl = dflkern.box_loss(
            rows, points, boxes / stride, found.score, normalizer, foreground=foreground
        )
    losses = box * gains[0], bce.sum() / normalizer * gains[1], dfl * gains[2]
    return (sum(losses), *losses, found.matched)


def gradients(total, given):
    return torch.autograd.grad(total, given[:2])


def with_grad(given):
    return (*(each.detach().requires_grad_() for each in given[:2]), *given[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_composition_gives_the_same(way, kind):
    for seed in range(3):
        given, grid = problem(kind, seed)
        given, classes = with_grad(given), given[1].shape[1]
        expected = composed(given, grid, classes)
        found = dflkern.DetectionLoss(classes)(*given, **grid)
        assert torch.equal(found.assignment.matched, expected[4])
        torch.testing.assert_close(found[:4], expected[:4], rtol=1e-5, atol=1e-6)
        for actual, wanted in zip(
            gradients(found.total, given), gradients(expected[0], given), strict=True
        ):
            assert (actual - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("num_bins", [16, 1])
def test_level_maps_give_the_same(way, num_bins):
    given, grid = problem(num_bins=num_bins)
    given = with_grad(given)
    loss = dflkern.DetectionLoss(CLASSES, num_bins)
    expected = loss(*given, **grid, image_size=(IMAGE, IMAGE))
    found = loss(maps(given[0]), maps(given[1]), *given[2:])
    assert torch.equal(found.assignment.matched, expected.assignment.matched)
    for actual, wanted in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(actual, wanted)
    for actual, wanted in zip(
        gradients(found.total, given), gradients(expected.total, given), strict=True
    ):
        assert torch.equal(actual, wanted)
        assert wanted.count_nonzero()


def test_gains_weights_and_normalizer(way):
    given, grid = problem()
    given, weights = with_grad(given), [0.5, 1, 2, 3, 4]
    loss = dflkern.DetectionLoss(
        CLASSES, box_gain=2, class_gain=3, dfl_gain=5, class_weight=torch.tensor(weights)
    )
    found = loss(*given, **grid)
    expected = composed(given, grid, gains=(2, 3, 5), weights=weights)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-5, atol=1e-6)
    own = found.assignment.score_sum.clamp(min=1)
    for normalizer in (7.0, torch.tensor(7.0)):
        other = loss(*given, **grid, normalizer=normalizer)
        torch.testing.assert_close(other.total * 7, found.total * own)


def test_a_head_without_bins(way):
    """L1 in fractions of the image."""
    given, grid = problem(num_bins=1)
    given = with_grad(given)
    found = dflkern.DetectionLoss(CLASSES, 1)(*given, **grid, image_size=(IMAGE, IMAGE))
    iou, l1 = dflkern.distance_loss(
        given[0], grid["anchor_points"], given[2], found.assignment.score,
        found.assignment.score_sum.clamp(min=1), dim=1, stride=grid["stride"],
        image_size=(IMAGE, IMAGE), matched=found.assignment.matched,
    )  # fmt: skip
    torch.testing.assert_close((found.box, found.dfl), (7.5 * iou, 1.5 * l1))
    assert all(each.isfinite().all() and each.any() for each in gradients(found.total, given))


@pytest.mark.parametrize("batch", [0, 2])
def test_no_images_and_no_objects(way, batch):
    given, grid = problem("empty", batch=max(batch, 1))
    given = with_grad((*(each[:batch] for each in given[:2]), *given[2:]))
    found = dflkern.DetectionLoss(CLASSES)(*given, **grid)
    assert found.box == found.dfl == 0
    assert (found.assignment.matched == -1).all()
    assert (found.cls > 0) == (batch > 0)
    box, classes = gradients(found.total, given)
    assert not box.any()
    assert classes.isfinite().all()


def test_first_and_second_derivatives(way):
    """With the assignment held constant, as the loss holds it."""
    given, grid = problem(num_bins=4, dtype=torch.float64, batch=1)
    keep = torch.arange(0, len(grid["stride"]), 30)
    grid = {name: each[keep] for name, each in grid.items()}
    given = with_grad((*(each[..., keep].clone() for each in given[:2]), *given[2:]))
    found = dflkern.DetectionLoss(CLASSES, 4, iou="giou")(*given, **grid)
    fixed, normalizer = found.assignment, found.assignment.score_sum.clamp(min=1)
    assert (fixed.matched >= 0).any()

    def function(boxes, scores):
        cls = dflkern.class_loss(scores, fixed.matched, fixed.score, given[3], normalizer, dim=1)
        iou, dfl = dflkern.box_loss(
            boxes.unflatten(1, (4, 4)), grid["anchor_points"], given[2], fixed.score, normalizer,
            dim=2, matched=fixed.matched, stride=grid["stride"], iou="giou",
        )  # fmt: skip
        return 7.5 * iou + 0.5 * cls + 1.5 * dfl

    assert gradcheck(function, given[:2])
    assert gradgradcheck(function, given[:2])
    derivatives = []
    for total in (found.total, function(*given[:2])):
        first = torch.autograd.grad(total, given[:2], create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), given[:2])
        assert all(each.any() for each in second)
        derivatives.append((total, *first, *second))
    torch.testing.assert_close(*derivatives)


@pytest.mark.parametrize("lists", [False, True])
def test_compiles_to_one_graph(kernels, lists):
    given, grid = problem(batch=1)
    loss = dflkern.DetectionLoss(CLASSES, class_weight=[1.0] * CLASSES)

    def step(boxes, scores):
        if lists:
            return loss(maps(boxes), maps(scores), *given[2:]).total
        return loss(boxes, scores, *given[2:], **grid).total

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = with_grad(given)
        total = function(*leaves[:2])
        results.append((total.detach(), *gradients(total, leaves)))
    torch.testing.assert_close(*results)


def test_autocast_and_half_precision(way):
    """Losses in fp32 under autocast, bit by bit; gradients in the dtype of the logits."""
    given, grid = problem()
    loss = dflkern.DetectionLoss(CLASSES)
    half = with_grad((*(each.bfloat16() for each in given[:2]), *given[2:]))
    plain = loss(*half, **grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*half, **grid)
    for actual, wanted in zip(found[:4], plain[:4], strict=True):
        assert torch.equal(actual, wanted)
        assert actual.dtype == torch.float32
    assert all(each.dtype == torch.bfloat16 for each in gradients(found.total, half))


def test_what_is_kept_serves_later_calls(kernels):
    """Grids and gains first made in inference mode and under FakeTensorMode."""
    from torch._subclasses import FakeTensorMode

    given, _ = problem()
    sizes_of = maps(given[0]), maps(given[1])
    loss = dflkern.DetectionLoss(CLASSES, strides=[8, 16, 32], box_gain=7.25)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(each) for each in levels] for levels in sizes_of]
        loss(*fake, *(mode.from_tensor(each) for each in given[2:]))
    with torch.inference_mode():
        loss(*sizes_of, *given[2:])
    leaves = with_grad(given)
    total = loss(maps(leaves[0]), maps(leaves[1]), *given[2:]).total
    assert all(each.isfinite().all() for each in gradients(total, leaves))


@pytest.mark.parametrize("lists", [False, True])
def test_few_kernels(kernels, lists):
    given, grid = problem()
    loss = dflkern.DetectionLoss(CLASSES)

    def step():
        leaves = with_grad(given)
        if lists:
            boxes, scores = maps(leaves[0]), maps(leaves[1])
            found = loss(boxes, scores, *given[2:])
        else:
            found = loss(*leaves, **grid)
        return gradients(found.total, leaves)

    step()
    assert count_kernels(Work("step", step), "cpu") <= (22 if lists else 16)


def test_nothing_is_mutated(way):
    given, grid = problem()
    before = copy.deepcopy((given, grid))
    leaves = with_grad(given)
    gradients(dflkern.DetectionLoss(CLASSES)(*leaves, **grid).total, leaves)
    for actual, wanted in zip(
        (*given, *grid.values()), (*before[0], *before[1].values()), strict=True
    ):
        assert torch.equal(actual, wanted)


GIVEN, GRID = problem()
BOX, CLS = GIVEN[:2]
LOSS = functools.partial(dflkern.DetectionLoss, CLASSES)
BAD_CALLS = [
    ((BOX[:, :60], CLS), GRID, ValueError, r"box_logits has shape .*; box_logits \(B, 64, A\)"),
    ((BOX, CLS[:, :4]), GRID, ValueError, r"class_logits has shape .* class_logits.mT"),
    ((BOX.mT, CLS), GRID, ValueError, r"box_logits.mT"),
    ((BOX, CLS[..., :7]), GRID, ValueError, "with equal B and A"),
    ((BOX, CLS), {}, ValueError, "anchor_points is missing.*make_anchors"),
    ((BOX, CLS), {"anchor_points": GRID["anchor_points"]}, ValueError, "stride is missing"),
    ((BOX, maps(CLS)), GRID, TypeError, "class_logits is a list|class_logits must"),
    ((maps(BOX), CLS), {}, TypeError, "class_logits is a Tensor"),
    ((maps(BOX)[:2], maps(CLS)), {}, ValueError, "box_logits has 2 maps"),
    ((maps(BOX), maps(CLS)), GRID, ValueError, "Leave them out"),
    ((maps(BOX), maps(CLS)[::-1]), {}, ValueError, r"class_logits\[0\] has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "grid", "error", "words"), BAD_CALLS)
def test_bad_outputs_are_refused_in_words(outputs, grid, error, words):
    with pytest.raises(error, match=words):
        LOSS()(*outputs, *GIVEN[2:], **grid)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_bins": 0}, ValueError, "num_bins=0"),
        ({"topk": 2.5}, TypeError, "topk is 2.5"),
        ({"topk2": 11}, ValueError, "topk2=11; 1 to 10"),
        ({"iou": "siou"}, ValueError, "iou='siou'"),
        ({"class_kind": "focal"}, ValueError, "class_kind='focal'"),
        ({"box_gain": -1.0}, ValueError, "box_gain=-1.0"),
        ({"min_side": float("nan")}, ValueError, "min_side=nan"),
        ({"strides": ()}, ValueError, "pixels per cell of each level"),
        ({"strides": (8, 0)}, ValueError, "each must be above 0"),
        (
            {"class_weight": [1.0]},
            ValueError,
            "class_weight is 1 values; a factor of each of the 5",
        ),
    ],
)
def test_bad_settings_are_refused_in_words(settings, error, words):
    with pytest.raises(error, match=words):
        LOSS(**settings)


def test_missing_image_size_and_objects_with_grad_are_refused():
    given, grid = problem(num_bins=1)
    with pytest.raises(ValueError, match=r"Pass image_size=\(height, width\)"):
        dflkern.DetectionLoss(CLASSES, 1)(*given, **grid)
    with pytest.raises(ValueError, match="gt_boxes requires grad"):
        LOSS()(BOX, CLS, GIVEN[2].clone().requires_grad_(), *GIVEN[3:], **GRID)
