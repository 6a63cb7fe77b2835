"""`use_backend` as a function, a context manager and a decorator."""

import pytest
import torch

import dflkern
from dflkern.operators.requests import requested


@pytest.fixture(autouse=True)
def restored():
    with dflkern.use_backend("auto"):
        yield


def test_it_holds_from_the_call_on_or_inside_a_block():
    assert requested() == "auto"
    with dflkern.use_backend("reference"):
        assert requested() == "reference"
        dflkern.use_backend("auto")
        assert requested() == "auto"
    assert requested() == "auto"
    with pytest.raises(ValueError, match="'gpu' is not known"):
        dflkern.use_backend("gpu")


def test_a_decorated_function_runs_on_its_backend_and_no_other_does():
    @dflkern.use_backend("reference")
    def inner():
        """Words."""
        return requested()

    assert requested() == "auto"
    assert [inner(), inner()] == ["reference", "reference"]
    assert inner.__doc__ == "Words."
    with dflkern.use_backend("cpu"):
        assert inner() == "reference"
        assert requested() == "cpu"
    assert requested() == "auto"


def test_a_decorated_function_that_raises_or_recurses_restores_the_backend():
    @dflkern.use_backend("reference")
    def fall(depth):
        assert requested() == "reference"
        if not depth:
            raise KeyError
        fall(depth - 1)

    with pytest.raises(KeyError):
        fall(3)
    assert requested() == "auto"


def test_an_object_can_be_entered_again():
    choice = dflkern.use_backend("reference")
    for _ in range(2):
        with choice:
            assert requested() == "reference"
            with dflkern.use_backend("cpu"), choice, choice:
                assert requested() == "reference"
            assert requested() == "reference"
        assert requested() == "auto"


def test_blocks_in_threads_do_not_meet():
    import threading

    choice, barrier, seen = dflkern.use_backend("reference"), threading.Barrier(2), []

    def work():
        with choice:
            barrier.wait()
            seen.append(requested())
        seen.append(requested())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count("reference") == 2
    assert len(seen) == 4


def test_a_decorated_loss_trains(monkeypatch):
    @dflkern.use_backend("reference")
    def loss(logits):
        return dflkern.dfl_loss(logits, torch.ones(5), reduction="mean")

    logits = torch.randn(5, 16, requires_grad=True)
    loss(logits).backward()
    expected = torch.autograd.grad(
        dflkern.dfl_loss(logits, torch.ones(5), reduction="mean"), logits
    )[0]
    torch.testing.assert_close(logits.grad, expected)


def test_functions_that_run_later_are_refused():
    async def coroutine():
        pass

    def generator():
        yield

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match=r'with use_backend\("reference"\):'):
            dflkern.use_backend("reference")(function)
        assert requested() == "auto"
