"""The errors of this package, and its messages on stderr."""

from __future__ import annotations

import contextlib
import sys


class BuildError(RuntimeError):
    """Why a compiled file is not there, and what to do."""


class TransientError(BuildError):
    """A failure that the next attempt may not meet: a killed compiler, a timeout, a full disk."""


class FolderError(TransientError):
    """A folder cannot hold compiled files: not the user's own, not writable, full, or noexec."""


def announce(text: str) -> None:
    """Print one line on stderr. A closed or missing stderr is no error."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"dflkern: {text}", file=sys.stderr, flush=True)
