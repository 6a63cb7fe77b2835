"""DetectionLoss against Ultralytics' v8DetectionLoss: losses, gradients and assignments."""

import types

import pytest
import torch
from torch import nn

import dflkern
from assignment import KINDS, STRIDES, scene

loss = pytest.importorskip("ultralytics.utils.loss", reason="ultralytics is not installed")
tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
if not hasattr(tal.TaskAlignedAssigner(), "stride_val"):
    pytest.skip("Ultralytics 8.3 enlarges no small objects", allow_module_level=True)

IMAGE, CLASSES, BATCH = 320, 5, 3
SIZES = [(IMAGE // stride,) * 2 for stride in STRIDES]
SEEDS = range(8)


def criterion(classes, num_bins=16, topk=10, topk2=None):
    """Ultralytics' loss for a head of which it reads the settings alone."""
    from ultralytics.cfg import get_cfg

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.args = nn.Parameter(torch.zeros(1)), get_cfg()
            head = {"stride": torch.tensor(STRIDES).float(), "nc": classes, "reg_max": num_bins}
            self.model = [types.SimpleNamespace(**head)]

    return loss.v8DetectionLoss(Model(), tal_topk=topk, tal_topk2=topk2)


class WithoutZeros(tal.TaskAlignedAssigner):
    """Upstream without the metrics of 0 with which torch.topk fills up a short list."""

    def select_topk_candidates(self, metrics, topk_mask=None):
        return super().select_topk_candidates(metrics, topk_mask) * (metrics > 0)


def upstream(given, box_logits, class_logits, classes, without_zeros=True, **settings):
    """(losses without the factor of the batch, matched) of Ultralytics."""
    found = criterion(classes, box_logits.shape[1] // 4, **settings)
    if without_zeros:
        found.assigner.__class__ = WithoutZeros
    assigned = []
    found.assigner.register_forward_hook(lambda _, args, results: assigned.append(results))
    batch = {
        "batch_idx": given["gt_image"].float(), "cls": given["gt_labels"][:, None].float(),
        "bboxes": given["fractions"],
    }  # fmt: skip
    feats = [torch.zeros(len(box_logits), 1, *size) for size in SIZES]
    outputs = {"boxes": box_logits, "scores": class_logits, "feats": feats}
    losses, _ = found(outputs, batch)
    _, _, _, foreground, index = assigned[0]
    counts = torch.bincount(given["gt_image"], minlength=len(box_logits))
    index = index + (counts.cumsum(0) - counts)[:, None]
    return losses / len(box_logits), torch.where(foreground, index, -1)


def rounded(given):
    """With boxes as fractions of the image, and what Ultralytics makes of them in pixels."""
    first, second = given["gt_boxes"].chunk(2, 1)
    fractions = torch.cat(((first + second) / 2, second - first), 1) / IMAGE
    centre, size = (fractions * IMAGE).chunk(2, 1)
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
    return {**given, "gt_boxes": boxes, "fractions": fractions}


def outputs(given, seed, num_bins, trained):
    """Random box logits, peaked at roughly the given boxes if trained."""
    g = torch.Generator().manual_seed(seed)
    boxes = given["boxes"]
    distance = dflkern.bbox2dist(given["anchor_points"], boxes / given["stride"]).mT
    if num_bins == 1:
        return distance.clone().requires_grad_()
    bins = torch.arange(num_bins)[:, None]
    noise = torch.randn(*distance.shape[:2], num_bins, distance.shape[2], generator=g)
    peaked = -((bins - distance[:, :, None]) ** 2) if trained else 0
    return (noise + peaked).flatten(1, 2).requires_grad_()


def compare(kind, seed, trained, num_bins=16, **settings):
    """How many anchors are matched otherwise; where none is, losses and gradients agree."""
    given = rounded(scene(seed, kind, trained, batch=BATCH, image=IMAGE, classes=CLASSES))
    box_logits = outputs(given, seed, num_bins, trained)
    class_logits = given["class_logits"].mT.contiguous().requires_grad_()
    classes = class_logits.shape[1]
    expected, matched = upstream(given, box_logits, class_logits, classes, **settings)
    found = dflkern.DetectionLoss(classes, num_bins, **settings)(
        box_logits, class_logits, given["gt_boxes"], given["gt_labels"], given["gt_image"],
        anchor_points=given["anchor_points"], stride=given["stride"], image_size=(IMAGE, IMAGE),
    )  # fmt: skip
    other = int((found.assignment.matched != matched).sum())
    if other:
        return other
    actual = torch.stack((found.box, found.cls, found.dfl))
    assert ((actual - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
    leaves = box_logits, class_logits
    gradients = (torch.autograd.grad(total, leaves) for total in (found.total, expected.sum()))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
    return 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_losses_and_gradients(kind, trained):
    """Rounding may decide between nearly equal metrics: in one comparison of a hundred at most."""
    others = [compare(kind, seed, trained) for seed in SEEDS]
    assert sum(other > 0 for other in others) <= 1, others


@pytest.mark.parametrize("settings", [{"num_bins": 1}, {"topk": 7, "topk2": 1}], ids=str)
def test_other_heads_and_settings(settings):
    others = [compare(kind, 50, True, **settings) for kind in KINDS]
    assert sum(other > 0 for other in others) <= 1, others
