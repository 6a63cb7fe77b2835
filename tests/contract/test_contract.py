"""What every function promises beside its values: shapes, dtypes, strides, memory, kernels."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import dflkern
from dflkern.operators import modes
from support import DTYPES, OPS, evaluate, logits_of, positions_for, run, targets_for


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes(backend, device, op, dtype):
    logits, dim = logits_of("rows-4d", 16, dtype, device)
    results, gradient = run(op, logits, targets_for(logits, dim), dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for result in results:
        assert result.dtype == wide
        assert result.shape == (2, 5, 4)
    assert gradient.dtype == dtype
    assert gradient.shape == logits.shape


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_changed(backend, device, op):
    logits, dim = logits_of("columns", 16, torch.float32, device)
    target = targets_for(logits, dim)
    before = logits.clone(), target.clone()
    run(op, logits, target, dim)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(backend, device, op):
    logits, dim = logits_of("rows", 16, torch.bfloat16, device)
    target = targets_for(logits, dim)
    plain = run(op, logits, target, dim)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = run(op, logits, target, dim)
    for a, b in zip([*plain[0], plain[1]], [*cast[0], cast[1]], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_reductions(backend, device):
    logits, dim = logits_of("rows-4d", 16, torch.float32, device)
    target = targets_for(logits, dim)
    loss = dflkern.dfl_loss(logits, target)
    for weight in (
        None,
        torch.rand(2, 5, 4, device=device),
        torch.rand(5, 1, device=device).double(),
        torch.rand((), device=device).half(),
    ):
        weighted = loss if weight is None else loss * weight.float()
        for reduction, expected in (
            ("none", weighted),
            ("sum", weighted.sum()),
            ("mean", weighted.sum() / 40),
            ("side_mean", weighted.mean(-1)),
        ):
            actual = dflkern.dfl_loss(logits, target, weight=weight, reduction=reduction)
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["rows-4d", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_over_sides(backend, device, layout, dtype):
    """The axis before the bins, in every layout; the same gradient as that of a mean."""
    logits, dim = logits_of(layout, 16, dtype, device)
    target = targets_for(logits, dim)
    leaf, twin = (logits.clone().requires_grad_() for _ in "ab")
    loss = dflkern.dfl_loss(leaf, target, dim=dim, reduction="side_mean")
    expected = dflkern.dfl_loss(twin, target, dim=dim).mean(dim % logits.ndim - 1)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(expected)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_mean_over_sides_can_be_differentiated_twice(backend, device):
    leaf = torch.randn(3, 4, 8, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4, device=device, dtype=torch.float64) * 7

    def loss(logits):
        return dflkern.dfl_loss(logits, target, reduction="side_mean")

    assert gradcheck(loss, leaf)
    assert gradgradcheck(loss, leaf)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduction_over_nothing_is_zero_and_connected(backend, device, reduction):
    logits = torch.randn(0, 4, 16, device=device, requires_grad=True)
    loss = dflkern.dfl_loss(logits, torch.zeros(0, 4, device=device), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == (0, 4, 16)


def test_weight_scales_the_gradient(backend, device):
    logits, dim = logits_of("rows", 16, torch.float32, device)
    target, weight = targets_for(logits, dim), torch.rand(41, device=device)
    leaf = logits.clone().requires_grad_()
    dflkern.dfl_loss(leaf, target, weight=weight, reduction="sum").backward()
    expected = run("loss", logits, target, dim, upstream=[weight])[1]
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("op", OPS)
def test_backward_twice(backend, device, op):
    logits, dim = logits_of("columns", 16, torch.float32, device)
    leaf = logits.clone().requires_grad_()
    results = evaluate(op, leaf, targets_for(logits, dim), dim)
    total = sum(result.sum() for result in results)
    first, second = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)


def test_two_losses_on_the_same_logits(backend, device):
    logits, dim = logits_of("rows", 16, torch.float32, device)
    target = targets_for(logits, dim)
    leaf = logits.clone().requires_grad_()
    total = dflkern.dfl_loss(leaf, target).sum() + leaf.softmax(1).square().sum()
    total.backward()
    other = logits.clone().requires_grad_()
    other.softmax(1).square().sum().backward()
    one = [torch.ones(41, device=device)]
    expected = run("loss", logits, target, dim, upstream=one)[1] + other.grad
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("project", [None, "positions"])
@pytest.mark.parametrize("layout", ["rows", "columns", "permuted"])
def test_gradcheck(backend, device, layout, project):
    shapes = {"rows": ((2, 4), 1), "columns": ((4, 2), 0), "permuted": ((2, 1, 4), -1)}
    shape, dim = shapes[layout]
    logits = torch.randn(shape, dtype=torch.float64, device=device)
    if layout == "permuted":
        logits = logits.transpose(0, 1)
    target = targets_for(logits, dim, -1, 4, torch.float64)
    project = positions_for(4) if project else None
    leaf = logits.requires_grad_()
    for op in OPS:

        def function(z, op=op):
            return evaluate(op, z, target, dim, project)

        assert gradcheck(function, (leaf,))
        assert gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bytes_saved_for_backward(backend, device, layout):
    """The logits and the target themselves, and nothing else."""
    logits, dim = logits_of(layout, 16, torch.bfloat16, device)
    leaf = logits.requires_grad_()
    target = targets_for(logits, dim)
    for op in OPS:
        kept = []
        keep = kept.append
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=keep: k(t) or t, lambda t: t):
            evaluate(op, leaf, target, dim)
        pointers = {t.data_ptr() for t in kept}
        assert pointers == {leaf.data_ptr()} | ({target.data_ptr()} if op != "decode" else set())


def test_layouts_are_read_in_place(kernels, device):
    """No operation of PyTorch touches the logits: no copy, no cast."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for layout in ("rows", "columns", "slice", "padded", "strided"):
        logits, dim = logits_of(layout, 16, torch.bfloat16, device)
        target = targets_for(logits, dim)
        seen = []
        with Record():
            evaluate("both", logits, target, dim)
        assert seen == ["dflkern.dfl_loss_and_decode.default"], layout
    logits, dim = logits_of("unmergeable", 16, torch.float32, device)
    assert "copied" in dflkern.explain("dfl_decode", logits, dim=dim)


def test_modules_equal_functions(backend, device):
    logits, dim = logits_of("rows", 17, torch.float32, device)
    target, weight = targets_for(logits, dim), torch.rand(41, device=device)
    positions = positions_for(17)
    loss = dflkern.DFLoss(project=torch.tensor(positions), margin=0.1, reduction="mean")
    loss = copy.deepcopy(loss).half().to(device)
    assert torch.equal(
        loss(logits, target, weight),
        dflkern.dfl_loss(
            logits, target, project=torch.tensor(positions).tolist(), margin=0.1, weight=weight,
            reduction="mean",
        ),
    )  # fmt: skip
    decode = dflkern.DFLDecode(project=positions)
    assert torch.equal(decode(logits), dflkern.dfl_decode(logits, project=positions))
    assert not list(decode.state_dict())
    assert "margin=0.1" in repr(loss)


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    from dflkern.gpu import launch

    ran = []
    original = launch.run
    monkeypatch.setattr(launch, "run", lambda op, *rest: ran.append(op) or original(op, *rest))
    logits = torch.randn(5, 16, requires_grad=True)
    with dflkern.use_backend("triton"):
        loss = dflkern.dfl_loss(logits, torch.ones(5))
    loss.sum().backward()
    assert ran == ["dfl_loss", "dfl_loss_backward"]


@pytest.mark.parametrize("normalizer", [3.0, torch.tensor(3.0, dtype=torch.float64)])
def test_a_normalizer_divides_the_sum_and_its_gradient(backend, device, normalizer):
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    logits, target = torch.randn(5, 4, 8, device=device), torch.rand(5, 4, device=device) * 7
    weight, leaf = torch.rand(5, 1, device=device), logits.requires_grad_()
    loss = dflkern.dfl_loss(leaf, target, weight=weight, reduction="sum", normalizer=normalizer)
    plain = dflkern.dfl_loss(leaf, target, weight=weight, reduction="sum") / 3
    module = dflkern.DFLoss(reduction="sum")(leaf, target, weight, normalizer)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    assert torch.equal(module, loss)
    gradients = [torch.autograd.grad(each, leaf, create_graph=True)[0] for each in (loss, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        *[torch.autograd.grad(each.square().sum(), leaf)[0] for each in gradients]
    )
    empty = dflkern.dfl_loss(leaf[:0], target[:0], reduction="sum", normalizer=0.0)
    assert empty == 0


def test_kernels_by_the_profiler(kernels, device, monkeypatch):
    """One operator forward and one backward, of which a GPU sees one kernel each.

    Calls of GPU kernels that bypass the dispatcher show no operator, only their kernels.
    """
    if kernels[0] != "cpu":
        monkeypatch.setattr(modes, "FAST_PATH", False)
    logits, dim = logits_of("columns", 16, torch.float32, device)
    leaf, target = logits.requires_grad_(), targets_for(logits, dim)
    upstream = torch.ones_like(target)

    def profiled(function):
        function()
        with torch.profiler.profile() as profile:
            function()
        return profile.events()

    def outermost(events):
        """Names of operators that no other operator called."""
        names = []
        for event in events:
            parent, inside = event.cpu_parent, False
            while parent is not None:
                inside |= parent.name.startswith(("dflkern::", "aten::"))
                parent = parent.cpu_parent
            if event.name.startswith(("dflkern::", "aten::")) and not inside:
                names.append(event.name.replace("_cpu_", ""))
        return [name for name in names if name != "aten::detach"]

    forward = profiled(lambda: dflkern.dfl_loss(leaf, target, dim=dim))
    assert outermost(forward) == ["dflkern::dfl_loss"]
    loss = dflkern.dfl_loss(leaf, target, dim=dim)
    backward = profiled(lambda: torch.autograd.grad(loss, leaf, upstream, retain_graph=True))
    assert outermost(backward) == ["dflkern::dfl_loss_backward"]
    if device.type == "cuda":
        for events in (forward, backward):
            launched = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            assert len(launched) == 1
