"""The life of patch(): handles, threads, other libraries, and the doctor's watch."""

import functools
import itertools
import threading
import warnings

import pytest
import torch

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

from ultralytics.nn.modules import block
from ultralytics.utils import loss

from criteria import (
    BINS,
    FUNCTIONS,
    ORIGINAL,
    box_losses,
    criterion,
    inputs,
    installed,
)  # fmt: skip
from dflkern import doctor
from dflkern.adapters import ultralytics as adapter
from dflkern.adapters.ultralytics import patch


@pytest.fixture(autouse=True)
def undone():
    """No test may leave anything behind."""
    yield
    assert installed() == ORIGINAL


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that dflkern's functions serve."""
    counted = []

    def counting(name, function):
        def call(*args, **kwargs):
            counted.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("dfl_loss", "box_loss", "dfl_decode"):
        monkeypatch.setattr(adapter.dflkern, name, counting(name, getattr(adapter.dflkern, name)))
    return counted


def decode():
    return block.DFL(BINS)(torch.zeros(1, 4 * BINS, 2))


def losses(made, given):
    boxes = made.bbox_decode(given.points, given.logits)
    return box_losses(made.bbox_loss, given.logits, boxes, given)


def test_a_handle():
    handle = patch()
    assert handle.active
    assert handle.replaced == tuple(f"{owner.__name__}.{name}" for owner, name in FUNCTIONS)
    assert not set(installed()) & set(ORIGINAL)
    assert "replaced: DFLoss.__call__" in repr(handle)
    handle.undo()
    assert all(a is b for a, b in zip(installed(), ORIGINAL, strict=True))
    handle.undo()
    assert not handle.active
    assert "undone" in repr(handle)
    assert handle.replaced


def test_an_inner_patch_leaves_the_outer_one():
    with patch() as outer:
        with patch() as inner:
            assert inner.active
        assert outer.active
        assert not inner.active
        assert not set(installed()) & set(ORIGINAL)
        inner.undo()
        assert not set(installed()) & set(ORIGINAL)
    assert installed() == ORIGINAL


def test_an_exception_ends_the_block():
    with pytest.raises(ValueError, match="mine"), patch():
        raise ValueError("mine")
    assert installed() == ORIGINAL


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_handles_are_undone_in_any_order(order, calls):
    handles = [patch() for _ in range(3)]
    for index in order:
        calls.clear()
        decode()
        assert calls == ["dfl_decode"]
        handles[index].undo()
        assert [handle.active for handle in handles].count(True) == 2 - order.index(index)
    calls.clear()
    decode()
    assert not calls


def test_a_second_patch_checks_nothing_again(monkeypatch):
    with patch():
        monkeypatch.setattr(adapter, "check_same", None)
        with patch():
            pass


def test_concurrent_patches_are_one():
    barrier, handles, checks = threading.Barrier(6), [], []
    check = adapter.check_same

    def counted(*args):
        checks.append(1)
        check(*args)

    def work():
        barrier.wait()
        handles.append(patch())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(adapter, "check_same", counted)
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(checks) == 1
    assert len(handles) == len(set(map(id, handles))) == 6
    stand_ins = installed()
    for handle in handles:
        assert handle.active
        assert installed() == stand_ins
        handle.undo()
    assert installed() == ORIGINAL


def test_patched_and_undone_in_many_threads_at_once():
    """Whatever the threads' order: served as long as one handle is active, restored at the end."""
    barrier, failures = threading.Barrier(4), []

    def work():
        barrier.wait()
        for _ in range(5):
            with patch() as handle:
                if not handle.active or set(installed()) & set(ORIGINAL):
                    failures.append(installed())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_library_that_wraps_after_patch_and_unwraps_after_undo(calls):
    handle = patch()
    stand_in = block.DFL.forward

    @functools.wraps(stand_in)
    def wrapper(self, x):
        return stand_in(self, x) + 1

    block.DFL.forward = wrapper
    assert decode()[0, 0, 0] == 8.5
    handle.undo()
    calls.clear()
    assert decode()[0, 0, 0] == 8.5  # the wrapper stays, around Ultralytics' own
    block.DFL.forward = stand_in  # as the library remembers it
    assert decode()[0, 0, 0] == 7.5
    assert not calls
    assert installed() == ORIGINAL


def test_patched_again_where_a_library_put_a_former_stand_in_back(calls):
    handle = patch()
    stand_in = block.DFL.forward
    handle.undo()
    block.DFL.forward = stand_in
    with patch():
        calls.clear()  # of the self-check
        decode()
    assert calls == ["dfl_decode"]
    assert installed() == ORIGINAL


def test_a_wrapper_from_before_is_not_bypassed(monkeypatch):
    @functools.wraps(block.DFL.forward)
    def wrapper(self, x):
        return ORIGINAL[4](self, x)

    with monkeypatch.context() as context:
        context.setattr(block.DFL, "forward", wrapper)
        with pytest.raises(RuntimeError, match=r"(?s)in the place of DFL.forward.*Call patch\(\)"):
            patch()
        assert block.DFL.forward is wrapper


# --- With watch -----------------------------------------------------------------------------------


def call_dfl_loss(module):
    return module(torch.randn(200, BINS), torch.rand(50, 4) * 9)


def calls_seen(watch):
    """From the targets' number."""
    return watch.report.levels[0].count / 200


def test_undo_inside_watch(calls):
    module = loss.DFLoss(BINS)
    handle = patch()
    calls.clear()  # of the self-check
    with doctor.watch(module) as w:
        call_dfl_loss(module)
        handle.undo()
        call_dfl_loss(module)
    assert calls == ["dfl_loss"]
    assert calls_seen(w) == 2
    assert installed() == ORIGINAL
    call_dfl_loss(module)
    assert calls == ["dfl_loss"]


def test_patch_inside_watch(calls):
    module = loss.DFLoss(BINS)
    with doctor.watch(module) as w:
        handle = patch()
        calls.clear()  # of the self-check
        call_dfl_loss(module)
    call_dfl_loss(module)
    assert calls == ["dfl_loss"] * 2
    assert calls_seen(w) == 1
    handle.undo()


def test_watch_around_and_inside_each_other(calls):
    module = loss.DFLoss(BINS)
    first, handle = doctor.watch(module), patch()
    second = doctor.watch(module)
    calls.clear()  # of the self-check
    with first:
        call_dfl_loss(module)
        second.__enter__()
        call_dfl_loss(module)
        handle.undo()
    call_dfl_loss(module)
    second.__exit__(None, None, None)
    assert (calls_seen(first), calls_seen(second)) == (2, 2)
    assert calls.count("dfl_loss") == 2


def test_a_watched_criterion_is_still_served(calls):
    made, given = criterion(), inputs()
    with patch(), doctor.watch(made) as w, warnings.catch_warnings():
        warnings.simplefilter("error")
        calls.clear()
        losses(made, given)
    assert calls == ["box_loss"]
    assert w.report.examined


def test_the_decode_is_served_again_after_watch(calls):
    with patch():
        with doctor.watch(), pytest.warns(UserWarning, match="a hook is registered"):
            decode()
        calls.clear()
        decode()
    assert calls == ["dfl_decode"]
