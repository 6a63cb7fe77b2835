"""What users change about a DFL module, under patch(): the results are as without it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

from torch.nn.modules import module as hooks
from ultralytics.nn.modules import block

from criteria import BINS, ORIGINAL, compare, installed, said, with_gradient
from dflkern.adapters import _ultralytics_known as known
from dflkern.adapters.ultralytics import patch


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


class FakeQuantized(nn.Conv2d):
    def forward(self, x):
        return super().forward((x * 255).round() / 255)


class Eighths(nn.Module):
    def forward(self, weight):
        return (weight / 8).round() * 8


def fake_quantized(module, seen):
    conv = FakeQuantized(BINS, 1, 1, bias=False).requires_grad_(False)
    conv.load_state_dict(module.conv.state_dict())
    module.conv = conv


def another_module(module, seen):
    module.conv = nn.Sequential(module.conv, nn.ReLU())


def parametrized(module, seen):
    nn.utils.parametrize.register_parametrization(module.conv, "weight", Eighths())


def with_a_bias(module, seen):
    module.conv.bias = nn.Parameter(torch.tensor([0.5]), requires_grad=False)


def forward_on_the_instance(module, seen):
    forward = module.conv.forward
    module.conv.forward = lambda x: forward(x) + 1


def forward_hook(module, seen):
    module.conv.register_forward_hook(
        lambda module, args, output: seen.append(output) or output * 2
    )


def forward_pre_hook(module, seen):
    module.conv.register_forward_pre_hook(lambda module, args: seen.append(args))


def backward_hook(module, seen):
    module.conv.register_full_backward_hook(lambda module, *grads: seen.append(grads))


def backward_pre_hook(module, seen):
    module.conv.register_full_backward_pre_hook(lambda module, grads: seen.append(grads))


def pruned(module, seen):
    prune.random_unstructured(module.conv, "weight", amount=3)
    module.requires_grad_(False)


def trained(module, seen):
    module.requires_grad_()
    with torch.no_grad():
        module.conv.weight += 0.25


MODULE = {
    fake_quantized: known.MODULE, another_module: known.MODULE, parametrized: known.MODULE,
    with_a_bias: known.MODULE, forward_on_the_instance: known.MODULE, forward_hook: known.HOOKS,
    forward_pre_hook: known.HOOKS, backward_hook: known.HOOKS, backward_pre_hook: known.HOOKS,
    pruned: known.HOOKS, trained: known.TRAINED,
}  # fmt: skip


def decode(module, x):
    leaf = x.clone().requires_grad_()
    return with_gradient(leaf, module(leaf))


@pytest.mark.parametrize("change", MODULE, ids=lambda change: change.__name__)
def test_a_changed_dfl_module(change):
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    change(module, seen)
    compare(lambda: decode(module, x), MODULE[change])
    assert len(seen) == (4 if "hook" in change.__name__ else 0)  # two calls unpatched, two patched


GLOBAL_HOOKS = {
    "forward": hooks.register_module_forward_hook,
    "forward pre": hooks.register_module_forward_pre_hook,
    "full backward": hooks.register_module_full_backward_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules_see_the_convolution(kind):
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    handle = GLOBAL_HOOKS[kind](lambda each, *_: seen.append(each is module.conv) and None)
    try:
        compare(lambda: decode(module, x), known.HOOKS)
    finally:
        handle.remove()
    assert sum(seen) == 4


def test_hooks_on_the_dfl_module_itself_need_nothing():
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    module.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    compare(lambda: decode(module, x))
    assert len(seen) == 4


def test_a_dfl_module_with_other_fixed_positions_is_served():
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    module.conv.weight.data.mul_(0.5)
    compare(lambda: decode(module, x))


def test_counting_flops_before_a_training_says_nothing():
    thop = pytest.importorskip("thop", reason="needs ultralytics-thop")
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    compare(lambda: torch.tensor(thop.profile(copy.deepcopy(module), inputs=(x,), verbose=False)))


def test_a_scripted_and_a_compiled_module_with_hooks():
    module, x, seen = block.DFL(BINS), torch.randn(2, 4 * BINS, 5), []
    expected = module(x)
    with patch():
        torch.testing.assert_close(torch.jit.script(module)(x), expected)
        module.conv.register_forward_pre_hook(lambda module, args: seen.append(1))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected)
    assert seen


def test_each_reason_is_said_once_in_each_patch():
    module, x = block.DFL(BINS), torch.randn(2, 4 * BINS, 5)
    with_a_bias(module, [])
    for _ in range(2):
        with patch(), warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            module(x)
            with patch():  # the same patch: nothing new
                module(x)
            trained(module, [])
            module.conv.bias = None
            module(x)
            module.requires_grad_(False)
            with_a_bias(module, [])
        assert len(said(record)) == 2
