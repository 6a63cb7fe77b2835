"""task_aligned_assign against Ultralytics' TaskAlignedAssigner, on random and on real objects."""

import pytest
import torch

from assignment import KINDS, STRIDES, close_images, differences, run, scene, tables
from label_files import FILES, data

tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
# Ultralytics 8.3 enlarges no small objects, and has no topk2
OLD = not hasattr(tal.TaskAlignedAssigner(), "stride_val")
MIN_SIDE = 0.0 if OLD else 16.0
OPTIONS = ({}, {"topk": 13, "alpha": 1.0}, *([] if OLD else [{"topk": 7, "topk2": 1}]))


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WithoutZeros(tal.TaskAlignedAssigner):
    """Upstream without the metrics of 0 with which torch.topk fills up a short list."""

    def select_topk_candidates(self, metrics, topk_mask=None):
        return super().select_topk_candidates(metrics, topk_mask) * (metrics > 0)


def upstream(given, kind=WithoutZeros, topk=10, topk2=None, alpha=0.5):
    """(matched, score, sum) of Ultralytics' assigner, which takes padded objects."""
    batch, _, classes = given["class_logits"].shape
    counts = torch.bincount(given["gt_image"], minlength=batch)
    shape = (batch, int(counts.max()))
    first = counts.cumsum(0) - counts
    number = torch.full(shape, -1)
    boxes, labels = torch.zeros(*shape, 4), torch.zeros(*shape, 1)
    for image in range(batch):
        mine = slice(int(first[image]), int(first[image] + counts[image]))
        size = int(counts[image])
        number[image, :size] = torch.arange(mine.start, mine.stop)
        boxes[image, :size] = given["gt_boxes"][mine]
        labels[image, :size, 0] = given["gt_labels"][mine].float()
    new = {} if OLD else {"topk2": topk2, "stride": list(STRIDES)}
    assigner = kind(topk=topk, num_classes=classes, alpha=alpha, beta=6.0, **new)
    _, _, scores, foreground, index = assigner(
        given["class_logits"].sigmoid(), given["boxes"], given["anchor_points"] * given["stride"],
        labels, boxes, boxes.sum(2, keepdim=True) > 0,
    )  # fmt: skip
    if shape[1] == 0:
        return torch.full(foreground.shape, -1), scores.sum(-1), scores.sum()
    matched = torch.where(foreground, number.gather(1, index.long()), -1)
    return matched, scores.sum(-1), scores.sum()


def check(given, **options):
    """Images in which rounding may decide; all others are assigned alike."""
    close = close_images(given, min_side=MIN_SIDE, **options)
    images = set(range(len(given["boxes"]))) - close
    found = run(given, min_side=MIN_SIDE, **options)
    other, gap = differences(found, upstream(given, **options), images)
    assert other == 0
    assert gap <= 2e-6  # either is as far from the scores in float64, where rounding is the sixth
    return len(close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_every_anchor_is_matched_alike(kind, trained):
    images = close = 0
    for seed in range(100, 108):
        given = scene(seed, kind, trained)
        for options in OPTIONS:
            close += check(given, **options)
            images += 3
    assert close <= 0.01 * images


def zero_filled(given, topk):
    """Objects with fewer than topk metrics above 0, and a candidate whose metric is 0."""
    inside, overlap, _ = tables(given, MIN_SIDE, "ciou", 0.5, 6.0)
    positive = (inside & (overlap > 0)).sum(1)
    return (positive < topk) & (inside.sum(1) > positive)


@pytest.mark.parametrize("kind", ["usual", "crowd", "tiny", "border"])
def test_stock_upstream_differs_only_where_it_claims_metrics_of_zero(kind):
    counted = foreground = 0
    for seed in range(10):
        given = scene(seed, kind, trained=seed % 2 == 0)
        filled = set(given["gt_image"][zero_filled(given, 10)].tolist())
        images = set(range(3)) - filled
        found, stock = run(given, min_side=MIN_SIDE), upstream(given, tal.TaskAlignedAssigner)
        other, gap = differences(found, stock, images)
        assert other == 0
        assert gap <= 2e-6
        # What it claims beyond is foreground of weight 0, or a conflict that comes of it
        counted += differences(found, stock, filled)[0]
        foreground += int((found.matched >= 0).sum())
        extra = (stock[0] >= 0) & (found.matched < 0)
        assert not stock[1][extra].any()
    assert counted <= 0.05 * foreground


@pytest.mark.parametrize(("source", "name"), FILES)
@pytest.mark.parametrize("trained", [False, True])
def test_real_crowds_are_assigned_alike(source, name, trained):
    boxes, image = source(name)
    boxes = boxes[:300]  # of a video: several frames together
    assert len(boxes) > 30
    given = scene(0, trained=trained, batch=2, image=image, classes=3, boxes=boxes)
    assert check(given) == 0


def test_label_files_are_where_they_are_looked_for():
    for package in ("deepforest", "motmetrics"):
        assert data(package).is_dir()
