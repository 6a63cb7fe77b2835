"""Calls under every mode of PyTorch: none may change what a later call returns."""

import pytest
import torch
from functorch.compile import aot_function, nop
from torch._subclasses.fake_tensor import FakeTensorMode

import dflkern
from dflkern import eager, implementations

POSITIONS = [0.0, 1.0, 2.5, 4.0]


def decode(logits):
    return dflkern.dfl_decode(logits, project=POSITIONS)


def exported():
    torch.export.export(dflkern.DFLDecode(project=POSITIONS), (torch.randn(3, 4),))


def faked():
    with FakeTensorMode():
        decode(torch.randn(3, 4))


def aot_compiled():
    logits = torch.randn(3, 4, requires_grad=True)
    aot_function(decode, nop)(logits).sum().backward()


def traced():
    torch.jit.trace(decode, (torch.randn(3, 4),))


def inferred():
    with torch.inference_mode():
        decode(torch.randn(3, 4))


def transformed():
    torch.func.vmap(decode)(torch.randn(2, 3, 4))


def on_meta():
    with torch.device("meta"):
        decode(torch.randn(3, 4))


def in_a_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        decode(torch.randn(3, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


MODES = (
    exported, faked, aot_compiled, traced, inferred, transformed, on_meta, in_a_default_dtype,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["eager", "registered"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_a_project_first_used_under_a_mode_serves_later_calls(monkeypatch, mode, way):
    monkeypatch.setattr(eager, "ENABLED", way == "eager")
    implementations._cached_positions.cache_clear()
    mode()
    logits = torch.randn(3, 4, requires_grad=True)
    position = decode(logits)
    position.sum().backward()
    assert type(position) is torch.Tensor
    expected = (logits.softmax(-1) * torch.tensor(POSITIONS)).sum(-1)
    torch.testing.assert_close(position, expected)
    torch.testing.assert_close(logits.grad, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("name", ["cpu", "cpu-registered", "reference", "triton"])
def test_tensors_made_in_inference_mode_can_be_trained_against(monkeypatch, name):
    name, _, registered = name.partition("-")
    monkeypatch.setattr(eager, "ENABLED", not registered)
    logits = torch.randn(2, 6, 4, 8, requires_grad=True)

    def given():
        generator = torch.Generator().manual_seed(0)
        target = torch.rand(2, 6, 4, generator=generator) * 7
        points = torch.rand(6, 2, generator=generator) * 8
        boxes = torch.cat((points - target[..., :2], points + target[..., 2:]), -1)
        weight = torch.rand(2, 6, generator=generator)
        positions = torch.arange(8.0).square()
        return target, points, boxes, weight, weight.sum(), weight > 0.3, positions

    def gradients(target, points, boxes, weight, normalizer, foreground, positions):
        """First and second derivatives of everything that trains."""
        total = dflkern.dfl_loss(logits, target, project=positions, weight=target).sum()
        total = total + sum(dflkern.dfl_loss_and_decode(logits, target)).sum()
        total = total + dflkern.decode_boxes(logits, points, points[:, 0]).sum()
        total = total + sum(
            dflkern.box_loss(logits, points, boxes, weight, normalizer, foreground=foreground)
        )
        (first,) = torch.autograd.grad(total, logits, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), logits)[0]

    with torch.inference_mode():
        inference = given()
    with dflkern.use_backend(name):
        for actual, expected in zip(gradients(*inference), gradients(*given()), strict=True):
            assert torch.equal(actual, expected)


def test_geometry_takes_tensors_made_in_inference_mode():
    with torch.inference_mode():
        points, boxes, stride = torch.rand(6, 2) * 8, torch.rand(6, 4) * 8, torch.full((6,), 8.0)
    distances = torch.rand(6, 4, requires_grad=True)
    predicted = dflkern.dist2bbox(distances, points)
    total = dflkern.paired_box_iou(predicted, boxes, "ciou").sum()
    total = total + dflkern.dfl_targets(predicted, points, stride, 16).sum()
    total.backward()
    assert distances.grad.isfinite().all()
