"""task_aligned_assign as an operator: opcheck, torch.compile, export, explain, memory."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import dflkern
from assignment import run, same, scene, transposed
from dflkern.operators import modes
from dflkern.operators.run import bind
from dflkern.operators.table import TASK_ALIGNED_ASSIGN


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    return request.param


def arguments(given, backend, **options):
    bound = bind(run, given, backend, **options) | {"backend": backend}
    return [bound[name] for name in TASK_ALIGNED_ASSIGN.names]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_opcheck(backend, dtype):
    given = scene(12, batch=2, image=64)
    for form in (given, transposed(given)):
        form = {**form, "class_logits": form["class_logits"].to(dtype)}
        opcheck(torch.ops.dflkern.task_aligned_assign, arguments(form, backend))


def test_the_registered_operator_gives_the_same_bits(backend, monkeypatch):
    given = scene(13, "crowd")
    expected = run(given, backend)
    monkeypatch.setattr(modes, "FAST_PATH", False)
    assert same(run(given, backend), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(backend, dynamic):
    def step(given):
        found = dflkern.task_aligned_assign(**given, min_side=16.0)
        return found.matched + 1, found.score * 2, found.score_sum.clamp(min=1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in range(2):
        given = scene(seed, "crowd" if seed else "usual", batch=2, image=64)
        with dflkern.use_backend(backend):
            assert same(compiled(given), step(given))


def test_export_shows_plain_operations():
    class Step(torch.nn.Module):
        def forward(self, given):
            return tuple(dflkern.task_aligned_assign(**given))

    given = scene(14, batch=2, image=64)
    program = torch.export.export(Step(), (given,))
    assert not any("dflkern" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(given)[0], Step()(given)[0])


def test_explain():
    given = scene(15, batch=2, image=64)
    words = dflkern.explain("task_aligned_assign", **given)
    assert words.startswith("task_aligned_assign: class_logits of shape (2, 84, 5), float32 on cpu")
    assert "cpu: serves it" in words
    with dflkern.use_backend("triton"):
        assert "no kernel of this operator" in dflkern.explain("task_aligned_assign", **given)


MEMORY = """
import resource, torch, dflkern
from assignment import run, scene
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
given = scene(0, "crowd", batch=2, image=64)
run(given)
given = scene(0, "crowd", batch=16, image=640, classes=2, boxes=scene(
    0, "crowd", batch=5, image=640)["gt_boxes"])
before = peak()
found = run(given)
print((peak() - before) / 1024, int((found.matched >= 0).sum()))
"""


def test_memory_is_that_of_the_results_and_the_claims():
    """16 images of 300 objects: (B, N, A) numbers would take 160 MB a tensor."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{MEMORY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes, foreground = map(float, done.stdout.split())
    assert foreground > 10_000
    assert megabytes <= 10
