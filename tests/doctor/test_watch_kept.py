"""What `doctor.watch` keeps over many steps, and what it says where it could not look."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import dflkern
from dflkern import doctor

K = 16


def rows(count=30):
    return torch.randn(count, 4, K), 9 * torch.rand(count, 4)


def sides(watch):
    """How many sides the report has seen."""
    return sum(level.count for level in watch.report.levels)


# --- What is kept -------------------------------------------------------------------------------

LONG = """
import os, sys, torch, psutil
import dflkern
from dflkern import doctor
torch.set_num_threads(1)
loss, body, process = dflkern.BoxLoss(), torch.nn.Linear(4, 4), psutil.Process()
criterion = torch.nn.ModuleList([loss, body])
with doctor.watch(criterion, steps=int(sys.argv[1])) as w:
    for step in range(5000):
        n = 200 + 37 * (step % 50)
        logits = torch.randn(2, n, 64, requires_grad=True)
        points = torch.rand(n, 2) * 10
        boxes = torch.cat((points - 1, points + 2), -1).expand(2, n, 4)
        weight = torch.rand(2, n)
        total = sum(loss(logits.view(2, n, 4, 16), points, boxes, weight, weight.sum(),
                         torch.rand(2, n) < 0.1)) + body(points.repeat(1, 2)).sum()
        total.backward()
        if step == 150:
            early = process.memory_info().rss
print((process.memory_info().rss - early) / 2**20)
assert w.report.levels and "losses" in w.report.examined
"""


@pytest.mark.parametrize("steps", [100, 100_000])
def test_a_process_does_not_grow_over_5000_steps(steps):
    pytest.importorskip("psutil", reason="needs psutil, to read the process's memory")
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(steps)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40  # MiB; the samples' buffers are 8 of it


def test_what_is_kept_does_not_depend_on_the_number_of_steps():
    loss = dflkern.DFLoss()
    for steps in (1, 100, 5000, 10**9):
        with doctor.watch(loss, steps=steps) as w:
            loss(*rows(1000))
        assert 0 < sides(w) <= 256 * 4
        kept = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        assert max((each.numel() for each in kept), default=0) <= 25_600 * 4 * K


def test_gradients_of_each_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with doctor.watch(model, steps=3) as w:
        for step in range(5):
            model.zero_grad()
            (model(torch.ones(1, 4)).sum() * 10**step).backward()
    norms = w._norms.by_layer()
    assert norms.keys() == {"", "0.weight", "1.weight"}
    assert [len(values) for values in norms.values()] == [3, 3, 3]
    model.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norms[""] == pytest.approx([float(expected) * 10**step for step in range(3)], rel=1e-5)


# --- Nothing examined is never "Nothing found" --------------------------------------------------


class Rotated(nn.Module):
    """A box loss of rotated boxes around a DFL, as in oriented detection."""

    def __init__(self):
        super().__init__()
        self.dfl = dflkern.DFLoss(reduction="mean")

    def forward(self, pred_dist, anchor_points, target_bboxes, target_scores_sum, fg_mask):
        sides = target_bboxes[..., 2:4].repeat(1, 1, 2) / 2
        loss = self.dfl(pred_dist[fg_mask].view(-1, 4, K), sides[fg_mask])
        return loss * 2, loss / target_scores_sum


def rotated_arguments(scale=1.0):
    boxes = torch.rand(2, 50, 5) * 18 * scale
    return torch.randn(2, 50, 4 * K), torch.rand(50, 2), boxes, 7.0, torch.rand(2, 50) < 0.5


@pytest.mark.parametrize("given", [True, False])
def test_the_loss_within_is_seen_where_boxes_have_five_numbers(given):
    loss = Rotated()
    with doctor.watch(loss if given else None) as w:
        for _ in range(3):
            values = rotated_arguments(scale=5)
            output = loss(*values)
    assert {"targets", "logits", "losses", "normalizer"} <= set(w.report.examined)
    assert "above-range" in {finding.code for finding in w.report}
    assert float(w._losses.values()[-1]) == pytest.approx(float(output[1]))
    assert w._normalizers.values().tolist() == [7.0] * 3


class Opaque(nn.Module):
    def forward(self, pred_dist, anchor_points, target_bboxes):
        return pred_dist.mean(), target_bboxes.mean()


def test_losses_without_targets_are_told():
    loss = Opaque()
    with doctor.watch(loss) as w:
        loss(torch.randn(1, 9, 64), torch.rand(9, 2), torch.rand(1, 9, 5))
    assert [finding.code for finding in w.report] == ["no-targets"]
    assert not w.report.healthy
    text = str(w.report)
    assert "1 of Opaque" in text
    assert "w.record(" in text
    assert "Nothing found" not in text


def test_gradients_without_a_loss_are_told():
    model = nn.Linear(4, 4)
    with doctor.watch(model) as w:
        model(torch.rand(2, 4)).sum().backward()
    assert w.report.findings[0].code == "no-targets"
    assert "Nothing found" not in str(w.report)


def test_a_head_without_bins_is_told():
    loss = Opaque()
    with doctor.watch(loss) as w:
        loss(torch.randn(1, 9, 4), torch.rand(9, 2), torch.rand(1, 9, 4))
    assert "reg_max: 1" in str(w.report)


def test_record_needs_a_row_for_each_anchor():
    with doctor.watch() as w, pytest.raises(ValueError, match=r"'logits': 3, 'targets': 4"):
        w.record(logits=torch.randn(3, 4, K), targets=torch.rand(4, 4))


# --- Ultralytics --------------------------------------------------------------------------------


def rotated_step(model, seed):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.cat((0.3 + 0.4 * torch.rand(8, 2, generator=g),
                       0.2 + 0.3 * torch.rand(8, 2, generator=g),
                       torch.rand(8, 1, generator=g)), 1)  # fmt: skip
    batch = {
        "img": torch.rand(2, 3, 96, 96, generator=g),
        "cls": torch.randint(3, (8, 1), generator=g).float(),
        "bboxes": boxes,
        "batch_idx": torch.arange(8) // 4,
    }
    model(batch)[0].sum().backward()


def test_ultralytics_oriented_boxes():
    """Its DFLoss bypasses hooks, and its criterion is made in the first step."""
    pytest.importorskip("ultralytics", reason="needs Ultralytics, which is not installed")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import OBBModel
    from ultralytics.utils.loss import DFLoss

    torch.manual_seed(0)
    model, call = OBBModel("yolov8n-obb.yaml", nc=3, verbose=False).train(), DFLoss.__call__
    model.args = get_cfg(overrides={"task": "obb"})
    with doctor.watch(model) as w:
        rotated_step(model, 0)
        with pytest.raises(KeyError):
            model({"img": torch.rand(2, 3, 96, 96)})
        rotated_step(model, 1)
    assert DFLoss.__call__ is call
    assert {"targets", "logits", "losses", "normalizer", "gradients"} <= set(w.report.examined)
    assert "no-targets" not in {finding.code for finding in w.report}
    assert len(w._losses.values()) == 2
