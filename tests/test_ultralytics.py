"""The adapter for Ultralytics against the real package."""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

import ultralytics
from ultralytics.nn.modules import block
from ultralytics.utils import loss

from dflkern.adapters import _patch
from dflkern.adapters.ultralytics import patch
from support import assert_within_budget

OLD = ultralytics.__version__.startswith("8.3")
FUNCTIONS = [
    (loss.DFLoss, "__call__"),
    (loss.BboxLoss, "forward"),
    (loss.v8DetectionLoss, "bbox_decode"),
    (loss.v8OBBLoss, "bbox_decode"),
    (block.DFL, "forward"),
]
BINS, ANCHORS = 16, 80
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # the halves under autocast


def installed():
    return [vars(owner)[name] for owner, name in FUNCTIONS]


ORIGINAL = installed()


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


def with_gradient(leaf, *results):
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.rand(r.shape, generator=generator).to(r.dtype) for r in results]
    return [r.detach() for r in results], torch.autograd.grad(results, leaf, upstream)[0]


def inputs(dtype, foreground=0.3):
    """What a criterion passes on: rounded to dtype where autocast would round it."""
    width = 10
    index = torch.arange(ANCHORS)
    points = torch.stack((index % width, index // width), -1) + 0.5
    corners = torch.rand(2, ANCHORS, 4) * 17  # some sides beyond the last bin
    boxes = torch.cat((points - corners[..., :2], points + corners[..., 2:]), -1)
    scores = torch.rand(2, ANCHORS, 3)
    return SimpleNamespace(
        logits=(torch.randn(2, ANCHORS, 4 * BINS) * 3).to(dtype),
        points=points.to(dtype),
        angle=torch.rand(2, ANCHORS, 1).to(dtype),
        boxes=boxes,
        scores=scores,
        total=scores.sum(),
        foreground=torch.rand(2, ANCHORS) < foreground,
    )


def double(given):
    return SimpleNamespace(
        **{k: v.double() if v.is_floating_point() else v for k, v in vars(given).items()}
    )


def criterion():
    return SimpleNamespace(use_dfl=True, proj=torch.arange(BINS, dtype=torch.float))


def bbox_loss(logits, decoded, given):
    image = [] if OLD else [torch.ones(2), torch.ones(ANCHORS, 1)]
    return loss.BboxLoss(BINS)(
        logits, decoded, given.points, given.boxes, given.scores, given.total, given.foreground,
        *image,
    )  # fmt: skip


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


def test_boxes_of_another_origin_count_as_they_are():
    given = inputs(torch.float32)

    def run():
        leaf = given.logits.clone().requires_grad_()
        decoded = loss.v8DetectionLoss.bbox_decode(criterion(), given.points, leaf)
        return with_gradient(leaf, *bbox_loss(leaf, decoded * 1.1, given))

    expected = run()
    with patch():
        actual = run()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_no_argument_is_written_to():
    given = inputs(torch.float32)
    before = copy.deepcopy(given)
    with patch():
        loss.DFLoss(BINS)(given.logits.view(-1, BINS), given.boxes.view(-1, 4))
        run_box_loss(given)
    assert all(torch.equal(value, vars(before)[name]) for name, value in vars(given).items())


def test_trained_bin_positions_keep_their_gradient():
    module, x = block.DFL(BINS).requires_grad_(), torch.randn(1, 4 * BINS, 5)
    with torch.no_grad():
        module.conv.weight += 0.25
    with patch():
        with torch.no_grad():
            moved = module(x)
        trained = module(x)
    assert trained.requires_grad
    torch.testing.assert_close(moved, trained.detach())


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


def test_the_handle():
    handle = patch()
    try:
        assert handle.replaced == tuple(f"{owner.__name__}.{name}" for owner, name in FUNCTIONS)
        assert not set(installed()) & set(ORIGINAL)
        assert patch() is handle
        assert "replaced: DFLoss.__call__" in repr(handle)
    finally:
        handle.undo()
    assert all(a is b for a, b in zip(installed(), ORIGINAL, strict=True))
    handle.undo()
    assert "undone" in repr(handle)
    with patch() as other:
        assert other is not handle


def test_undo_leaves_what_others_replaced_since():
    handle = patch()
    block.DFL.forward = theirs = lambda self, x: x
    with pytest.warns(RuntimeWarning, match=r"DFL\.forward of Ultralytics .* was replaced once"):
        handle.undo()
    left = installed()
    block.DFL.forward = ORIGINAL[-1]
    assert left == [*ORIGINAL[:-1], theirs]


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


REFUSALS = {
    "version": (ultralytics, "__version__", "8.5.0", "knows Ultralytics 8.3 and 8.4, and found"),
    "signature": (
        block.DFL, "forward", lambda self, x, temperature: x,
        r"does not know DFL.forward of .*expects \(self, x\) and found \(self, x, temperature\)",
    ),
    "no function": (loss.DFLoss, "__call__", None, r"DFLoss.__call__ .* found no such function"),
    "clamp": (loss.DFLoss, "__call__", looser_clamp, r"DFL differs .* by [0-9.e-]+ on random"),
    "IoU": (loss, "bbox_iou", other_iou, r"box loss differs .* by [0-9.e-]+ on random rows"),
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
        _patch.Patch("Other 1", [])


def test_without_ultralytics(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ImportError, match="pip install ultralytics"):
        patch()


def test_against_ultralytics_8_3(tmp_path):
    """Both files about Ultralytics, with another version ahead on the path."""
    folder = os.environ.get("DFLKERN_ULTRALYTICS_8_3")
    if not folder:
        pytest.skip("DFLKERN_ULTRALYTICS_8_3 names no folder with Ultralytics 8.3; .ci/run does")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    del environment["DFLKERN_ULTRALYTICS_8_3"]
    environment["YOLO_CONFIG_DIR"] = str(tmp_path)  # the two versions' settings differ
    here = Path(__file__)
    files = [str(here), str(here.with_name("test_ultralytics_models.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=here.parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
