"""Where compiled files may be kept, and whether a folder can be trusted.

Whoever can replace a library in the cache runs code in the user's process. So a folder and the
files in it must belong to the user or to root, and nobody else may be able to write to them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .reporting import FolderError


def roots() -> Iterator[Path]:
    """The cache folders in the order of preference, whether they exist or not.

    $DFLKERN_CACHE, else dflkern in $XDG_CACHE_HOME or ~/.cache; then a folder for this user in the
    system's folder for temporary files.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or no current one
        named = os.environ.get("DFLKERN_CACHE")
        if named:
            yield Path(named).expanduser().absolute()
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
            yield (cache if cache.is_absolute() else Path.home() / ".cache") / "dflkern"
    with contextlib.suppress(OSError):  # there is no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"dflkern-{_user()}"


def check(path: Path) -> os.stat_result:
    """The status of a file or folder that only the user and root can change.

    A symbolic link is followed if the link, too, belongs to the user or root.

    Raises:
        FolderError: if somebody else could have put it there or could replace what is in it.
        OSError: if it does not exist or cannot be read.
    """
    found = path.stat()
    if os.name != "posix":
        return found
    for status, what in ((path.lstat(), "belongs"), (found, "leads to what belongs")):
        if status.st_uid not in (_user(), 0):
            raise FolderError(f"{path} {what} to user {status.st_uid}, not to {_user()}")
    # In a folder with the sticky bit, others cannot replace what is not theirs.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise FolderError(f"others can write to {path} (chmod go-w {path} mends that)")
    return found


def trusted(root: Path, name: str, *, executable: bool) -> Path:
    """The existing folder `name` of a cache folder, both checked; creates nothing.

    Raises:
        FolderError: if one of the two cannot be trusted, or no code can be loaded from there.
        OSError: if one of the two does not exist or cannot be read.
    """
    check(root)
    folder = root / name
    check(folder)
    if executable and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise FolderError(f"{folder} is on a file system mounted noexec")
    return folder


def prepare(root: Path, name: str, *, executable: bool) -> Path:
    """The folder `name` of a cache folder, made if need be, ready to be written to.

    Args:
        root: one of `roots()`.
        name: of a folder directly in it.
        executable: whether the files must be loadable as code, which noexec mounts prevent.

    Raises:
        FolderError: if that is not possible, with the reason.
    """
    folder = root / name
    try:
        _make(root)
        check(root)
        _make(folder)
        trusted(root, name, executable=executable)
        effective = os.access in os.supports_effective_ids
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
            raise FolderError(f"{folder} cannot be written to")
    except (OSError, ValueError) as error:
        raise FolderError(f"{folder} cannot be used: {error}") from error
    return folder


def _make(folder: Path) -> None:
    """Create a folder and its parents with mode 0700, whatever the umask."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        folder.chmod(0o700)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0
