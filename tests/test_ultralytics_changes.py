"""What users change about Ultralytics' models and criteria, under patch(): as if unpatched."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

from torch.nn.modules import module as hooks
from ultralytics.nn.modules import block
from ultralytics.utils import loss

import dflkern
from criteria import (
    BINS,
    OLD,
    ORIGINAL,
    box_losses,
    criterion,
    inputs,
    installed,
    with_gradient,
)  # fmt: skip
from dflkern.adapters import _ultralytics_known as known
from dflkern.adapters.ultralytics import patch


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


def run(made, given):
    """Boxes, losses and the gradient of the logits, as the criterion's own loss calls them."""
    leaf = given.logits.clone().requires_grad_()
    logits = leaf * 1.0
    boxes = made.bbox_decode(given.points, logits)
    return with_gradient(leaf, boxes * 1.0, *box_losses(made.bbox_loss, logits, boxes, given))


def said(record):
    """The reasons of dflkern's warnings."""
    texts = [str(each.message) for each in record]
    return [text for text in texts if text.startswith("dflkern: Ultralytics ")]


def compare(call, *reasons, calls=2):
    """The same results patched as unpatched, and one warning for each of the reasons."""
    expected = [call() for _ in range(calls)]
    with patch(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        actual = [call() for _ in range(calls)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(said(record)) == len(reasons), said(record)
    for text, reason in zip(said(record), reasons, strict=True):
        assert f"because {reason}. This is said once." in text


# --- The criterion --------------------------------------------------------------------------------


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
    made.proj = torch.linspace(0, 20, BINS)


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


def test_an_unchanged_criterion_runs_on_the_logits_alone():
    made, given = criterion(), inputs()
    compare(lambda: run(made, given))
    with patch():
        boxes = made.bbox_decode(given.points, given.logits)
        poisoned = boxes.detach()  # another tensor on the same memory, not an edit
        losses = box_losses(made.bbox_loss, given.logits, boxes, given)
        torch.Tensor.data.__get__(poisoned).fill_(torch.nan)  # unseen by PyTorch's counter
        again = box_losses(made.bbox_loss, given.logits, boxes, given)
    assert torch.equal(torch.stack(losses), torch.stack(again))


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


def test_a_rotated_criterion_with_other_positions_and_another_loss():
    """Its positions may be any: only the decode reads them."""
    made, given = criterion(loss.v8OBBLoss), inputs()
    other_positions(made)

    def rotated():
        leaf = given.logits.clone().requires_grad_()
        return with_gradient(leaf, made.bbox_decode(given.points, leaf, given.angle))

    compare(rotated)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(mode):
    made, given = criterion(), inputs()
    edited = criterion()
    boxes_edited_in_place(edited)

    @mode()
    def losses(made):
        logits = given.logits * 1
        boxes = made.bbox_decode(given.points, logits)
        return [
            value.clone() for value in (boxes, *box_losses(made.bbox_loss, logits, boxes, given))
        ]

    compare(lambda: losses(made))
    compare(lambda: losses(edited), *([] if mode is torch.inference_mode else [known.BOXES]))


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
    made, given = criterion(), inputs()
    other = criterion()
    other_positions(other)
    for each in (made, other):
        expected = run(each, given)
        with patch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._dynamo.reset()
            actual = torch.compile(run, backend="aot_eager")(each, given)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- The DFL module -------------------------------------------------------------------------------


class FakeQuantized(nn.Conv2d):
    def forward(self, x):
        return super().forward((x * 255).round() / 255)


class Eighths(nn.Module):
    def forward(self, weight):
        return (weight / 8).round() * 8


def fake_quantized(module, seen):
    conv = FakeQuantized(BINS, 1, 1, bias=False).requires_grad_(False)
    conv.load_state_dict(module.conv.state_dict())
    module.conv = conv


def another_module(module, seen):
    module.conv = nn.Sequential(module.conv, nn.ReLU())


def parametrized(module, seen):
    nn.utils.parametrize.register_parametrization(module.conv, "weight", Eighths())


def with_a_bias(module, seen):
    module.conv.bias = nn.Parameter(torch.tensor([0.5]), requires_grad=False)


def forward_on_the_instance(module, seen):
    forward = module.conv.forward
    module.conv.forward = lambda x: forward(x) + 1


def forward_hook(module, seen):
    module.conv.register_forward_hook(
        lambda module, args, output: seen.append(output) or output * 2
    )


def forward_pre_hook(module, seen):
    module.conv.register_forward_pre_hook(lambda module, args: seen.append(args))


def backward_hook(module, seen):
    module.conv.register_full_backward_hook(lambda module, *grads: seen.append(grads))


def backward_pre_hook(module, seen):
    module.conv.register_full_backward_pre_hook(lambda module, grads: seen.append(grads))


def pruned(module, seen):
    prune.random_unstructured(module.conv, "weight", amount=3)
    module.requires_grad_(False)


def trained(module, seen):
    module.requires_grad_()
    with torch.no_grad():
        module.conv.weight += 0.25


MODULE = {
    fake_quantized: known.MODULE, another_module: known.MODULE, parametrized: known.MODULE,
    with_a_bias: known.MODULE, forward_on_the_instance: known.MODULE, forward_hook: known.HOOKS,
    forward_pre_hook: known.HOOKS, backward_hook: known.HOOKS, backward_pre_hook: known.HOOKS,
    pruned: known.HOOKS, trained: known.TRAINED,
}  # fmt: skip


def decode(module, x):
    leaf = x.clone().requires_grad_()
    return with_gradient(leaf, module(leaf))


@pytest.mark.parametrize("change", MODULE, ids=lambda change: change.__name__)
def test_a_changed_dfl_module(change):
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    change(module, seen)
    compare(lambda: decode(module, x), MODULE[change])
    assert len(seen) == (4 if "hook" in change.__name__ else 0)  # two calls unpatched, two patched


GLOBAL_HOOKS = {
    "forward": hooks.register_module_forward_hook,
    "forward pre": hooks.register_module_forward_pre_hook,
    "full backward": hooks.register_module_full_backward_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules_see_the_convolution(kind):
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    handle = GLOBAL_HOOKS[kind](lambda each, *_: seen.append(each is module.conv) and None)
    try:
        compare(lambda: decode(module, x), known.HOOKS)
    finally:
        handle.remove()
    assert sum(seen) == 4


def test_hooks_on_the_dfl_module_itself_need_nothing():
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    module.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    compare(lambda: decode(module, x))
    assert len(seen) == 4


def test_a_dfl_module_with_other_fixed_positions_is_served():
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    module.conv.weight.data.mul_(0.5)
    compare(lambda: decode(module, x))


def test_counting_flops_before_a_training_says_nothing():
    thop = pytest.importorskip("thop", reason="needs ultralytics-thop")
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    compare(lambda: torch.tensor(thop.profile(copy.deepcopy(module), inputs=(x,), verbose=False)))


def test_a_scripted_and_a_compiled_module_with_hooks():
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    expected = module(x)
    with patch():
        torch.testing.assert_close(torch.jit.script(module)(x), expected)
        module.conv.register_forward_pre_hook(lambda module, args: seen.append(1))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected)
    assert seen


def test_each_reason_is_said_once_in_each_patch():
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    with_a_bias(module, [])
    for _ in range(2):
        with patch(), warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            module(x)
            with patch():  # the same patch: nothing new
                module(x)
            trained(module, [])
            module.conv.bias = None
            module(x)
            module.requires_grad_(False)
            with_a_bias(module, [])
        assert len(said(record)) == 2


def test_the_reference_gives_what_the_kernels_give():
    """The backend is dflkern's choice, whatever was changed."""
    made, given = criterion(), inputs()
    other_positions(made)
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = run(made, given)
        with dflkern.use_backend("reference"):
            torch.testing.assert_close(run(made, given), kernels, rtol=1e-4, atol=1e-5)
