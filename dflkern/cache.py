"""The user's own cache folder, for what is compiled.

A library from a folder that others can write to would be their code in the user's process, so the
cache must be the user's own.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .compiler import BuildError


def folder(name: str) -> Path:
    """The folder `name` of the cache, made if need be, the user's own.

    Raises:
        BuildError: if there is no place that the user alone can write to.
    """
    if os.environ.get("DFLKERN_CACHE"):
        roots = [Path(os.environ["DFLKERN_CACHE"])]
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        roots = [home / "dflkern", Path(tempfile.gettempdir()) / f"dflkern-{os.getuid()}"]
    refusals = []
    for root in roots:
        try:
            _make_own(root)
            return _make_own(root / name)
        except (BuildError, OSError) as error:
            refusals.append(str(error))
    raise BuildError("; ".join(refusals) + "; name another folder in DFLKERN_CACHE")


def _make_own(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise BuildError(f"{path} cannot be written to")
    return path


def check_owner(path: Path) -> None:
    """Raise unless path is the user's own, no link, and closed to the writing of others."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
        raise BuildError(
            f"{path} belongs to user {found.st_uid}, not to {os.getuid()}, or is a link"
        )
    if found.st_mode & 0o022:
        raise BuildError(f"others can write to {path}; chmod go-w {path} cures that")
