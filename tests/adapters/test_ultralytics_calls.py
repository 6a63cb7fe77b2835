"""Calls of Ultralytics' losses that its own training never makes, under patch(): as without it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

from ultralytics.utils import loss

from criteria import (
    BINS,
    OLD,
    ORIGINAL,
    OTHER_POSITIONS,
    box_losses,
    compare,
    criterion,
    inputs,
    installed,
    run,
    said,
    with_gradient,
)
from dflkern.adapters import _ultralytics_known as known
from dflkern.adapters.ultralytics import patch


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


def test_an_unchanged_criterion_runs_on_the_logits_alone():
    made, given = criterion(), inputs()
    compare(lambda: run(made, given))
    with patch():
        boxes = made.bbox_decode(given.points, given.logits)
        losses = box_losses(made.bbox_loss, given.logits, boxes, given)
        boxes.data.fill_(torch.nan)  # which PyTorch does not record
        again = box_losses(made.bbox_loss, given.logits, boxes, given)
    assert torch.equal(torch.stack(again), torch.stack(losses))


def test_a_box_loss_that_calls_the_inherited_one_is_served():
    class Halved(loss.BboxLoss):
        def forward(self, *args):
            iou_loss, dfl = super().forward(*args)
            return iou_loss / 2, dfl / 2

    made, given = criterion(), inputs()
    made.bbox_loss = Halved(BINS)
    compare(lambda: run(made, given))


def test_the_boxes_gradient_is_kept_where_it_is_asked_for():
    made, given = criterion(), inputs()

    def boxes_gradient():
        leaf = given.logits.clone().requires_grad_()
        boxes = made.bbox_decode(given.points, leaf)
        boxes.retain_grad()
        box_losses(made.bbox_loss, leaf, boxes, given)[0].backward()
        return boxes.grad

    compare(boxes_gradient, known.BOXES)


@pytest.mark.parametrize("name", ["proj", "scores"])
def test_gradients_to_other_inputs(name):
    """Such as positions that are trained, or weights that depend on the predictions."""

    def gradient():
        made, given = criterion(), copy.deepcopy(INPUTS)
        if name == "proj":
            leaf = made.proj = nn.Parameter(made.proj)
        else:
            leaf = given.scores.requires_grad_()
        boxes = made.bbox_decode(given.points, given.logits)
        iou_loss, dfl = box_losses(made.bbox_loss, given.logits, boxes, given)
        return torch.autograd.grad(iou_loss + dfl, leaf)

    compare(gradient, *([known.POSITIONS, known.BOXES] if name == "proj" else [known.ARGUMENTS]))


INPUTS = inputs()


@pytest.mark.parametrize("name", ["bbox_iou", "bbox2dist", "dist2bbox"])
def test_a_function_that_ultralytics_calls_is_replaced(name, monkeypatch):
    made, given, before = criterion(), inputs(), getattr(loss, name)

    def other(*args, **kwargs):
        result = before(*args, **kwargs)
        return result * 0.9

    with patch(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        monkeypatch.setattr(loss, name, other)
        actual = [run(made, given), run(made, given)][1]
    assert f"because ultralytics.utils.loss.{name} has been replaced." in said(record)[0]
    assert len(said(record)) == (2 if name == "dist2bbox" else 1)  # its boxes are unknown then
    torch.testing.assert_close(actual, run(made, given), rtol=1e-4, atol=1e-5)


def test_the_dfl_loss_is_replaced_on_its_class_after_patch(monkeypatch):
    made, given = criterion(), inputs()

    def tripled(self, pred_dist, target):
        return 3 * ORIGINAL[0](self, pred_dist, target)

    with patch(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with monkeypatch.context() as context:
            context.setattr(loss.DFLoss, "__call__", tripled)
            actual = run(made, given), run(made, given)
            assert [known.CALL in text for text in said(record)] == [True]
    with monkeypatch.context() as context:
        context.setattr(loss.DFLoss, "__call__", tripled)
        expected = run(made, given), run(made, given)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(OLD, reason="Ultralytics 8.3 raises, and so it does under patch()")
def test_a_dfl_loss_for_another_number_of_bins():
    made, given = criterion(), inputs()
    made.bbox_loss = loss.BboxLoss(BINS // 2)
    compare(lambda: run(made, given), known.LOSS, known.ARGUMENTS)


def test_rows_of_another_number_of_bins_raise_as_before():
    rows, targets = torch.randn(8, BINS - 1), torch.full((2, 4), BINS - 1.0)
    with pytest.raises((RuntimeError, IndexError)) as expected:
        loss.DFLoss(BINS)(rows, targets.clone())
    with (
        patch(),
        pytest.warns(UserWarning, match=known.ARGUMENTS),
        pytest.raises(type(expected.value)) as actual,
    ):
        loss.DFLoss(BINS)(rows, targets.clone())
    assert str(actual.value) == str(expected.value)


def test_logits_edited_between_decode_and_loss():
    """Without gradients as unpatched; with them autograd raises, as the decode needs the logits."""
    made, given = criterion(), inputs()

    def losses(leaf):
        logits = leaf * 1
        boxes = made.bbox_decode(given.points, logits)
        logits.detach().clamp_(-1, 1)
        return box_losses(made.bbox_loss, logits, boxes, given)

    compare(lambda: losses(given.logits), known.BOXES)
    with patch():
        with pytest.warns(UserWarning, match=known.BOXES):
            total = sum(losses(given.logits.clone().requires_grad_()))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.parametrize("targets", [(5, 4), (20,), (0, 4)], ids=str)
def test_dfl_targets_of_any_shape(targets):
    count = int(torch.tensor(targets).prod())
    rows, target = torch.randn(count, BINS), torch.rand(targets) * 17
    compare(lambda: loss.DFLoss(BINS)(rows, target.clone()))


def test_a_rotated_criterion_with_other_positions():
    """They may be any, since only the decode reads them."""
    made, given = criterion(loss.v8OBBLoss, OTHER_POSITIONS), inputs()

    def rotated():
        leaf = given.logits.clone().requires_grad_()
        return with_gradient(leaf, made.bbox_decode(given.points, leaf, given.angle))

    compare(rotated)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(mode):
    """PyTorch records no changes of inference tensors: their boxes count as they are."""
    made, given = criterion(), inputs()

    @mode()
    def losses(shift):
        logits = given.logits * 1
        boxes = made.bbox_decode(given.points, logits)
        if shift:
            boxes += shift
        found = boxes, *box_losses(made.bbox_loss, logits, boxes, given)
        return [value.clone() for value in found]

    compare(lambda: losses(0))
    compare(lambda: losses(0.5), *([] if mode is torch.inference_mode else [known.BOXES]))


def one_element(given):
    given.total = given.total.view(1)


def a_number(given):
    given.total = 3


def without_foreground(given):
    given.foreground = torch.zeros_like(given.foreground)


def targets_shared_by_the_images(given):
    given.boxes = given.boxes[:1].expand(2, -1, -1)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (one_element, [known.ARGUMENTS]), (a_number, []), (without_foreground, []),
        (targets_shared_by_the_images, []),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_other_arguments_of_the_box_loss(change, reasons):
    made, given = criterion(), inputs()
    change(given)
    compare(lambda: run(made, given), *reasons)


def test_anchor_points_edited_between_decode_and_loss():
    made, given = criterion(), inputs()
    points = given.points.clone()

    def losses():
        given.points = points.clone()
        boxes = made.bbox_decode(given.points, given.logits)
        given.points += 0.5
        return box_losses(made.bbox_loss, given.logits, boxes, given)

    compare(losses, known.BOXES)


@pytest.mark.gpu
def test_a_gpu_is_asked_for_the_positions_once_and_after_a_change():
    made = criterion()
    given = inputs()
    made.proj = made.proj.cuda()
    points, logits = given.points.cuda(), given.logits.cuda()
    with patch():
        boxes = made.bbox_decode(points, logits)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = made.bbox_decode(points, logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, boxes)
        made.proj *= 0.5
        halved = made.bbox_decode(points, logits)
    torch.testing.assert_close(halved, made.bbox_decode(points, logits), rtol=1e-4, atol=1e-4)


def test_boxes_hold_nothing_of_dflkern():
    given = inputs()
    with patch(), torch.no_grad():
        made = criterion()
        boxes = made.bbox_decode(given.points, given.logits)
        assert b"dflkern" not in pickle.dumps(boxes)
        assert not vars(boxes)
        for copied in (copy.copy(boxes), copy.deepcopy(boxes), boxes[:], boxes.detach()):
            assert known._origins.get(copied) is None
        assert known._origins.get(boxes) is not None
        count = len(known._origins)
        del boxes
        assert len(known._origins) == count - 1


def test_a_compiled_criterion():
    made, other, given = criterion(), criterion(proj=OTHER_POSITIONS), inputs()
    for each in (made, other):
        expected = run(each, given)
        with patch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._dynamo.reset()
            actual = torch.compile(run, backend="aot_eager")(each, given)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
