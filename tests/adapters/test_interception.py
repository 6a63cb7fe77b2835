"""Functions of classes that several parties replace or observe, and release in any order."""

import copy
import functools
import inspect
import itertools
import pickle
import threading

import pytest

from dflkern.interception import intercept, is_intercepted, original


class Base:
    def double(self, x):
        """Twice x."""
        return 2 * x


class Child(Base):
    pass


OWN = vars(Base)["double"]


@pytest.fixture(autouse=True)
def restored():
    """No test may leave anything behind."""
    yield
    assert vars(Base)["double"] is OWN
    assert "double" not in vars(Child)


def adding(n):
    return lambda call, self, x: call(self, x) + n


def wrap():
    """As another library does: put a wrapper in the place of whatever is there."""
    inner = Base.double

    @functools.wraps(inner)
    def wrapper(self, x):
        return 1000 + inner(self, x)

    Base.double = wrapper
    return lambda: setattr(Base, "double", inner)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_removed_in_any_order(order):
    parts = [1, 10, 100]
    handles = [intercept(Base, "double", adding(n)) for n in parts]
    assert Base().double(2) == 115
    for index in order:
        handles[index].remove()
        handles[index].remove()  # a second time does nothing
        parts[index] = 0
        assert Base().double(2) == 4 + sum(parts)
    assert vars(Base)["double"] is OWN


def test_the_innermost_is_seen_by_all_others():
    seen = []
    observer = intercept(Base, "double", lambda call, self, x: seen.append(x) or call(self, x))
    replaced = intercept(Base, "double", lambda call, self, x: 7, innermost=True)
    assert (Base().double(2), seen) == (7, [2])
    observer.remove()
    assert (Base().double(2), seen) == (7, [2])
    replaced.remove()


def test_the_stand_in_looks_like_the_original():
    handle = intercept(Base, "double", adding(1))
    assert inspect.signature(Base.double) == inspect.signature(OWN)
    assert (Base.double.__doc__, Base.double.__qualname__) == (OWN.__doc__, OWN.__qualname__)
    assert original(Base, "double") is OWN
    assert is_intercepted(Base, "double")
    assert pickle.loads(pickle.dumps(Base())).double(1) == copy.deepcopy(Base()).double(1) == 3
    handle.remove()
    assert original(Base, "double") is OWN
    assert not is_intercepted(Base, "double")


def test_an_inherited_function_is_intercepted_for_the_subclass_alone():
    child = intercept(Child, "double", adding(1))
    base = intercept(Base, "double", adding(10))
    assert (Base().double(2), Child().double(2)) == (14, 15)
    child.remove()
    assert Child().double(2) == 14
    base.remove()


def test_another_library_wraps_and_unwraps_in_any_order():
    for removed_first in (True, False):
        handle = intercept(Base, "double", adding(1))
        unwrap = wrap()
        assert Base().double(2) == 1005
        assert not is_intercepted(Base, "double")
        if removed_first:
            handle.remove()
            assert Base().double(2) == 1004  # the wrapper stays, around the original
            unwrap()
            assert Base().double(2) == 4
            assert vars(Base)["double"] is OWN  # the call put it back
        else:
            unwrap()
            assert Base().double(2) == 5
            handle.remove()
            assert vars(Base)["double"] is OWN


def test_a_library_that_wrapped_before_unwraps_meanwhile():
    unwrap = wrap()
    handle = intercept(Base, "double", adding(1))
    assert Base().double(2) == 1005
    unwrap()  # and takes the interception along
    assert Base().double(2) == 4
    handle.remove()


def test_intercepted_again_while_the_wrapper_is_still_there():
    first = intercept(Base, "double", adding(1))
    unwrap = wrap()
    first.remove()
    second = intercept(Base, "double", adding(10))
    assert Base().double(2) == 1014
    second.remove()
    unwrap()
    third = intercept(Base, "double", adding(100))  # around the stand-in that came back
    assert Base().double(2) == 104
    assert original(Base, "double") is OWN
    third.remove()
    assert vars(Base)["double"] is OWN


def test_many_threads():
    barrier, failures = threading.Barrier(6), []

    def work():
        barrier.wait()
        for _ in range(200):
            handle = intercept(Base, "double", adding(0))
            if Base().double(2) != 4:
                failures.append(1)
            handle.remove()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert Base().double(2) == 4
