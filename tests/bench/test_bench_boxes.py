"""The bench's two studies of a training step, on small steps."""

import json

import pytest
import torch
from rich.console import Console

import dflkern
from dflkern.bench import box_steps, goals, report
from dflkern.bench.box_steps import BoxStep
from dflkern.bench.contenders import OURS
from dflkern.bench.timing import Effort

EFFORT = Effort(2, 1e-5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(box_steps, "LEVELS", ((12, 12), (6, 6), (3, 3)))
    monkeypatch.setattr(box_steps, "FOREGROUND", 9)
    steps = (BoxStep(2, "rows"), BoxStep(1, "columns"))
    monkeypatch.setattr(box_steps, "BOX_STEPS", steps)
    monkeypatch.setattr(goals, "MAIN", steps[0].name)


def test_the_inputs_are_a_training_step():
    of = box_steps.make_inputs(BoxStep(2, "rows"), "cpu")
    assert (of.foreground.sum(-1) == 9).all()
    assert ((of.scores.sum(-1) > 0) == of.foreground).all()
    assert torch.equal(of.leaf, box_steps.make_inputs(BoxStep(2, "rows"), "cpu").leaf)


def test_the_gate(monkeypatch):
    step = BoxStep(2, "columns")
    of = box_steps.make_inputs(step, "cpu")
    assert box_steps.faults(step, of) == []
    right = dflkern.box_loss
    monkeypatch.setattr(
        dflkern, "box_loss", lambda *args, **kwargs: right(*args, **{**kwargs, "iou": "iou"})
    )
    assert any("result 0" in fault for fault in box_steps.faults(step, of))


def test_boxes_without_the_peer(monkeypatch):
    monkeypatch.setattr(box_steps, "ultralytics_class", lambda *_: None)
    for found in box_steps.run_boxes(EFFORT, "cpu").values():
        assert list(found["times"]) == [OURS]
        assert found["refused"] == ["ultralytics is not installed"]
        assert "ratio" not in found
    assert box_steps.run_ultralytics(EFFORT, "cpu") == {}


def test_boxes_against_the_peer(capsys):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    data = box_steps.run_boxes(EFFORT, "cpu")
    for name, found in data.items():
        assert found["refused"] == [], name
        kernels, saved = found["kernels"], found["saved"]
        assert kernels[OURS] <= goals.BOX_KERNELS < kernels[box_steps.ULTRALYTICS]
        assert 10 * saved[OURS] < saved[box_steps.ULTRALYTICS]
        assert 0 < found["tensor_bytes"][OURS] < found["tensor_bytes"][box_steps.ULTRALYTICS]
    studies = {"boxes": {"faults": [], "data": json.loads(json.dumps(data))}}
    rows = goals.goals({"cases": {}, "studies": studies})
    asked = {row["work"].partition(": ")[2]: row for row in rows if "box path" in row["work"]}
    assert asked["kernels"]["met"]
    assert asked["kernels"]["measured"] == data["rows-2x189"]["kernels"][OURS]
    assert asked[""]["measured"] == data["rows-2x189"]["ratio"]
    Console(width=200).print(*report._study("boxes", studies["boxes"]))
    assert "rows-2x189" in capsys.readouterr().out


def test_another_version_of_the_peer_is_told(monkeypatch):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")

    def wrong(step, of):
        def forward(leaf):
            raise TypeError("forward() takes 8 positional arguments")

        return forward

    monkeypatch.setattr(box_steps, "upstream", wrong)
    for found in box_steps.run_boxes(EFFORT, "cpu").values():
        assert found["refused"] == ["TypeError: forward() takes 8 positional arguments"]


def test_the_loss_of_a_real_step_patched_against_not(monkeypatch):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from dflkern.bench import ultralytics_step

    whole = ultralytics_step.criterion_step
    monkeypatch.setattr(
        ultralytics_step, "criterion_step", lambda model, *_: whole(model, 2, 64, "cpu")
    )
    for found in box_steps.run_ultralytics(EFFORT, "cpu").values():
        assert found["kernels"][OURS] < found["kernels"][box_steps.ULTRALYTICS]
        assert found["ratio"] > 0
