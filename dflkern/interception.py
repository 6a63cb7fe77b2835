"""Functions of other packages' classes, intercepted by several callers and released in any order.

Replacing a function by assignment fails as soon as two parties do it: whoever restores first
removes the other's function, and whoever restores last brings a stale one back. Here a class gets
one stand-in per function, which calls the interceptions that exist at the time of the call:

    def function(call, *args, **kwargs):  # call: the next interception, or the original
        return call(*args, **kwargs)

    interception = intercept(Loss, "forward", function)
    interception.remove()

Without interceptions the stand-in calls the original, so a removed interception has no effect even
where another library kept the stand-in and assigned it again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

_lock = threading.RLock()


class Interception:
    """One caller's function around a function of a class, until `remove()`."""

    def __init__(self, site: _Site, function: Function) -> None:
        self._site, self._function = site, function

    def remove(self) -> None:
        """Release the function. A second call does nothing."""
        with _lock:
            self._site.change([each for each in self._site.layers if each is not self])

    def around(self, call: Function) -> Function:
        """The function, with what it calls as its first argument."""
        return functools.partial(self._function, call)


class _Site:
    """A function of a class, its stand-in, and the interceptions, outermost first."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name
        self.inherited = name not in vars(owner)
        self.original: Function = _inherited(owner, name) if self.inherited else vars(owner)[name]
        self.layers: list[Interception] = []
        self.call = self.original

        @functools.wraps(self.original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if not self.layers:
                self.restore()  # another library assigned the stand-in again
            return self.call(*args, **kwargs)

        stand_in._dflkern_site = self  # type: ignore[attr-defined]
        self.stand_in = stand_in

    def change(self, layers: list[Interception]) -> None:
        """Set the interceptions; without any, give the class its own function back."""
        call = self.original
        for each in reversed(layers):
            call = each.around(call)
        self.call, self.layers = call, layers  # whole at any time: other threads call it
        if not layers:
            self.restore()

    def restore(self) -> None:
        """Remove the stand-in, unless something else stands there now or it is in use again."""
        with _lock:
            if self.layers or vars(self.owner).get(self.name) is not self.stand_in:
                return
            if self.inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.original)


def intercept(
    owner: type, name: str, function: Function, *, innermost: bool = False
) -> Interception:
    """Have calls of a class's function go through another function.

    Args:
        owner: the class; a function that it inherits is intercepted for it and its subclasses.
        name: the function's name.
        function: called with the next function, then with the arguments of the call.
        innermost: next to the original, inside all interceptions there are: for a function that
            replaces the original and does not call it. Others see the call first.

    Returns:
        The interception, which lasts until its `remove()`.
    """
    with _lock:
        site = _site(owner, name)
        if site is None:
            site = _Site(owner, name)
            setattr(owner, name, site.stand_in)
        added = Interception(site, function)
        site.change([*site.layers, added] if innermost else [added, *site.layers])
        return added


def original(owner: type, name: str) -> Any:
    """What the class itself has under this name, without the interceptions; None if nothing."""
    site = _site(owner, name)
    return site.original if site else vars(owner).get(name)


def is_intercepted(owner: type, name: str) -> bool:
    """Whether calls reach the interceptions first: nothing else has been assigned since."""
    return _site(owner, name) is not None


def _site(owner: type, name: str) -> _Site | None:
    found = vars(owner).get(name)
    site: _Site | None = getattr(found, "_dflkern_site", None)
    return site if site is not None and site.stand_in is found else None  # functools.wraps copies


def _inherited(owner: type, name: str) -> Function:
    @functools.wraps(getattr(owner, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, self), name)(*args, **kwargs)

    return call
