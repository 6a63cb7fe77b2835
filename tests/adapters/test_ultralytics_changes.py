"""What users change about Ultralytics' criteria, under patch(): the results are as without it."""

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

from ultralytics.utils import loss

from criteria import (
    BINS,
    ORIGINAL,
    OTHER_POSITIONS,
    box_losses,
    compare,
    criterion,
    inputs,
    installed,
    run,
    with_gradient,
)
from dflkern.adapters import _ultralytics_known as known


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


class SquaredLoss(nn.Module):
    reg_max = BINS

    def forward(self, pred_dist, target):
        return (pred_dist.mean(-1).view(target.shape) - target).pow(2).mean(-1, keepdim=True)


class DoubledLoss(loss.DFLoss):
    def __call__(self, pred_dist, target):
        return 2 * super().__call__(pred_dist, target)


def another_loss(made):
    made.bbox_loss.dfl_loss = SquaredLoss()


def a_subclass_of_the_loss(made):
    made.bbox_loss.dfl_loss = DoubledLoss(BINS)


def positions_scaled_in_place(made):
    made.proj *= 0.5


def positions_changed_through_data(made):
    made.proj.data[3] = 7


def other_positions(made):
    made.proj = OTHER_POSITIONS.clone()


def decode_shadowed_on_the_instance(made):
    decode = made.bbox_decode
    made.bbox_decode = lambda *args: decode(*args) + 0.25


def decoding(change):
    """A change by a subclass: to what the inherited bbox_decode returns."""

    class Changed(loss.v8DetectionLoss):
        def bbox_decode(self, anchor_points, pred_dist):
            return change(super().bbox_decode, anchor_points, pred_dist)

    def to_subclass(made):
        made.__class__ = Changed

    to_subclass.__name__ = change.__name__
    return to_subclass


@decoding
def boxes_edited_in_place(decode, points, logits):
    boxes = decode(points, logits)
    boxes[..., 2:] += 0.5
    return boxes


@decoding
def boxes_edited_through_a_detached_view(decode, points, logits):
    boxes = decode(points, logits)
    boxes.detach().clamp_(0, 8)
    return boxes


@decoding
def new_boxes(decode, points, logits):
    return decode(points, logits) * 1.1


@decoding
def copied_boxes(decode, points, logits):
    return decode(points, logits).clone()


@decoding
def boxes_without_gradient(decode, points, logits):
    with torch.no_grad():
        return decode(points, logits)


@decoding
def boxes_detached_in_place(decode, points, logits):
    return decode(points, logits).detach_()


@decoding
def boxes_with_a_gradient_hook(decode, points, logits):
    boxes = decode(points, logits)
    boxes.register_hook(lambda grad: grad * 3)
    return boxes


@decoding
def boxes_of_other_logits(decode, points, logits):
    return decode(points, logits * 2)


@decoding
def boxes_around_other_points(decode, points, logits):
    return decode(points + 0.5, logits)


CRITERION = {
    another_loss: known.LOSS,
    a_subclass_of_the_loss: known.LOSS,
    positions_scaled_in_place: known.POSITIONS,
    positions_changed_through_data: known.POSITIONS,
    other_positions: known.POSITIONS,
    decode_shadowed_on_the_instance: known.BOXES,
    boxes_edited_in_place: known.BOXES,
    boxes_edited_through_a_detached_view: known.BOXES,
    new_boxes: known.BOXES,
    copied_boxes: known.BOXES,
    boxes_with_a_gradient_hook: known.BOXES,
    boxes_of_other_logits: known.BOXES,
    boxes_around_other_points: known.BOXES,
}


@pytest.mark.parametrize("change", CRITERION, ids=lambda change: change.__name__)
def test_a_changed_criterion(change):
    made, given = criterion(), inputs()
    change(made)
    compare(lambda: run(made, given), CRITERION[change])


@pytest.mark.parametrize(
    "change", [boxes_without_gradient, boxes_detached_in_place], ids=lambda change: change.__name__
)
def test_boxes_that_pass_no_gradient_on(change):
    made, given = criterion(), inputs()
    change(made)

    def losses():
        leaf = given.logits.clone().requires_grad_()
        boxes = made.bbox_decode(given.points, leaf)
        return with_gradient(leaf, sum(box_losses(made.bbox_loss, leaf, boxes, given)))

    compare(losses, known.BOXES)
