"""torch.func transforms and forward-mode AD, held against reverse mode and finite differences."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func

import dflkern
from dflkern.operators import modes

N, K = 3, 8
POSITIONS = [0.0, 1.0, 2.5, 4.0, 5.0, 7.5, 9.0, 12.0]


TARGETS = torch.linspace(0, K - 1, 4 * N, dtype=torch.float64).view(4, N).T.contiguous() * 0.97
POINTS = torch.arange(2 * N, dtype=torch.float64).view(N, 2)
BOXES = torch.cat((POINTS - TARGETS[:, :2], POINTS + TARGETS[:, 2:]), -1)[None]
STRIDE = torch.full((N,), 8.0)
WEIGHT = torch.tensor([[0.5, 0.0, 2.0]], dtype=torch.float64)


def mean_loss(z):
    return dflkern.dfl_loss(z, TARGETS, project=POSITIONS, reduction="mean")


def decode(z):
    return dflkern.dfl_decode(z, project=POSITIONS).square().sum()


def both(z):
    loss, position = dflkern.dfl_loss_and_decode(z, TARGETS)
    return (loss * position).sum()


def boxes(z):
    return dflkern.decode_boxes(z[None], POINTS, STRIDE, box_format="cxcywh").square().sum()


def box_loss(z):
    return sum(
        dflkern.box_loss(z[None], POINTS, BOXES, WEIGHT, 2.0, foreground=WEIGHT > 0, iou="giou")
    )


@pytest.fixture(params=[mean_loss, decode, both, boxes, box_loss], ids=lambda f: f.__name__)
def function(request):
    return request.param


@pytest.fixture
def logits():
    return torch.randn(N, 4, K, dtype=torch.float64)


@pytest.fixture
def gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.fixture(params=["eager", "registered"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(modes, "FAST_PATH", request.param == "eager")


def test_grad(function, logits, gradient):
    torch.testing.assert_close(func.grad(function)(logits), gradient)


def test_jacrev(function, logits, gradient):
    torch.testing.assert_close(func.jacrev(function)(logits), gradient)


def test_jacfwd(function, logits, gradient):
    torch.testing.assert_close(func.jacfwd(function)(logits), gradient)


def test_jvp(function, logits, gradient):
    direction = torch.randn_like(logits)
    value, slope = func.jvp(function, (logits,), (direction,))
    torch.testing.assert_close(value, function(logits))
    torch.testing.assert_close(slope, (gradient * direction).sum())


def test_dual_numbers(function, logits, gradient):
    direction = torch.randn_like(logits)
    with forward_ad.dual_level():
        result = function(forward_ad.make_dual(logits, direction))
        slope = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(slope, (gradient * direction).sum())


def test_vmap(function, logits):
    batch = torch.stack((logits, logits * 2, -logits))
    expected = torch.stack([function(one) for one in batch])
    torch.testing.assert_close(func.vmap(function)(batch), expected)


def test_vmap_of_grad(function, logits):
    batch = torch.stack((logits, logits * 2, -logits))
    expected = torch.stack([func.grad(function)(one) for one in batch])
    torch.testing.assert_close(func.vmap(func.grad(function))(batch), expected)


def test_hessian(function, logits):
    leaf = logits.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    direction = torch.randn_like(logits)
    expected = torch.autograd.grad((first * direction).sum(), leaf)[0]
    actual = func.hessian(function)(logits).view(logits.numel(), -1) @ direction.flatten()
    torch.testing.assert_close(actual.view_as(logits), expected)


def test_per_sample_gradients_of_a_head():
    """func.vmap over samples with the parameters shared, as in differential privacy."""
    head = torch.nn.Linear(5, 4 * K)
    features, targets = torch.randn(6, 5), torch.rand(6, 4) * (K - 1)
    parameters = dict(head.named_parameters())

    def loss(parameters, feature, target):
        logits = func.functional_call(head, parameters, (feature,)).view(4, K)
        return dflkern.dfl_loss(logits, target, reduction="sum")

    each = func.vmap(func.grad(loss), in_dims=(None, 0, 0))(parameters, features, targets)
    total = dflkern.dfl_loss(head(features).view(6, 4, K), targets, reduction="sum")
    expected = torch.autograd.grad(total, head.weight)[0]
    torch.testing.assert_close(each["weight"].sum(0), expected)


def test_compiled_transforms_in_one_graph(function, logits, gradient):
    torch._dynamo.reset()
    compiled = torch.compile(func.grad(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), gradient)


def test_vmap_over_every_argument_of_a_box_loss(logits):
    weights = torch.stack((WEIGHT, WEIGHT * 2))

    def loss(z, weight, boxes, foreground):
        return sum(dflkern.box_loss(z[None], POINTS, boxes, weight, 2.0, foreground=foreground))

    given = torch.stack((logits, -logits)), weights, torch.stack((BOXES, BOXES + 1)), weights > 1
    expected = torch.stack([loss(*one) for one in zip(*given, strict=True)])
    torch.testing.assert_close(func.vmap(loss)(*given), expected)
