"""One builder at a time, where the file system can lock files.

Plain flock rather than the package filelock: on file systems without flock, that one uses marker
files, which a killed process leaves behind. Here such a file system means no lock, which costs a
second build and nothing else, since files are put in place in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .reporting import announce

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 2.0  # seconds of silent waiting
_CONTENDED = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_held: set[int] = set()


@contextlib.contextmanager
def exclusive(path: Path, wait: float, purpose: str) -> Iterator[bool]:
    """Hold a lock inside the block; the value is whether it is held.

    Args:
        path: the lock's file, created if need be.
        wait: seconds to wait for another holder, after which the block runs without the lock.
        purpose: what the other holder builds, for the message that says what is waited for.
    """
    descriptor = _open(path)
    held = False
    try:
        if descriptor is not None:
            _held.add(descriptor)
            held = _acquire(descriptor, path, wait, purpose)
        yield held
    finally:
        if descriptor is not None:
            if held:  # a copy of the descriptor may live on in a child
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            _held.discard(descriptor)
            os.close(descriptor)


def _open(path: Path) -> int | None:
    if fcntl is None:
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except OSError:  # a folder or a link of that name
        return None


def _acquire(descriptor: int, path: Path, wait: float, purpose: str) -> bool:
    began, silent = time.monotonic(), True
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _CONTENDED:  # ENOSYS, ENOLCK: no locks on this file system
                return False
        waited = time.monotonic() - began
        if waited > wait:
            announce(f"the lock {path} was not released in {wait:.0f} s; going on without it")
            return False
        if silent and waited > PATIENCE:
            silent = False
            announce(f"waiting for another process that builds its {purpose} (lock {path})")
        time.sleep(0.05)


def _close_in_child() -> None:
    """A forked child must not keep its parent's lock: flock ends when the last copy is closed."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
