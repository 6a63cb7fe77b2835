"""`doctor.watch`: sees the losses of a running training, and changes nothing in it."""

import pytest
import torch
from torch import nn

import dflkern
from dflkern import doctor

NUM_BINS = 16


def assigned(seed, count=40):
    """Boxes in pixels with their anchor points in cells and strides."""
    g = torch.Generator().manual_seed(seed)
    points, stride = dflkern.make_anchors([(16, 16), (8, 8)], [8, 16])
    anchor = torch.randint(len(points), (count,), generator=g)
    points, stride = points[anchor], stride[anchor]
    sides = 0.3 + 9 * torch.rand(count, 4, generator=g)
    return dflkern.dist2bbox(sides, points) * stride, points, stride


class Model(nn.Module):
    """Learns a few boxes by heart; its loss is a module within it."""

    def __init__(self, unit=True):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 32), nn.Linear(32, 4 * NUM_BINS)
        self.loss = dflkern.DFLoss(reduction="mean")
        self.unit = unit

    def forward(self, seed):
        boxes, points, stride = assigned(seed)
        targets = dflkern.dfl_targets(
            boxes, points if self.unit else points * stride, stride if self.unit else 1.0, NUM_BINS
        )
        logits = self.head(self.body(boxes / 100).relu()).view(-1, 4, NUM_BINS)
        return self.loss(logits, targets)


def train(model, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        loss = model(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_healthy_training():
    model = Model()
    with doctor.watch(model) as w:
        train(model)
    assert w.report.healthy
    assert set(w.report.examined) == {"targets", "logits", "losses", "gradients"}
    assert w.report.num_bins == NUM_BINS
    assert w.report.levels[0].count == 12 * 40 * 4


def test_a_training_without_the_stride():
    model = Model(unit=False)
    with doctor.watch(model) as w:
        train(model)
    finding = w.report.findings[0]
    assert finding.code == "at-clamp"  # the loss sees neither boxes nor strides
    assert "wrong units" in finding.cause


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_watching_changes_no_number(backend):
    with dflkern.use_backend(backend):
        plain, watched = Model(), Model()
        expected = train(plain)
        state = torch.random.get_rng_state()
        with doctor.watch(watched):
            assert train(watched) == expected
        for mine, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        plain, _ = Model(), torch.random.set_rng_state(state)


def train_and_fail(model, w):
    with w:
        train(model, 2)
        raise ZeroDivisionError


def test_everything_is_undone():
    from torch.nn.modules import module as hooks

    model = Model()
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    w = doctor.watch(model)
    with pytest.raises(ZeroDivisionError):
        train_and_fail(model, w)
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    seen = w.report.levels[0].count
    train(model, 2)
    assert w.report.levels[0].count == seen == 2 * 40 * 4


def test_memory_is_bounded():
    loss = dflkern.DFLoss()
    with doctor.watch(loss, steps=3) as w:
        for _ in range(6):
            loss(torch.randn(5000, 4, NUM_BINS), 5 * torch.rand(5000, 4))
    assert w.report.levels[0].count <= 3 * 256 * 4
    assert w._samples.rows()["logits"].numel() <= 3 * 256 * 4 * NUM_BINS
    assert len(w._losses.values()) == 6


def box_loss_arguments(dim, pixels):
    boxes, points, stride = assigned(0, 60)
    cells = boxes if pixels else boxes / stride
    logits = torch.randn(1, 60, 4, NUM_BINS, requires_grad=True)
    logits = logits.permute(0, 2, 3, 1) if dim == 2 else logits
    foreground = torch.arange(60)[None] % 3 == 0
    weight = torch.rand(1, 60) + 0.1
    return (logits, points, cells[None], weight, weight.sum(), foreground), stride


@pytest.mark.parametrize("dim", [-1, 2])
def test_box_loss(dim):
    loss = dflkern.BoxLoss(dim=dim)
    for pixels, code in ((False, None), (True, "pixels")):
        given, stride = box_loss_arguments(dim, pixels)
        with doctor.watch(loss, stride=stride) as w:
            loss(*given)
        assert w.report.levels[0].count + w.report.levels[1].count == 20 * 4
        assert w.report.healthy is not pixels
        assert {"boxes", "weight", "normalizer", "losses"} <= set(w.report.examined)
        if code:
            assert w.report.findings[0].code == code


def test_a_loss_within_a_loss_is_seen_once():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = dflkern.DFLoss()

        def forward(self, pred_dist, target):
            return self.inner(pred_dist.view(-1, 4, NUM_BINS), target)

    outer = Outer()
    with doctor.watch(outer) as w:
        outer(torch.randn(30, 4, NUM_BINS), 9 * torch.rand(30, 4))
    assert w.report.levels[0].count == 30 * 4


def test_another_loss_is_not_watched():
    mine, other = dflkern.DFLoss(), dflkern.DFLoss()
    with doctor.watch(mine) as w:
        other(torch.randn(30, 4, NUM_BINS), 9 * torch.rand(30, 4))
    with pytest.raises(RuntimeError, match=r"no DFL loss was called .* record"):
        _ = w.report


def test_other_losses_are_left_alone():
    class Regression(nn.Module):
        def forward(self, pred, target):
            return (pred - target).abs().mean()

    class Classes(nn.Module):
        def forward(self, logits, target):
            return nn.functional.cross_entropy(logits, target)

    with doctor.watch() as w:
        Regression()(torch.randn(9, 4), torch.randn(9, 4))
        Classes()(torch.randn(9, 20), torch.randint(20, (9,)))
        dflkern.DFLoss()(torch.randn(30, 4, NUM_BINS), 9 * torch.rand(30, 4))
    assert w.report.levels[0].count == 30 * 4
    assert w.report.examined == ("targets", "logits", "losses")


def test_rows_of_single_distributions():
    """The arguments of mmdet's DistributionFocalLoss, a row for each side."""

    class DistributionFocalLoss(nn.Module):
        def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
            return dflkern.dfl_loss(pred, target, weight=weight, reduction="sum") / avg_factor

    loss = DistributionFocalLoss()
    with doctor.watch(loss) as w:
        for _ in range(3):
            loss(torch.randn(200, 17), 9 * torch.rand(200), weight=torch.rand(200), avg_factor=4.0)
    assert w.report.healthy
    assert w.report.num_bins == 17
    assert w.report.levels[0].count == 3 * 200
    assert set(w.report.examined) == {"targets", "logits", "weight", "normalizer", "losses"}


def test_a_strange_loss_does_not_stop_the_training():
    class Strange(nn.Module):
        def forward(self, logits, target_boxes, anchor_points):
            return target_boxes["sum"]

    with doctor.watch() as w:
        assert Strange()(torch.zeros(3, 4), {"sum": 7}, None) == 7
        dflkern.DFLoss()(torch.randn(30, 4, NUM_BINS), 9 * torch.rand(30, 4))
    assert w.report.levels[0].count == 30 * 4


def test_box_loss_without_strides():
    given, _ = box_loss_arguments(-1, pixels=False)
    with doctor.watch() as w:
        dflkern.BoxLoss()(*given)
    assert w.report.healthy
    assert [level.stride for level in w.report.levels] == [None]


def test_a_loss_that_is_a_function():
    boxes, points, stride = assigned(0)
    targets = dflkern.dfl_targets(boxes, points * stride, 1.0, NUM_BINS)
    logits = torch.randn(40, 4, NUM_BINS)
    loss = dflkern.dfl_loss(logits, targets)
    with doctor.watch() as w:
        w.record(
            logits=logits, targets=targets, boxes=boxes, anchor_points=points, stride=stride,
            weight=torch.rand(40), normalizer=3.0, loss=loss.mean(),
        )  # fmt: skip
    assert w.report.findings[0].code == "pixels"


# --- Ultralytics --------------------------------------------------------------------------------

ultralytics = pytest.importorskip(
    "ultralytics", reason="needs Ultralytics (pip install ultralytics), which is not installed"
)


class Undivided(nn.Module):
    """Ultralytics' BboxLoss, given boxes that were never divided by the stride."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        given = list(args)
        given[3] = given[3] * given[8]  # target_bboxes and stride
        return self.inner(*given)


def yolo():
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.args = get_cfg()
    return model.train()


def train_yolo(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    numbers = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        size = 0.15 + 0.5 * torch.rand(8, 2, generator=g)
        centre = size / 2 + (1 - size) * torch.rand(8, 2, generator=g)
        batch = {
            "img": torch.rand(4, 3, 96, 96, generator=g),
            "cls": torch.randint(3, (8, 1), generator=g).float(),
            "bboxes": torch.cat((centre, size), 1),
            "batch_idx": torch.arange(8) // 2,
        }
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        numbers.append(loss.detach().clone())
    return torch.stack(numbers)


def test_ultralytics_gets_a_clean_bill():
    model = yolo()
    with doctor.watch(model) as w:
        watched = train_yolo(model)
    assert w.report.healthy, w.report
    assert {"boxes", "anchor_points", "stride", "logits", "gradients"} <= set(w.report.examined)
    assert {level.stride for level in w.report.levels} <= {8, 16, 32}
    assert torch.equal(train_yolo(yolo()), watched)


def test_ultralytics_without_the_stride_division_is_caught():
    model = yolo()
    model.criterion = model.init_criterion()
    model.criterion.bbox_loss = Undivided(model.criterion.bbox_loss)
    with doctor.watch(model) as w:
        train_yolo(model, 2)
    assert w.report.findings[0].code == "pixels"
    assert not w.report.healthy


def test_ultralytics_dfl_loss_alone():
    """It replaces `__call__`, so no hook sees it, and clamps its targets in place."""
    from ultralytics.utils.loss import DFLoss

    loss, call = DFLoss(NUM_BINS), DFLoss.__call__
    targets = torch.rand(50, 4) * 9
    targets[:5] = 40
    with doctor.watch(loss) as w:
        loss(torch.randn(200, NUM_BINS), targets)
    assert DFLoss.__call__ is call
    assert w.report.findings[0].code == "above-range"
    assert w.report.levels[0].largest == 40
    assert "losses" in w.report.examined
