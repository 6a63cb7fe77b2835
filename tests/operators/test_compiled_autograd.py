"""A forward in eager mode and a compiled backward; and dflkern imported a second time."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo import compiled_autograd

import dflkern

TARGET, POINTS = torch.rand(6, 4) * 15, torch.rand(6, 2)
BOXES = torch.cat((POINTS - TARGET[:, :2], POINTS + TARGET[:, 2:]), -1)[None]
FORWARDS = {
    "mean": lambda z: dflkern.dfl_loss(z, TARGET, reduction="mean"),
    "side_mean": lambda z: dflkern.dfl_loss(z, TARGET, reduction="side_mean").sum(),
    "project": lambda z: dflkern.dfl_loss(z, TARGET, project=[k * k for k in range(16)]).sum(),
    "decode": lambda z: dflkern.dfl_decode(z).sum(),
    "both": lambda z: sum(dflkern.dfl_loss_and_decode(z, TARGET)).sum(),
    "decode_boxes": lambda z: dflkern.decode_boxes(z[None], POINTS).sum(),
    "box_loss": lambda z: sum(dflkern.box_loss(z[None], POINTS, BOXES, TARGET[None, :, 0], 3.0)),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_compiled_autograd_of_an_eager_forward(forward):
    torch._dynamo.reset()
    leaf, twin = (torch.linspace(-2, 2, 384).view(6, 4, 16).requires_grad_() for _ in "ab")
    forward(twin).backward()
    result = forward(leaf)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        result.backward()
    assert torch.equal(leaf.grad, twin.grad)


def test_a_second_import_works_and_so_does_the_first():
    script = """
        import sys, torch, dflkern as first

        def gradient(module, backend):
            leaf = torch.linspace(-2, 2, 384).view(6, 4, 16).requires_grad_()
            with module.use_backend(backend):
                module.dfl_loss(leaf, torch.ones(6, 4), reduction="mean").backward()
            return leaf.grad

        expected = gradient(first, "cpu")
        for name in [name for name in sys.modules if name.split(".")[0] == "dflkern"]:
            del sys.modules[name]
        import dflkern as second
        assert second is not first
        for module in (second, first, second):
            for backend in ("cpu", "reference"):
                torch.testing.assert_close(gradient(module, backend), expected)
        compiled = torch.compile(second.dfl_decode, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.zeros(2, 16)), torch.full((2,), 7.5))
        print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert run.stdout == "done\n", run.stderr
