"""`doctor.watch` where steps raise, calls are odd, threads run, or boxes are rotated."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

import dflkern
from dflkern import doctor

K = 16


def rows(count=30):
    return torch.randn(count, 4, K), 9 * torch.rand(count, 4)


def sides(watch):
    """How many sides the report has seen."""
    return sum(level.count for level in watch.report.levels)


def installed():
    """Everything global that a watch installs."""
    return (
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_hooks_always_called),
    )


@pytest.fixture(autouse=True)
def nothing_is_left_and_nothing_warned():
    before = installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert installed() == before


class Failing(nn.Module):
    """A DFL loss that raises where it is told to."""

    def __init__(self):
        super().__init__()
        self.inner = dflkern.DFLoss(reduction="mean")
        self.error = None

    def forward(self, logits, target, *, scale=1.0):
        loss = self.inner(logits, target) * scale
        if self.error is not None:
            raise self.error
        return loss


# --- Steps that raise ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape"), torch.OutOfMemoryError("memory"), KeyboardInterrupt(), SystemExit()],
    ids=lambda error: type(error).__name__,
)
def test_steps_after_one_that_raises_are_seen(error):
    loss = Failing()
    with doctor.watch(loss) as w:
        loss(*rows())
        loss.error = error
        with pytest.raises(type(error)):
            loss(*rows())
        loss.error = None
        before = sides(w)
        for _ in range(3):
            loss(*rows())
    assert sides(w) == before + 3 * 30 * 4


def test_the_step_that_raises_is_seen():
    """Targets that crash a loss are those that one wants to look at."""
    loss = Failing()
    loss.error = IndexError("target out of range")
    logits, targets = rows()
    with doctor.watch(loss) as w, pytest.raises(IndexError):
        loss(logits, targets + 20)
    assert "above-range" in {finding.code for finding in w.report}


@pytest.mark.parametrize(
    "call",
    [
        lambda loss: loss(),
        lambda loss: loss(torch.randn(30, 4, K)),
        lambda loss: loss(logits=torch.randn(30, 4, K)),
        lambda loss: loss(*rows(), unknown=1),
        lambda loss: loss(*rows(), 1, 2, 3),
        lambda loss: loss("logits", "target"),
        lambda loss: loss(None, None, scale=None),
        lambda loss: loss(torch.randn(30, 4, K), torch.rand(7)),
        lambda loss: loss(torch.randn(0), torch.rand(0)),
    ],
)
def test_a_call_with_wrong_arguments_raises_what_it_would_without(call):
    loss = Failing()

    def error():
        with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever it is)
            call(loss)
        return type(caught.value), str(caught.value)

    expected = error()
    with doctor.watch(loss) as w:
        assert error() == expected
        loss(target=rows(100)[1], logits=rows(100)[0], scale=2.0)
    assert sides(w) >= 100 * 4


def test_an_error_elsewhere_in_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = dflkern.DFLoss()
            self.broken = True

        def forward(self):
            if self.broken:
                raise ValueError("before the loss")
            return self.loss(*rows())

    model = Model()
    with doctor.watch(model) as w:
        with pytest.raises(ValueError, match="before the loss"):
            model()
        model.broken = False
        model()
    assert sides(w) == 30 * 4


def test_modules_without_a_readable_signature():
    class Builtin(nn.Module):
        forward = dict().get

    class Partial(nn.Module):
        forward = staticmethod(torch.sigmoid)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
        scripted = torch.jit.trace(nn.Linear(4, 4), torch.rand(1, 4))
    model = nn.ModuleList([Builtin(), Partial(), scripted, nn.LazyLinear(3)])
    with doctor.watch(nn.ModuleList([model, dflkern.DFLoss()])):
        model[0](1)
        model[1](torch.rand(1))
        model[2](torch.rand(1, 4)).sum().backward()
        model[3](torch.rand(1, 4)).sum().backward()
    with doctor.watch() as w:
        model[0](1)
        model[2](torch.rand(1, 4))
        dflkern.DFLoss()(*rows())
    assert sides(w) == 30 * 4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_call_in_another_mode_does_not_end_the_watch(mode):
    loss = dflkern.DFLoss()
    with doctor.watch(loss) as w:
        with mode():
            loss(*rows())
        loss(*rows())
    assert sides(w) == 2 * 30 * 4


def test_calls_without_values_are_not_seen():
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss = dflkern.DFLoss()
    with doctor.watch(loss) as w:
        with FakeTensorMode():
            loss(*rows())
        loss(*(value.to("meta") for value in rows()))
        loss(*rows())
    assert sides(w) == 30 * 4


# --- Beginning and ending -----------------------------------------------------------------------


def test_nothing_stays_if_it_cannot_begin():
    class Broken(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            yield from super().named_parameters(*args, **kwargs)
            raise OSError("no parameters")

    model = Broken(3, 3)
    w = doctor.watch(model)
    before = installed()
    with pytest.raises(OSError, match="no parameters"), w:
        pass
    assert installed() == before
    assert not model.weight._post_accumulate_grad_hooks
    Broken.named_parameters = nn.Linear.named_parameters
    with w:  # and it can begin once that is repaired
        model(torch.rand(1, 3)).sum().backward()
    assert "gradients" in w.report.examined


def test_one_watch_is_not_entered_twice():
    with doctor.watch() as w:
        with pytest.raises(RuntimeError, match="active already"), w:
            pass
        dflkern.DFLoss()(*rows())
    with w:  # but again
        dflkern.DFLoss()(*rows())
    assert sides(w) == 2 * 30 * 4


def test_watches_nest_and_end_in_any_order():
    loss = dflkern.DFLoss()
    first, second = doctor.watch(loss), doctor.watch()
    first.__enter__()
    second.__enter__()
    loss(*rows())
    first.__exit__(None, None, None)
    loss(*rows())
    second.__exit__(None, None, None)
    loss(*rows())
    assert (sides(first), sides(second)) == (120, 240)


def test_concurrent_watches_see_their_own_thread():
    counts, failed, barrier = {}, [], threading.Barrier(4)

    def work(number):
        try:
            loss = Failing()
            with doctor.watch() as w:
                barrier.wait()
                for step in range(20):
                    loss.error = ValueError() if step % 5 == 4 else None
                    try:
                        loss(*rows(number + 1))
                    except ValueError:
                        continue
                barrier.wait()
            counts[number] = sides(w)
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert counts == {number: 20 * (number + 1) * 4 for number in range(4)}


def test_a_shared_loss_in_another_thread_does_not_disturb():
    loss, other = Failing(), []

    def elsewhere():
        loss.inner(*rows())
        other.append(loss(*rows()))

    with doctor.watch(loss) as w:
        for _ in range(3):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            loss(*rows())
    assert len(other) == 3
    assert sides(w) == 3 * 30 * 4
