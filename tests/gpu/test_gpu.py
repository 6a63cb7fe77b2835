"""What only a GPU can show: `pytest -m gpu`, where the parity suite also runs on the device."""

import pytest
import torch

import dflkern
from dflkern.gpu.cuda import loading as cuda
from support import logits_of, run, targets_for

pytestmark = pytest.mark.gpu
LAYOUTS = ("rows", "columns", "padded")


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    """Run a test on both GPU backends."""
    if request.param == "cuda" and (reasons := cuda.refusals()):
        pytest.skip(f"no CUDA kernels: {reasons[0]}")
    with dflkern.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("num_bins", [16, 17, 91])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_never_waits(gpu_backend, layout, num_bins):
    """Neither forward nor backward, after a first call that compiles or loads."""
    logits, dim = logits_of(layout, num_bins, torch.float16, "cuda")
    target = targets_for(logits, dim)
    upstream = [torch.ones_like(target)] * 2
    expected = run("both", logits, target, dim, upstream=upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run("both", logits, target, dim, upstream=upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again[1], expected[1])


@pytest.mark.parametrize("num_bins", [16, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cuda_graph_captures_and_replays(gpu_backend, layout, num_bins):
    """Forward and backward, replayed on new values in the captured tensors."""
    logits, dim = logits_of(layout, num_bins, torch.float32, "cuda")
    target = targets_for(logits, dim)
    upstream = [torch.ones_like(target)] * 2
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run("both", logits, target, dim, upstream=upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, gradient = run("both", logits, target, dim, upstream=upstream)
    fresh, _ = logits_of(layout, num_bins, torch.float32, "cuda")
    logits.copy_(fresh)
    target.copy_(targets_for(logits, dim))
    graph.replay()
    expected, expected_gradient = run("both", logits, target, dim, upstream=upstream)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(gradient, expected_gradient)


def test_a_device_that_is_not_the_current_one(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no cuda:1")
    logits, dim = logits_of("rows", 17, torch.float32, "cuda:1")
    target = targets_for(logits, dim)
    here = run("both", logits.to("cuda:0"), target.to("cuda:0"), dim)
    there = run("both", logits, target, dim)
    assert there[1].device == torch.device("cuda:1")
    assert torch.equal(there[1].cpu(), here[1].cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_more_than_two_to_the_31_elements(gpu_backend, layout):
    """The last distributions have the bits that they have alone."""
    needed = 3 * 2 * (1 << 31)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    shape = ((1 << 27) + 5, 16) if layout == "rows" else ((1 << 15) + 1, 16, 4096)
    logits = torch.randn(shape, device="cuda", dtype=torch.float16)
    last = logits[-1000:] if layout == "rows" else logits[-1:]
    target = torch.rand(logits.movedim(1, -1).shape[:-1], device="cuda") * 15
    part = target[-len(last) :]
    small = [torch.ones_like(part)] * 2
    expected = run("both", last.clone(), part.clone(), 1, upstream=small)
    results, gradient = run(
        "both", logits, target, 1, upstream=[torch.ones((), device="cuda").expand_as(target)] * 2
    )
    assert all(torch.equal(r[-len(last) :], e) for r, e in zip(results, expected[0], strict=True))
    assert torch.equal(gradient[-len(last) :], expected[1])
