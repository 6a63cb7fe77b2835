"""Fixtures, and the one environment variable that must be set before a kernel is decorated."""

import contextlib
import os
import re
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dflkern
import emulation
from dflkern.cpu import library as cpu_library
from dflkern.gpu.cuda import loading as cuda
from dflkern.operators import modes

# A job that a shell runs in the background ignores Ctrl-C, and so would the processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    words = "run every N-th of the tests that are selected, such as a sample of -m ptx_full"
    parser.addoption("--every", type=int, default=1, metavar="N", help=words)


QUICK = {
    "contract": ("contract", "errors", "identities", "pinned_values", "parity", "masks"),
    "operators": ("table", "use_backend"),
    "cpu": ("box_kernels",),
    "gpu": ("plans", "box_gpu_backends"),
}
# Triton's interpreter takes a second a case
INTERPRETED_CASES = (
    "test_layouts[triton-interpreted-16-rows-both]",
    "test_layouts[triton-interpreted-16-columns-both]",
    "test_decode_boxes[triton-interpreted-rows-16-",
    "test_box_loss[triton-interpreted-rows-16-",
)


def _is_quick(item):
    """Whether `-m quick` runs a test: the contract, and every kernel family at 16 bins."""
    folder, module = item.path.parent.name, item.path.stem.removeprefix("test_")
    if module not in QUICK.get(folder, ()):
        return False
    case = item.nodeid.rpartition("::")[2]
    if "triton-interpreted" in case:
        return case.startswith(INTERPRETED_CASES)
    if module in ("parity", "box_kernels"):
        return "16" in re.split(r"[\[\]-]", case)
    return "gradcheck" not in case or "[cpu-rows" in case


def pytest_itemcollected(item):
    if _is_quick(item):
        item.add_marker("quick")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    every = config.getoption("every")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """What caught each fault of test_ptx_mutations."""
    passed = terminalreporter.stats.get("passed", ())
    told = [pair for report in passed for pair in report.user_properties]
    caught = [text for name, text in told if name == "caught"]
    if caught:
        terminalreporter.section("faults in GPU kernels, and what caught them")
        for text in caught:
            terminalreporter.write_line(text)


REFERENCE = pytest.param(("reference", "cpu"), id="reference")
KERNELS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("cpu", "cpu", "registered"), id="cpu-registered"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]


@contextlib.contextmanager
def _use(monkeypatch, name, device, way="eager"):
    if (name, device) == ("triton", "cpu") and not INTERPRETED:
        pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1 was not set")
    if name == "cpu" and not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    if name == "cuda" and (reasons := cuda.refusals()):
        pytest.skip(f"no CUDA kernels: {reasons[0]}")
    monkeypatch.setattr(modes, "FAST_PATH", way == "eager")
    with dflkern.use_backend(name):
        yield name, device


@pytest.fixture(params=[REFERENCE, *KERNELS])
def backend(request, monkeypatch):
    """Run a test on every backend; the value is (name, device)."""
    with _use(monkeypatch, *request.param) as used:
        yield used


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Run a test on every backend with kernels of its own, which promise the same bits."""
    with _use(monkeypatch, *request.param) as used:
        yield used


@pytest.fixture(params=KERNELS[2:])
def gpu_kernels(request, monkeypatch):
    """Run a test on the backends for GPUs."""
    with _use(monkeypatch, *request.param) as used:
        yield used


@pytest.fixture
def device(request):
    """The device of the test's backend."""
    for name in ("backend", "kernels", "gpu_kernels"):
        if name in request.fixturenames:
            return torch.device(request.getfixturevalue(name)[1])
    return torch.device("cpu")


@pytest.fixture(scope="session")
def workers(request):
    """Runs the cases of all collected tests, in processes beside this one, from the first on."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if "workers" in item.fixturenames and "case" in item.callspec.params
    ]
    workers = emulation.Workers(cases)
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill whatever torch.empty returns with NaN, so that an unwritten element cannot hide."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(previous)
