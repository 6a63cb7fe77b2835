"""The table of operators: what is derived from a record, and that all places agree with it."""

import inspect

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import dflkern
from dflkern.commands.compile import OPS
from dflkern.cpu import library as cpu_library
from dflkern.operators import modes, table
from dflkern.operators.registration import register
from dflkern.operators.run import bind, call
from dflkern.operators.table import ALL, TABLE, Operator, Setting

POSITIONS = "Tensor? project, float[]? positions, int dim"
LOSS = "Tensor logits, Tensor target, Tensor? weight, Tensor? normalizer"
CLASS_LOSS = (
    "Tensor class_logits, Tensor matched, Tensor score, Tensor gt_labels, Tensor normalizer, "
    "Tensor? class_weight, int dim, str kind, float alpha, float gamma, bool detach_modulation, "
    "str backend"
)
DISTANCE_LOSS = (
    "Tensor distances, Tensor anchor_points, Tensor target_boxes, Tensor weight, "
    "Tensor normalizer, Tensor stride, Tensor? foreground, Tensor? matched, int dim, "
    "float[] image_size, str iou, str backend"
)
BOX_LOSS = (
    "Tensor logits, Tensor anchor_points, Tensor target_boxes, Tensor weight, Tensor? normalizer, "
    "Tensor? foreground, Tensor? matched, Tensor? stride, "
    f"{POSITIONS}, float margin, str iou, str reduction, str backend"
)
SCHEMAS = [
    f"dfl_loss({LOSS}, {POSITIONS}, float margin, str reduction, str backend) -> Tensor",
    f"dfl_loss_backward(Tensor grad_loss, {LOSS}, {POSITIONS}, float margin, str reduction, "
    "str backend) -> Tensor",
    f"dfl_decode(Tensor logits, {POSITIONS}, str backend) -> Tensor",
    f"dfl_decode_backward(Tensor grad_position, Tensor logits, {POSITIONS}, str backend) -> Tensor",
    f"dfl_loss_and_decode(Tensor logits, Tensor target, {POSITIONS}, float margin, str backend) "
    "-> (Tensor, Tensor)",
    "dfl_loss_and_decode_backward(Tensor grad_loss, Tensor grad_position, Tensor logits, "
    f"Tensor target, {POSITIONS}, float margin, str backend) -> Tensor",
    f"decode_boxes(Tensor logits, Tensor anchor_points, Tensor? stride, {POSITIONS}, "
    "str box_format, str backend) -> Tensor",
    f"decode_boxes_backward(Tensor grad_boxes, Tensor logits, Tensor? stride, {POSITIONS}, "
    "str box_format, str backend) -> Tensor",
    f"box_loss({BOX_LOSS}) -> (Tensor, Tensor)",
    f"box_loss_backward(Tensor grad_iou, Tensor grad_dfl, {BOX_LOSS}) -> Tensor",
    f"class_loss({CLASS_LOSS}) -> Tensor",
    f"class_loss_backward(Tensor grad_loss, {CLASS_LOSS}) -> Tensor",
    f"distance_loss({DISTANCE_LOSS}) -> (Tensor, Tensor)",
    f"distance_loss_backward(Tensor grad_iou, Tensor grad_l1, {DISTANCE_LOSS}) -> Tensor",
    "task_aligned_assign(Tensor class_logits, Tensor boxes, Tensor anchor_points, Tensor stride, "
    "Tensor gt_boxes, Tensor gt_labels, Tensor gt_image, int dim, int topk, int topk2, "
    "float alpha, float beta, str iou, float min_side, str conflicts, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
]

every = pytest.mark.parametrize("op", ALL.values(), ids=lambda op: op.name)


def test_schemas():
    assert [op.schema for op in ALL.values()] == SCHEMAS


@every
def test_the_registered_operator_has_the_records_schema(op):
    found = getattr(torch.ops.dflkern, op.name).default._schema
    assert str(found) == f"dflkern::{op.schema}"


@every
def test_the_reference_has_the_records_names_in_their_order(op):
    names = [name for name in op.names if name not in ("positions", "backend")]
    assert list(inspect.signature(op.forward).parameters) == names


@pytest.mark.parametrize("op", TABLE.values(), ids=lambda op: op.name)
def test_the_public_function_has_the_records_names(op):
    parameters = inspect.signature(getattr(dflkern, op.name)).parameters
    assert set(parameters) == set(op.names) - {"positions", "backend"}


CPP = [
    *((op, op.name) for op in ALL.values() if "cpu" in op.kernels),
    (table.BOX_LOSS, "box_loss_keep"),
    (table.BOX_LOSS.gradient, "box_loss_backward_kept"),
]


@pytest.mark.parametrize(("op", "name"), CPP, ids=[name for _, name in CPP])
def test_the_cpp_operator_takes_the_records_names(op, name):
    if not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    found = getattr(torch.ops.dflkern, f"_cpu_{name}").default._schema
    names = [argument.name for argument in found.arguments]
    absent = {"positions", "backend"}
    if name == "box_loss_backward_kept":
        absent |= {"target_boxes", "weight", "foreground", "matched", "stride"}
        names = [each for each in names if each not in ("candidates", "kept")]
    assert names == [each for each in op.names if each not in absent]


def test_compile_knows_every_operator_with_gpu_kernels():
    names = {op.name for op in ALL.values() if "triton" in op.kernels}
    assert {op.name for op in OPS.values()} == names
    assert set(OPS) == {*names, "box_loss_sums"}


def test_bind_computes_nothing_and_checks_everything():
    logits, target = torch.randn(3, 4, 16), torch.rand(3, 4)
    bound = bind(dflkern.dfl_loss, logits, target, reduction="sum", normalizer=2.0)
    assert [*bound, "backend"] == list(table.DFL_LOSS.names)
    assert bound["logits"] is logits
    assert bound["normalizer"].item() == 2
    with pytest.raises(ValueError, match="target has shape"):
        bind(dflkern.dfl_loss, logits, target[:1])
    assert isinstance(dflkern.dfl_loss(logits, target), torch.Tensor)  # bind has ended


def power(logits, other, project, dim, exponent):
    return (logits**exponent).sum(dim) * other


def power_backward(grad_power, logits, other, project, dim, exponent):
    return (grad_power * other).unsqueeze(dim) * exponent * logits ** (exponent - 1)


@pytest.fixture
def toy():
    """An operator of its own, registered from a record and nothing else."""
    op = Operator(
        name="toy_power",
        tensors=("logits", "other"),
        settings=(Setting("exponent", "float"),),
        results=("power",),
        saved=("logits", "other"),
        forward=power,
        backward=power_backward,
        problem=table._distributions,
        shape=table._without_bins,
    )
    library = torch.library.Library("dflkern", "FRAGMENT")
    register(op, library)
    yield op
    library._destroy()


def longest(scores, labels, dim, offset):
    return scores.argmax(dim).int(), (scores.amax(dim) + offset).float()


@pytest.mark.parametrize("fast", [True, False])
def test_a_record_without_bins_and_without_a_gradient(fast, monkeypatch):
    monkeypatch.setattr(modes, "FAST_PATH", fast)
    op = Operator(
        name="toy_longest",
        tensors=("scores", "labels?"),
        settings=(Setting("offset", "float"),),
        results=("index", "score"),
        forward=longest,
        allocate=lambda *, scores, **others: (
            scores.new_empty(scores.shape[0], dtype=torch.int32), scores.new_empty(scores.shape[0])
        ),
        bins=False,
        kernels=(),
    )  # fmt: skip
    library = torch.library.Library("dflkern", "FRAGMENT")
    register(op, library)
    try:
        assert op.schema == (
            "toy_longest(Tensor scores, Tensor? labels, int dim, float offset, str backend) "
            "-> (Tensor, Tensor)"
        )
        scores = torch.tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
        index, score = call(op, scores=scores, labels=None, dim=1, offset=1.0)
        assert index.tolist() == [1, 0]
        assert index.dtype == torch.int32
        assert score.tolist() == [4.0, 3.0]
        opcheck(torch.ops.dflkern.toy_longest, (scores.detach(), None, 1, 1.0, "auto"))
        with dflkern.use_backend("cpu"), pytest.raises(RuntimeError, match="no kernel of this"):
            call(op, scores=scores, labels=None, dim=1, offset=1.0)
    finally:
        library._destroy()


@pytest.mark.parametrize("fast", [True, False])
def test_a_record_is_all_that_an_operator_needs(toy, fast, monkeypatch):
    monkeypatch.setattr(modes, "FAST_PATH", fast)
    logits = torch.rand(3, 4, 5, dtype=torch.float64).add(0.5).requires_grad_()
    other = torch.rand(3, 4, dtype=torch.float64)

    def function(leaf):
        with dflkern.use_backend("reference"):
            return call(
                toy, logits=leaf, other=other, project=None, positions=None, dim=2, exponent=3.0
            )

    torch.testing.assert_close(function(logits), (logits**3).sum(2) * other)
    assert gradcheck(function, (logits,))
    assert gradgradcheck(function, (logits,))
    torch.testing.assert_close(
        torch.func.grad(lambda z: function(z).sum())(logits.detach()),
        torch.autograd.grad(function(logits).sum(), logits)[0],
    )
    opcheck(torch.ops.dflkern.toy_power, (logits, other, None, None, 2, 3.0, "reference"))
