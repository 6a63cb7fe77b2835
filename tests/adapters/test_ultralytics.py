"""The adapter for Ultralytics against the real package."""

import contextlib
import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

import ultralytics
from ultralytics.nn.modules import block
from ultralytics.utils import loss

from criteria import (
    ANCHORS,
    BINS,
    ORIGINAL,
    box_losses,
    criterion,
    double,
    inputs,
    installed,
    rotate_at_inference,
    with_gradient,
)  # fmt: skip
from dflkern.adapters import _patch
from dflkern.adapters.ultralytics import patch
from support import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # the halves under autocast


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


def bbox_loss(logits, decoded, given):
    return box_losses(loss.BboxLoss(BINS), logits, decoded, given)


def run_box_loss(given):
    leaf = given.logits.clone().requires_grad_()
    decoded = loss.v8DetectionLoss.bbox_decode(criterion(), given.points, leaf)
    return with_gradient(leaf, decoded, *bbox_loss(leaf, decoded, given))


def run_dfl_loss(given):
    leaf = given.logits.view(-1, BINS).clone().requires_grad_()
    return with_gradient(leaf, loss.DFLoss(BINS)(leaf, given.boxes.view(-1, 4).clone()))


def run_rotated_boxes(given):
    leaf = given.logits.clone().requires_grad_()
    decode = loss.v8OBBLoss.bbox_decode
    return with_gradient(leaf, decode(criterion(), given.points, leaf, given.angle))


def run_decode(given):
    leaf = given.logits.mT.contiguous().requires_grad_()
    return with_gradient(leaf, block.DFL(BINS).to(leaf.dtype)(leaf))


RUNS = {
    "box loss": run_box_loss, "DFLoss": run_dfl_loss, "rotated boxes": run_rotated_boxes,
    "decode": run_decode,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_values_and_gradients_within_the_budget(name, dtype):
    given = inputs(dtype)
    half = dtype != torch.float32
    autocast = torch.autocast("cpu", dtype) if half else contextlib.nullcontext()
    exact = RUNS[name](double(given))
    with autocast:
        results, gradient = RUNS[name](given)
        with patch():
            actual = RUNS[name](given)
    assert all(value.dtype == torch.float32 for value in actual[0])
    assert_within_budget(actual, ([r.float() for r in results], gradient), exact)


def test_only_the_foreground_has_a_gradient():
    given = inputs(torch.float32)
    with patch():
        leaf = given.logits.clone().requires_grad_()
        decoded = loss.v8DetectionLoss.bbox_decode(criterion(), given.points, leaf)
        _, gradient = with_gradient(leaf, *bbox_loss(leaf, decoded, given))
    assert torch.equal(gradient.abs().sum(-1) > 0, given.foreground)


def test_empty_foreground():
    given = inputs(torch.float32, foreground=0.0)
    with patch():
        leaf = given.logits.clone().requires_grad_()
        decoded = loss.v8DetectionLoss.bbox_decode(criterion(), given.points, leaf)
        values, gradient = with_gradient(leaf, *bbox_loss(leaf, decoded, given))
    assert [float(value) for value in values] == [0, 0]
    assert not gradient.any()


def test_the_box_path_waits_for_nothing():
    given = inputs(torch.float32)
    with patch(), torch.profiler.profile() as profile:
        run_box_loss(given)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::nonzero", "aten::item", "aten::_local_scalar_dense"}


def test_no_argument_is_written_to():
    given = inputs(torch.float32)
    before = copy.deepcopy(given)
    with patch():
        loss.DFLoss(BINS)(given.logits.view(-1, BINS), given.boxes.view(-1, 4))
        run_box_loss(given)
    assert all(torch.equal(value, vars(before)[name]) for name, value in vars(given).items())


def test_compiled():
    given = inputs(torch.float32)
    with patch():
        expected = run_decode(given)
        module = torch.compile(block.DFL(BINS), fullgraph=True, backend="aot_eager")
        leaf = given.logits.mT.contiguous().requires_grad_()
        actual = with_gradient(leaf, module(leaf))
        torch.testing.assert_close(actual, expected)
        compiled = torch.compile(run_box_loss, backend="aot_eager")
        torch.testing.assert_close(compiled(given), run_box_loss(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_boxes_are_exact_for_the_angle_that_is_given(dtype):
    """In training and at inference, to fp32's rounding of boxes of 34 cells."""
    given = inputs(dtype)
    exact = double(given)
    expected, _ = run_rotated_boxes(exact)
    sides = torch.rand(2, 4, ANCHORS) * 15
    rotated = rotate_at_inference(sides.double(), exact.points.mT, exact.angle.mT)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with patch(), autocast:
        (boxes,), _ = run_rotated_boxes(given)
        at_inference = rotate_at_inference(sides, given.points.mT, given.angle.mT)
    assert boxes.dtype == at_inference.dtype == torch.float32
    torch.testing.assert_close(boxes.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(at_inference.double(), rotated, rtol=0, atol=1e-5)


def test_the_callers_modes_and_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), patch():
        assert torch.equal(torch.rand(3), expected)


def looser_clamp(self, pred_dist, target):
    return ORIGINAL[0](self, pred_dist, target.clamp(max=BINS - 1 - 0.1))


def other_iou(*boxes, iou=loss.bbox_iou, **_):
    return iou(*boxes, xywh=False, GIoU=True)


@functools.wraps(loss.BboxLoss.forward)
def logged(*args, call=loss.BboxLoss.forward):
    return call(*args)


REFUSALS = {
    "version": (ultralytics, "__version__", "8.5.0", "knows Ultralytics 8.3 and 8.4, and found"),
    "signature": (
        block.DFL, "forward", lambda self, x, temperature: x,
        r"does not know DFL.forward of .*expects \(self, x\) and found \(self, x, temperature\)",
    ),
    "no function": (loss.DFLoss, "__call__", None, r"DFLoss.__call__ .* found no such function"),
    "clamp": (loss.DFLoss, "__call__", looser_clamp, r"DFL differs .* by [0-9.e-]+ on random"),
    "IoU": (loss, "bbox_iou", other_iou, r"box loss differs .* by [0-9.e-]+ on random rows"),
    "wrapper": (loss.BboxLoss, "forward", logged, r"forward from .* in the place of BboxLoss.fo"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, monkeypatch):
    owner, name, value, words = REFUSALS[case]
    monkeypatch.setattr(owner, name, value)
    before = installed()
    with pytest.raises(RuntimeError, match=f"(?s){words}.*[Nn]othing was replaced"):
        patch()
    assert installed() == before
    monkeypatch.undo()


def test_nothing_to_replace():
    with pytest.raises(RuntimeError, match="found nothing to replace in Other 1"):
        _patch.Replacements("Other 1", [])


def test_without_ultralytics(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ImportError, match="pip install ultralytics"):
        patch()


def test_against_ultralytics_8_3(tmp_path):
    """All files about Ultralytics, with another version ahead on the path."""
    folder = os.environ.get("DFLKERN_ULTRALYTICS_8_3")
    if not folder:
        pytest.skip("DFLKERN_ULTRALYTICS_8_3 names no folder with Ultralytics 8.3; .ci/run does")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    del environment["DFLKERN_ULTRALYTICS_8_3"]
    environment["YOLO_CONFIG_DIR"] = str(tmp_path)  # the two versions' settings differ
    here = Path(__file__)
    files = [str(path) for path in sorted(here.parent.glob("test_ultralytics*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=here.parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
