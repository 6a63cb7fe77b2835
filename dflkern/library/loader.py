"""What one process knows of a compiled file: nothing yet, that it is loaded, or why it is not."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from . import store
from .files import Found
from .reporting import BuildError
from .store import LoadError, Recipe


class Loader:
    """Loads a compiled file at most once per process: finds it, else builds it.

    Whatever goes wrong becomes one warning, and then a reason. Only KeyboardInterrupt and its like
    pass through, and leave the process able to try again.

    Attributes:
        loaded: whether the file is loaded; None before the first `load`.

    Args:
        recipe: the file, and how it is made.
        use: loads the file at a path into the process, or raises.
        otherwise: two sentences for the warning: what happens without the file, and the way out.
    """

    def __init__(self, recipe: Recipe, use: Callable[[Path], object], *, otherwise: str) -> None:
        self.loaded: bool | None = None
        self._recipe, self._use = recipe, use
        self._otherwise = otherwise
        self._found: Found | None = None
        self._reason = ""
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def load(self) -> bool:
        """Whether the file is there and loaded. The first call decides, and builds if need be."""
        if self.loaded is not None:
            return self.loaded
        warning = None
        with self._lock:
            if self.loaded is None:
                try:
                    self._found = self._obtain()
                    self.loaded = True
                except Exception as error:
                    self._reason = str(error) or type(error).__name__
                    self.loaded = False
                    warning = f"dflkern: no {self._recipe.purpose}: {self._reason}. "
        if warning:
            warnings.warn(warning + self._otherwise, RuntimeWarning, stacklevel=3)
        return self.loaded

    def refusal(self) -> str | None:
        """Why the file cannot be loaded, as far as is known without building or loading it."""
        if self.loaded is not None:
            return None if self.loaded else self._reason
        try:
            if self.find() is not None:
                return None
            return store.remembered(self._recipe)
        except Exception as error:
            return str(error)

    def describe(self) -> str:
        """One line on the file's state, without building or loading it."""
        if self.loaded and self._found is not None:
            return f"loaded from {self._found.path}"
        reason = self.refusal()
        if reason is not None:
            return reason
        found = self.find()
        if found is not None:
            return f"built, at {found.path}"
        return f"to be built at the first call, with {self._recipe.compiler()}"

    def find(self) -> Found | None:
        """The file that is loaded, else the first one that `load` would take; loads nothing.

        Raises:
            BuildError: if the file's key cannot be told.
        """
        return self._found or next(store.find(self._recipe, []), None)

    def build(self) -> Path:
        """Build the file now, into the user's cache, whatever is there or was remembered.

        Raises:
            BuildError: with the compiler's message, or with what is wrong with every folder.
        """
        found = store.build(self._recipe, lambda found: None, wanted=lambda found: False)
        with self._lock:
            if not self.loaded:
                self.loaded = None
        return found.path

    def _obtain(self) -> Found:
        recipe = self._recipe
        unloadable: dict[str, str] = {}  # verified files that do not load: digests and reasons
        for found in store.find(recipe, []):
            try:
                self._load(found)
                return found
            except LoadError as error:
                unloadable[found.facts["sha256"]] = str(error)
        try:
            reason = store.remembered(recipe)
            if reason is not None:
                raise BuildError(reason)
            return self._build(lambda found: found.facts["sha256"] not in unloadable)
        except BuildError as error:
            raise BuildError("; ".join([*unloadable.values(), str(error)])) from error

    def _build(self, wanted: Callable[[Found], bool]) -> Found:
        try:
            return store.build(self._recipe, self._load, wanted=wanted)
        except BuildError as error:
            store.remember(self._recipe, error)
            raise

    def _load(self, found: Found) -> None:
        try:
            self._use(found.path)
        except Exception as error:
            raise LoadError(f"{found.path} does not load: {error}") from error

    def _renew_lock(self) -> None:
        """In a forked child, the thread that held the lock does not exist."""
        self._lock = threading.Lock()
