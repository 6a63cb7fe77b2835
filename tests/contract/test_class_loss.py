"""class_loss: every backend against the definition, the reference, float64 and its contract."""

import contextlib
import copy
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import dflkern
from class_inputs import (
    KINDS,
    LAYOUTS,
    check,
    dense,
    from_dense_target,
    logits_of,
    run,
    targets_for,
)
from dflkern.cpu import library as cpu_library
from dflkern.operators import modes
from dflkern.operators.table import CLASS_LOSS
from support import DTYPES


@contextlib.contextmanager
def use(name):
    if name == "cpu" and not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    with dflkern.use_backend(name):
        yield name


@pytest.fixture(params=["reference", "cpu"])
def way(request):
    """Run a test on the reference and on the CPU kernels."""
    with use(request.param) as used:
        yield used


@pytest.fixture(params=["eager", "registered"])
def kernels(request, monkeypatch):
    """Run a test on the CPU kernels, past the dispatcher and as a registered operator."""
    monkeypatch.setattr(modes, "FAST_PATH", request.param == "eager")
    with use("cpu") as used:
        yield used


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_an_explicit_target_gives_the_same(way, poisoned, layout, kind, weighted):
    logits, dim = logits_of(layout, 20, torch.float64)
    given = targets_for(logits, dim)
    weight = torch.rand(logits.shape[dim]) + 0.5 if weighted else None
    leaf = logits.clone().requires_grad_()
    expected = from_dense_target(leaf, dim, given, kind, weight=weight)
    (gradient,) = torch.autograd.grad(expected, leaf, torch.tensor(0.75))
    actual = run(logits, dim, given, kind=kind, class_weight=weight)
    torch.testing.assert_close(actual[0][0], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[1], gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("kind", ["varifocal", "quality"])
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.5, 2, 3.25])
@pytest.mark.parametrize("detach", [False, True])
def test_modulations(way, kind, gamma, detach):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, 7, torch.float64)
        given = targets_for(logits, dim)
        leaf = logits.clone().requires_grad_()
        expected = from_dense_target(leaf, dim, given, kind, 0.3, gamma, detach)
        (gradient,) = torch.autograd.grad(expected, leaf, torch.tensor(0.75))
        options = {"alpha": 0.3, "gamma": gamma, "detach_modulation": detach}
        actual = run(logits, dim, given, kind=kind, **options)
        torch.testing.assert_close(actual[0][0], expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(actual[1], gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "head slice", "strided"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(way, poisoned, layout, dtype, kind):
    logits, dim = logits_of(layout, 20, dtype)
    check(logits, dim, targets_for(logits, dim), kind=kind)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 65, 80, 257])
def test_numbers_of_classes(way, poisoned, classes):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, classes)
        weight = torch.rand(classes)
        check(logits, dim, targets_for(logits, dim), class_weight=weight)
        check(logits, dim, targets_for(logits, dim))


@pytest.mark.parametrize(
    "anchors", [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 256, 257, 1023, 1024, 1025]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_anchors(way, poisoned, anchors, dtype):
    for shape, dim in (((2, anchors, 5), 2), ((2, 5, anchors), 1)):
        logits = torch.randn(shape).to(dtype)
        check(logits, dim, targets_for(logits, dim), kind="varifocal")
        check(logits, dim, targets_for(logits, dim))


@pytest.mark.parametrize("level", [-60.0, -17.0, -11.5, -4.0, 0.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_lose_no_digits(way, kind, level):
    """A head is initialised to one small probability, which a sum of log(1 + e^z) could lose."""
    for shape, dim in (((2, 400, 16), 2), ((2, 16, 400), 1)):
        logits = torch.full(shape, level)
        given = targets_for(logits, dim)
        given.matched.fill_(-1)
        loss = run(logits, dim, given, kind=kind)[0][0].item()
        p, softplus = 1 / (1 + math.exp(-level)), math.log1p(math.exp(level))
        factor = {"bce": 1, "varifocal": 0.75 * p**2, "quality": p**2}[kind]
        expected = factor * softplus * logits.numel() / given.normalizer.item()
        assert loss == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("score", DTYPES, ids=str)
def test_dtypes_of_the_assignment(way, score, integer):
    logits, dim = logits_of("columns", 20)
    given = targets_for(logits, dim, score=score, integer=integer)
    check(logits, dim, given)
    shifted = copy.copy(given)  # the same numbers, not contiguous
    shifted.matched = given.matched.repeat_interleave(2, 1)[:, ::2]
    shifted.score = given.score.t().contiguous().t()
    shifted.gt_labels = given.gt_labels.repeat_interleave(3)[::3]
    for actual, expected in zip(run(logits, dim, shifted), run(logits, dim, given), strict=True):
        assert all(map(torch.equal, actual, expected))


def test_indices_out_of_range_are_background(way):
    logits, dim = logits_of("columns", 5)
    given = targets_for(logits, dim)
    background = copy.copy(given)
    positive = dense(logits, dim, given)[0].any(dim)
    background.matched = torch.where(positive, given.matched, -1)
    background.score = torch.where(positive, given.score, math.nan)  # which must not be read
    for extreme in (2**31 - 1, -(2**31), len(given.gt_labels)):
        hostile = copy.copy(background)
        hostile.matched = torch.where(positive, given.matched, extreme).int()
        assert_same_bits(run(logits, dim, hostile), run(logits, dim, given))
    for extreme in (2**63 - 1, -(2**63), 2**32):
        hostile = copy.copy(background)
        hostile.matched = torch.where(positive, given.matched.long(), extreme)
        hostile.gt_labels = given.gt_labels.long()
        hostile.gt_labels[:2] = torch.tensor([extreme, extreme])
        assert_same_bits(run(logits, dim, hostile), run(logits, dim, given))


def test_without_objects(way):
    for layout in LAYOUTS:
        logits, dim = logits_of(layout, 4)
        given = targets_for(logits, dim, objects=1)
        given.gt_labels = given.gt_labels[:0]
        expected = torch.nn.functional.softplus(logits.double()).sum() / given.normalizer
        torch.testing.assert_close(run(logits, dim, given)[0][0].double(), expected.double())


def test_no_logits_have_a_loss_of_zero_in_the_graph(way):
    for layout in ("no image", "no anchor"):
        logits, dim = logits_of(layout, 4)
        given = targets_for(logits, dim)
        given.normalizer = torch.tensor(0.0)
        (loss,), gradient = run(logits, dim, given)
        assert loss.item() == 0
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["object", "background"])
def test_nan_reaches_the_loss_and_its_own_gradient_only(way, layout, kind, place):
    logits, dim = logits_of(layout, 20)
    given = targets_for(logits, dim)
    positive, _ = dense(logits, dim, given)
    where = tuple((positive if place == "object" else ~positive).nonzero()[7])
    logits[where] = math.nan
    (loss,), gradient = run(logits, dim, given, kind=kind)
    assert loss.isnan()
    assert gradient.isnan().nonzero().tolist() == [[int(i) for i in where]]


def test_nan_scores(way):
    logits, dim = logits_of("columns", 20)
    given = targets_for(logits, dim)
    positive, _ = dense(logits, dim, given)
    image, label, anchor = positive.nonzero()[5].tolist()
    given.score[image, anchor] = math.nan
    for kind in KINDS:
        (loss,), gradient = run(logits, dim, given, kind=kind)
        assert loss.isnan()
        assert gradient.isnan().nonzero().tolist() == [[image, label, anchor]]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_logits_have_the_limit(way, layout, kind):
    """(logit, score or None for background) → whether the loss is finite, and the gradient."""
    expected = {
        (-math.inf, None): (True, 0),
        (math.inf, None): (False, {"bce": 1, "varifocal": 0.75, "quality": 1}[kind]),
        (math.inf, 1.0): (True, 0),
        (-math.inf, 1.0): (False, -1),
        (math.inf, 0.5): (False, {"bce": 0.5, "varifocal": 0.25, "quality": 0.125}[kind]),
        (-math.inf, 0.5): (False, {"bce": -0.5, "varifocal": -0.25, "quality": -0.125}[kind]),
    }
    for (logit, score), (finite, slope) in expected.items():
        logits, dim = logits_of(layout, 20)
        given = targets_for(logits, dim)
        given.normalizer = torch.tensor(1.0)
        positive, _ = dense(logits, dim, given)
        where = (positive if score is not None else ~positive).nonzero()[3].tolist()
        logits[tuple(where)] = logit
        if score is not None:
            anchor = [where[0], where[3 - dim]]
            given.score[tuple(anchor)] = score
        (loss,), gradient = run(logits, dim, given, grad=1.0, kind=kind)
        assert not gradient.isnan().any()
        assert loss.isfinite() if finite else loss == math.inf
        assert gradient[tuple(where)].item() == pytest.approx(slope, abs=1e-30)


def test_a_class_weight_of_zero_silences_infinite_logits(way):
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, 20)
        weight = torch.ones(20)
        weight[3] = 0
        given = targets_for(logits, dim)
        logits.select(dim, 3).fill_(math.inf)
        (loss,), gradient = run(logits, dim, given, class_weight=weight)
        assert loss.isfinite()
        assert not gradient.select(dim, 3).any()
        logits.select(dim, 3)[0, 0] = math.nan
        assert run(logits, dim, given, class_weight=weight)[0][0].isnan()


def test_normalizers(way):
    logits, dim = logits_of("columns", 20, torch.float64)
    given = targets_for(logits, dim)
    base = run(logits, dim, given)
    for value in (2.5, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float16)):
        other = copy.copy(given)
        other.normalizer = value
        scale = given.normalizer.item() / 2.5
        found = run(logits, dim, other)
        torch.testing.assert_close(found[0][0], base[0][0] * scale)
        torch.testing.assert_close(found[1], base[1] * scale)


def test_nothing_is_mutated_and_calls_repeat(way):
    logits, dim = logits_of("columns", 20, torch.float16)
    given = targets_for(logits, dim)
    before = copy.deepcopy((logits, given))
    first = run(logits, dim, given)
    assert_same_bits(run(logits, dim, given), first)
    assert torch.equal(logits, before[0])
    assert all(torch.equal(getattr(given, name), value) for name, value in vars(before[1]).items())


@pytest.mark.parametrize("layout", ["rows", "wide columns", "strided"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_number_of_threads(kernels, layout, kind):
    logits, dim = logits_of(layout, 80)
    given = targets_for(logits, dim)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append(run(logits, dim, given, kind=kind))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_autocast_and_inference_mode(way):
    logits, dim = logits_of("columns", 20)
    given = targets_for(logits, dim)
    expected = run(logits, dim, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(logits, dim, given), expected)
    with torch.inference_mode():
        loss = dflkern.class_loss(logits, **vars(given), dim=dim)
    assert torch.equal(loss, expected[0][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_of_both_orders(way, kind, dim):
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    given = targets_for(logits, dim)
    weight = torch.rand(logits.shape[dim])

    def function(leaf):
        return dflkern.class_loss(leaf, **vars(given), dim=dim, kind=kind, class_weight=weight)

    assert gradcheck(function, (logits,))
    assert gradgradcheck(function, (logits,))


@pytest.mark.parametrize("kind", ["varifocal", "quality"])
def test_double_backward_with_a_detached_modulation(way, kind):
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    given = targets_for(logits, 2)
    losses = (
        dflkern.class_loss(logits, **vars(given), kind=kind, detach_modulation=True),
        from_dense_target(logits, 2, given, kind, detach=True),
    )
    second = []
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        second.append(torch.autograd.grad(gradient.sin().sum(), logits)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rows", "head slice", "no anchor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, kind, dtype):
    logits, dim = logits_of(layout, 6, dtype)
    given = targets_for(logits, dim)
    settings = (dim % 3, kind, 0.75, 2.0, False, "auto")
    for weight in (None, torch.rand(6)):
        tensors = (*vars(given).values(), weight)
        leaf = logits.detach().requires_grad_()
        opcheck(torch.ops.dflkern.class_loss, (leaf, *tensors, *settings))
        grad = torch.ones(())
        opcheck(torch.ops.dflkern.class_loss_backward, (grad, logits, *tensors, *settings))


@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compile_in_one_graph(compiler, dynamic):
    def step(logits, matched, score, labels):
        return dflkern.class_loss(
            logits * 2, matched, score, labels, score.sum().clamp(min=1), dim=1, kind="varifocal"
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    for anchors, objects in ((30, 4), (41, 6)) if dynamic else ((30, 4),):
        logits = torch.randn(2, 5, anchors, requires_grad=True)
        given = targets_for(logits, 1, objects)
        results = [f(logits, given.matched, given.score, given.gt_labels) for f in (step, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(r, logits)[0] for r in results])


def test_transforms_take_the_reference(way):
    logits, dim = logits_of("rows", 4, torch.float64)
    given = targets_for(logits, dim)
    expected = run(logits, dim, given, grad=1.0)[1]
    gradient = torch.func.grad(lambda z: dflkern.class_loss(z, **vars(given), dim=dim))(logits)
    torch.testing.assert_close(gradient, expected)


def test_explain_names_the_backend():
    logits, dim = logits_of("columns", 4)
    text = dflkern.explain("class_loss", logits, **vars(targets_for(logits, dim)), dim=dim)
    assert "class_logits of shape (3, 4, 301)" in text
    assert "cpu: serves it" in text or "cpu: no" in text


def test_an_unknown_backend_is_refused_with_a_sentence():
    logits, dim = logits_of("columns", 4)
    with dflkern.use_backend("triton"), pytest.raises(RuntimeError, match='"triton" was asked for'):
        dflkern.class_loss(logits, **vars(targets_for(logits, dim)), dim=dim)


def test_saved_for_backward_are_the_arguments_only():
    logits, dim = logits_of("columns", 4)
    given = targets_for(logits, dim)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        dflkern.class_loss(logits.requires_grad_(), **vars(given), dim=dim)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (logits, *vars(given).values())}
    assert len(saved) == len(CLASS_LOSS.saved) - 1  # there is no class weight


def test_ultralytics_varifocal_loss(way):
    loss = pytest.importorskip("ultralytics.utils.loss", reason="Ultralytics is not installed")
    for layout in ("rows", "columns"):
        logits, dim = logits_of(layout, 20)
        given = targets_for(logits, dim)
        positive, target = (each.transpose(1, 2) if dim == 1 else each for each in
                            dense(logits, dim, given))  # fmt: skip
        leaf = logits.clone().requires_grad_()
        rows = (leaf.transpose(1, 2) if dim == 1 else leaf).flatten(0, 1)
        target, positive = target.flatten(0, 1).float(), positive.flatten(0, 1).float()
        # Its mean over the classes, summed over the anchors
        expected = loss.VarifocalLoss()(rows, target, positive) * 20 / given.normalizer
        (gradient,) = torch.autograd.grad(expected, leaf, torch.tensor(0.75))
        found = run(logits, dim, given, kind="varifocal")
        torch.testing.assert_close(found[0][0], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1], gradient, rtol=1e-4, atol=1e-8)


def assert_same_bits(actual, expected):
    assert torch.equal(actual[0][0], expected[0][0])
    assert torch.equal(actual[1], expected[1])
