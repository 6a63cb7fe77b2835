"""The registered operators under opcheck, torch.compile and export."""

import warnings

import pytest
import torch
from torch.library import opcheck

import dflkern
from support import DTYPES, logits_of, positions_for, targets_for

NAMES = (
    "dfl_loss", "dfl_decode", "dfl_loss_and_decode", "dfl_loss_backward", "dfl_decode_backward",
    "dfl_loss_and_decode_backward",
)  # fmt: skip


def arguments(name, logits, dim, backend, project=None):
    """Arguments of an operator on single distributions."""
    dim %= logits.ndim
    target = targets_for(logits, dim)
    values = [logits]
    if name.endswith("_backward"):
        grads = 2 if "and" in name else 1
        values = [torch.randn_like(target) for _ in range(grads)] + values
    if "loss" in name:
        return [*values, target, project, None, dim, 0.01, backend]
    return [*values, project, None, dim, backend]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, device, name, dtype):
    layouts = ("rows-4d", "slice", "empty") if backend[0] == "reference" else ("padded",)
    for layout in layouts:
        logits, dim = logits_of(layout, 8, dtype, device)
        logits = logits.detach().requires_grad_(not name.endswith("_backward"))
        opcheck(getattr(torch.ops.dflkern, name), arguments(name, logits, dim, backend[0]))


@pytest.mark.parametrize("name", NAMES[:3])
def test_opcheck_with_a_project(backend, device, name):
    logits, dim = logits_of("padded", 8, torch.float32, device)
    project = torch.tensor(positions_for(8), device=device)
    given = arguments(name, logits.requires_grad_(), dim, backend[0], project)
    opcheck(getattr(torch.ops.dflkern, name), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3])
def test_opcheck_on_boxes(dtype, dim):
    shape = (2, 5, 4, 8) if dim == 3 else (2, 4, 8, 5)
    logits = torch.randn(shape, dtype=torch.float64).to(dtype)
    anchors, stride = dflkern.make_anchors([(2, 2), (1, 1)], [8, 16])
    ops = torch.ops.dflkern
    rest = (None, None, dim, "xywh", "auto")
    leaf = logits.clone().requires_grad_()
    opcheck(ops.decode_boxes, (leaf, anchors, stride, *rest))
    grad = torch.randn((2, 5, 4) if dim == 3 else (2, 4, 5))
    opcheck(ops.decode_boxes_backward, (grad, logits, stride, *rest))
    boxes = torch.tensor([0.0, 0, 2, 2]) + torch.rand(2, 5, 4)
    tensors = (anchors, boxes, torch.rand(2, 5), torch.tensor(3.0), torch.rand(2, 5) > 0.3)
    rest = (None, None, dim, 0.01, "ciou", "auto")
    opcheck(ops.box_loss, (leaf, *tensors, *rest))
    upstream = (torch.rand(()), torch.rand(()))
    opcheck(ops.box_loss_backward, (*upstream, logits, *tensors, *rest))


@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compile_in_one_graph(backend, device, compiler, dynamic):
    positions = positions_for(16)

    def step(logits, target, weight):
        loss, position = dflkern.dfl_loss_and_decode(logits * 2, target, dim=2, project=positions)
        mean = dflkern.dfl_loss(logits, target, dim=2, weight=weight, reduction="mean")
        return mean + (loss * weight).sum() + position.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        logits = torch.randn(batch, 4, 16, 5, device=device, requires_grad=True)
        target = torch.rand(batch, 4, 5, device=device) * 15
        weight = torch.rand(batch, 1, 1, device=device)
        results = [f(logits, target, weight) for f in (step, compiled)]
        gradients = [torch.autograd.grad(r, logits)[0] for r in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients)


def test_compiled_boxes_in_one_graph():
    anchors, stride = dflkern.make_anchors([(2, 2), (1, 1)], [8, 16])
    target_boxes = torch.tensor([0.0, 0, 2, 2]) + torch.rand(2, 5, 4)
    foreground, weight = torch.rand(2, 5) > 0.3, torch.rand(2, 5, 3)

    def step(logits):
        boxes = dflkern.decode_boxes(logits, anchors, stride, dim=2)
        losses = dflkern.box_loss(
            logits, anchors, target_boxes, weight, weight.sum(), dim=2, foreground=foreground
        )
        return sum(losses) + boxes.mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    logits = torch.randn(2, 4, 8, 5, requires_grad=True)
    results = [f(logits) for f in (step, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(r, logits)[0] for r in results])


def test_compiled_code_follows_use_backend():
    def double(logits):
        return dflkern.dfl_decode(logits) * 2

    torch._dynamo.reset()
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 16)
    compiled(logits)
    with dflkern.use_backend("cuda"), pytest.raises(RuntimeError, match='"cuda" was asked for'):
        compiled(logits)


def test_compiled_graph_holds_the_fused_operators_both_ways():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def record(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "dflkern" in str(node.target))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(
        lambda z, t: dflkern.dfl_loss(z, t).sum(), fullgraph=True, backend=compiler
    )
    logits = torch.randn(5, 16, requires_grad=True)
    compiled(logits, torch.ones(5)).backward()
    assert seen == ["dflkern.dfl_loss.default", "dflkern.dfl_loss_backward.default"]


def test_export_shows_plain_operations():
    class Head(torch.nn.Module):
        def forward(self, x):
            anchors, stride = dflkern.make_anchors([(2, 2), (1, 1)], [8, 16])
            return dflkern.decode_boxes(x.view(1, 4, 16, 5), anchors, stride, dim=2)

    x = torch.randn(1, 64, 5)
    program = torch.export.export(Head(), (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("softmax" in target for target in targets)
    assert not any("dflkern" in target for target in targets)
    torch.testing.assert_close(program.module()(x), Head()(x))
    with warnings.catch_warnings():  # that tracing is deprecated
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(dflkern.DFLDecode(), torch.randn(3, 16))
    assert "dflkern::" not in str(traced.graph)
    assert "softmax" in str(traced.graph)
