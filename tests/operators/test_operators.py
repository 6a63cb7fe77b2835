"""The registered operators under opcheck, torch.compile and export."""

import warnings

import pytest
import torch
from torch.library import opcheck

import dflkern
from dflkern.operators.table import ALL, DFL_LOSS, TABLE
from support import DTYPES, logits_of, positions_for, targets_for


def arguments(op, logits, dim, backend, **others):
    """Arguments of an operator in the order of its schema, given those of its public function."""
    dim %= logits.ndim
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    anchors = logits.shape[1 if dim == 3 else -1]
    given = {
        "logits": logits,
        "target": targets_for(logits, dim),
        "project": None,
        "positions": None,
        "dim": dim,
        "margin": 0.01,
        "box_format": "cxcywh",
        "iou": "ciou",
        "reduction": "none" if op.reduced else "sum",
        "backend": backend,
        **(box_tensors(logits, anchors) if op.name.startswith(BOXES) else {}),
        **others,
    }
    given = {**op.defaults, **given}
    if op.is_gradient:
        forward = TABLE[op.name.removesuffix("_backward")]
        results = forward.shape(**given) if forward.shape else shape
        given |= {name: torch.randn(results, device=logits.device) for name in forward.upstream}
    return [given[name] for name in op.names]


BOXES = ("decode_boxes", "box_loss")


def box_tensors(logits, anchors):
    """Points, strides, boxes and weights for that many anchors."""
    batch = len(logits)
    return {
        "anchor_points": torch.rand(anchors, 2),
        "stride": torch.full((anchors,), 8.0),
        "target_boxes": torch.tensor([0.0, 0, 2, 2]) + torch.rand(batch, anchors, 4),
        "weight": torch.rand(batch, anchors),
        "normalizer": torch.tensor(3.0),
        "foreground": torch.rand(batch, anchors) > 0.3,
    }


DISTRIBUTIONS = [op for op in ALL.values() if op.bins and not op.name.startswith(BOXES)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", DISTRIBUTIONS, ids=lambda op: op.name)
def test_opcheck(backend, device, op, dtype):
    layouts = ("rows-4d", "slice", "empty") if backend[0] == "reference" else ("padded",)
    for layout in layouts:
        logits, dim = logits_of(layout, 8, dtype, device)
        logits = logits.detach().requires_grad_(op.gradient is not None)
        opcheck(getattr(torch.ops.dflkern, op.name), arguments(op, logits, dim, backend[0]))


@pytest.mark.parametrize("op", [DFL_LOSS, DFL_LOSS.gradient], ids=lambda op: op.name)
@pytest.mark.parametrize("reduction", ["sum", "mean", "side_mean"])
def test_opcheck_with_weight_and_reduction(backend, device, op, reduction):
    logits, dim = logits_of("rows-4d", 8, torch.float32, device)
    logits.requires_grad_(op.gradient is not None)
    others = {"weight": torch.rand(2, 5, 1, device=device), "reduction": reduction}
    if reduction == "sum":
        others["normalizer"] = torch.tensor(3.0, device=device)
    opcheck(getattr(torch.ops.dflkern, op.name), arguments(op, logits, dim, backend[0], **others))


@pytest.mark.parametrize("op", [op for op in DISTRIBUTIONS if op.gradient], ids=lambda op: op.name)
def test_opcheck_with_a_project(backend, device, op):
    logits, dim = logits_of("padded", 8, torch.float32, device)
    project = torch.tensor(positions_for(8), device=device)
    given = arguments(op, logits.requires_grad_(), dim, backend[0], project=project)
    opcheck(getattr(torch.ops.dflkern, op.name), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    "op", [op for op in ALL.values() if op.name.startswith(BOXES)], ids=lambda op: op.name
)
def test_opcheck_on_boxes(op, dtype, dim):
    shape = (2, 5, 4, 8) if dim == 3 else (2, 4, 8, 5)
    logits = torch.randn(shape, dtype=torch.float64).to(dtype)
    logits.requires_grad_(op.gradient is not None)
    opcheck(getattr(torch.ops.dflkern, op.name), arguments(op, logits, dim, "auto"))


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
