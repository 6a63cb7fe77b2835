"""What class_loss, distance_loss and pack_targets say of wrong arguments; pack_targets itself."""

import math

import pytest
import torch

import dflkern

LOGITS = torch.zeros(2, 5, 3)
MATCHED = torch.zeros(2, 5, dtype=torch.int32)
SCORE = torch.zeros(2, 5)
LABELS = torch.zeros(4, dtype=torch.int64)
DISTANCES = torch.zeros(2, 5, 4)
ANCHORS = torch.zeros(5, 2)
BOXES = torch.zeros(2, 5, 4)


def classes(
    class_logits=LOGITS, matched=MATCHED, score=SCORE, gt_labels=LABELS, normalizer=1.0, **options
):
    return dflkern.class_loss(class_logits, matched, score, gt_labels, normalizer, **options)


def distance(distances=DISTANCES, target_boxes=BOXES, weight=SCORE, normalizer=1.0, **options):
    options = {"anchor_points": ANCHORS, "stride": 8, "image_size": (64, 64), **options}
    points = options.pop("anchor_points")
    return dflkern.distance_loss(distances, points, target_boxes, weight, normalizer, **options)


def pack(*targets):
    return dflkern.pack_targets(list(targets))


def with_grad(tensor):
    return tensor.clone().requires_grad_()


GOOD = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2, dtype=torch.int64)}


def target(**changes):
    return {**GOOD, **changes}


CASES = [
    # given, accepted, way out
    (classes, {"class_logits": LOGITS.int()}, TypeError, "class_logits has dtype torch.int32", ".float()"),
    (classes, {"class_logits": LOGITS[0]}, ValueError, "class_logits has shape (5, 3) with dim=-1; (B, A, C)", "flatten(2)"),
    (classes, {"class_logits": torch.zeros(2, 3, 4, 4), "dim": 1}, ValueError, "shape (2, 3, 4, 4)", "A map (B, C, H, W)"),
    (classes, {"dim": 0}, ValueError, "with dim=0; (B, A, C) with dim=-1", "(B, C, A) with dim=1"),
    (classes, {"dim": "1"}, TypeError, "dim is '1'; an integer", "needed"),
    (classes, {"class_logits": torch.zeros(2, 5, 0)}, ValueError, "no class along dim=2; one at least", "pass that axis"),
    (classes, {"dim": 1}, ValueError, "matched has shape (2, 5); (2, 3)", "needed"),
    (classes, {"matched": SCORE}, TypeError, "matched is torch.float32; an int32 or int64", "matched.long()"),
    (classes, {"matched": MATCHED.short()}, TypeError, "matched is torch.int16", "matched.long()"),
    (classes, {"matched": [0]}, TypeError, "matched is list", "int64 tensor"),
    (classes, {"matched": MATCHED.to("meta")}, ValueError, "matched is on meta and the first tensor is on cpu", ".to('cpu')"),
    (classes, {"score": MATCHED}, TypeError, "score has dtype torch.int32", "score.float()"),
    (classes, {"score": SCORE[:1]}, ValueError, "score has shape (1, 5); (2, 5)", "needed"),
    (classes, {"score": with_grad(SCORE)}, ValueError, "score requires grad, but only the first", "score.detach()"),
    (classes, {"gt_labels": LABELS.float()}, TypeError, "gt_labels is torch.float32", "gt_labels.long()"),
    (classes, {"gt_labels": LABELS[None]}, ValueError, "gt_labels has shape (1, 4); one axis", "the class of each object"),
    (classes, {"normalizer": "1"}, TypeError, "normalizer is '1'; a number", "needed"),
    (classes, {"normalizer": torch.ones(1)}, ValueError, "normalizer has shape (1,); ()", "needed"),
    (classes, {"kind": "focal"}, ValueError, "kind='focal' is not known; accepted", "'bce', 'varifocal', 'quality'"),
    (classes, {"alpha": -1}, ValueError, "alpha=-1; it must be finite", "at least 0"),
    (classes, {"gamma": math.nan}, ValueError, "gamma=nan; it must be finite", "at least 0"),
    (classes, {"gamma": math.inf}, ValueError, "gamma=inf; it must be finite", "at least 0"),
    (classes, {"gamma": "2"}, TypeError, "gamma is '2'; a number", "needed"),
    (classes, {"class_weight": torch.ones(4)}, ValueError, "class_weight has shape (4,); (3,)", "needed"),
    (classes, {"class_weight": with_grad(torch.ones(3))}, ValueError, "class_weight requires grad", "detach()"),
    (distance, {"distances": DISTANCES[..., :3]}, ValueError, "distances has shape (2, 5, 3); (2, 5, 4)", "needed"),
    (distance, {"distances": DISTANCES[0]}, ValueError, "distances has shape (5, 4) with dim=-1; (B, A, 4)", "(B, 4, A) with dim=1"),
    (distance, {"anchor_points": ANCHORS[:4]}, ValueError, "anchor_points have shape (4, 2); (5, 2)", "make_anchors"),
    (distance, {"target_boxes": BOXES[0]}, ValueError, "target_boxes has shape (5, 4); (2, 5, 4)", "needed"),
    (distance, {"matched": MATCHED}, ValueError, "target_boxes has shape (2, 5, 4); (2, 4)", "needed"),
    (distance, {"matched": SCORE, "target_boxes": BOXES[0]}, TypeError, "matched is torch.float32", "matched.long()"),
    (distance, {"matched": MATCHED, "target_boxes": BOXES[0], "foreground": SCORE > 0}, ValueError, "foreground and matched are both given", "Leave foreground out"),
    (distance, {"foreground": SCORE}, TypeError, "foreground is torch.float32; a bool tensor", ".bool()"),
    (distance, {"weight": SCORE[:1]}, ValueError, "weight has shape (1, 5); (2, 5)", "needed"),
    (distance, {"stride": torch.ones(4)}, ValueError, "stride has shape (4,); (5, 1) or (5,)", "needed"),
    (distance, {"image_size": 640}, TypeError, "image_size has type int; two numbers (height, width)", "images.shape[-2:]"),
    (distance, {"image_size": torch.ones(2)}, TypeError, "image_size has type Tensor", "images.shape[-2:]"),
    (distance, {"image_size": (640, 0)}, ValueError, "image_size is (640, 0); (height, width)", "above 0"),
    (distance, {"image_size": (640,)}, ValueError, "image_size is (640,); (height, width)", "above 0"),
    (distance, {"image_size": (640, "640")}, TypeError, "a side of image_size is '640'", "number is needed"),
    (distance, {"iou": "siou"}, ValueError, "iou='siou' is not known; accepted", "'ciou'"),
]  # fmt: skip
TARGETS = [
    ([], ValueError, "targets are empty", "(0, 4)"),
    (GOOD, TypeError, "targets are a dict; a list of", "one for each image"),
    ([GOOD, GOOD["boxes"]], TypeError, "targets[1] is Tensor; a list of", "labels"),
    ([target(), {"boxes": GOOD["boxes"]}], TypeError, "targets[1] is ['boxes']; a list of", "labels"),
    ([target(boxes=torch.zeros(2, 5))], ValueError, "targets[0]: boxes have shape (2, 5); (n, 4)", "(0, 4)"),
    ([target(boxes=torch.zeros(0))], ValueError, "targets[0]: boxes have shape (0,); (n, 4)", "(0, 4)"),
    ([target(boxes=torch.zeros(2, 4).long())], TypeError, "targets[0]: boxes has dtype torch.int64", ".float()"),
    ([target(labels=torch.zeros(3).long())], ValueError, "targets[0]: labels has shape (3,); (2,)", "needed"),
    ([target(labels=torch.zeros(2))], TypeError, "targets[0]: labels is torch.float32", "labels.long()"),
    ([GOOD, target(boxes=torch.zeros(2, 4).double())], ValueError, "targets[1]: boxes are torch.float64 on cpu, those", "Convert"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "kind", "first", "second"), CASES)
def test_words(function, given, kind, first, second):
    with pytest.raises(kind) as error:
        function(**given)
    words = str(error.value)
    assert first in words
    assert second in words
    assert words.partition(":")[0] == ("class_loss" if function is classes else "distance_loss")
    assert words.endswith(".")


@pytest.mark.parametrize(("targets", "kind", "first", "second"), TARGETS)
def test_words_on_targets(targets, kind, first, second):
    with pytest.raises(kind) as error:
        dflkern.pack_targets(targets)
    words = str(error.value)
    assert first in words
    assert second in words
    assert words.startswith("pack_targets: ")
    assert words.endswith(".")


def test_the_defaults_of_these_tests_are_accepted():
    assert classes().shape == ()
    assert len(distance()) == 2
    assert len(pack(GOOD)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_pack_targets(dtype, integer):
    counts = (2, 0, 3)
    boxes = [torch.rand(n, 4, dtype=dtype) for n in counts]
    labels = [torch.randint(0, 9, (n,), dtype=integer) for n in counts]
    found = pack(*({"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)))
    assert torch.equal(found[0], torch.cat(boxes))
    assert torch.equal(found[1], torch.cat(labels))
    assert found[2].tolist() == [0, 0, 2, 2, 2]
    assert [each.dtype for each in found] == [dtype, integer, torch.int64]


def test_pack_targets_of_images_without_objects():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "id": "x"}
    assert [tuple(each.shape) for each in pack(empty, empty)] == [(0, 4), (0,), (0,)]


def test_packed_targets_are_what_the_losses_take():
    gt_boxes, gt_labels, _ = pack(GOOD, GOOD)
    matched = torch.tensor([[0, -1, 1, 4, 5], [3, 2, -1, -1, 0]])
    assert classes(matched=matched, gt_labels=gt_labels).isfinite()
    assert all(loss.isfinite() for loss in distance(target_boxes=gt_boxes, matched=matched))
