"""Calls under every mode of PyTorch: none may change what a later call returns."""

import pytest
import torch
from functorch.compile import aot_function, nop
from torch._subclasses.fake_tensor import FakeTensorMode

import dflkern
from dflkern.operators import modes, positions

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
    monkeypatch.setattr(modes, "FAST_PATH", way == "eager")
    positions.cached.cache_clear()
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
    monkeypatch.setattr(modes, "FAST_PATH", not registered)
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


def test_a_dimension_without_elements(backend):
    """Shapes and strides are those of torch.empty, on every backend."""
    for shape in ((0, 0, 0, 0, 16), (0, 4, 16), (3, 0, 16), (0, 3, 4, 16), (2, 0, 4, 0, 16)):
        logits = torch.empty(shape, requires_grad=True)
        position = dflkern.dfl_decode(logits)
        assert position.stride() == torch.empty(shape[:-1]).stride(), shape
        position.sum().backward()
        assert logits.grad.shape == shape
        assert dflkern.explain("dfl_decode", logits)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert dflkern.dfl_decode(torch.empty(shape)).stride() == position.stride()


def test_make_anchors_is_fp32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        for found in (*dflkern.make_anchors([(2, 3)], [8]), *dflkern.make_anchors([], [])):
            assert found.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_sums_do_not_depend_on_the_number_of_threads(name):
    """100 000 losses, of which PyTorch's own sum gives each thread a part."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(25_000, 4, 8, generator=generator)
    target = torch.rand(25_000, 4, generator=generator) * 7
    points = torch.rand(25_000, 2, generator=generator) * 8
    boxes = torch.cat((points - target[:, :2], points + target[:, 2:]), -1)
    weight = torch.rand(25_000, 1, generator=generator)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with dflkern.use_backend(name):
                found = [
                    dflkern.dfl_loss(logits, target, weight=w, reduction=reduction)
                    for reduction in ("sum", "mean")
                    for w in (None, weight)
                ]
                found += dflkern.box_loss(logits[None], points, boxes[None], weight.T, 9.0)
            seen.append([value.item() for value in found])
    finally:
        torch.set_num_threads(before)
    assert all(values == seen[0] for values in seen)
    losses = dflkern.dfl_loss(logits.double(), target)
    assert seen[0][0] == pytest.approx(losses.sum().item(), rel=1e-6)
