"""Files with a manifest beside them: written in one step, and verified before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from . import folders
from .reporting import BuildError

MANIFEST_LIMIT = 1 << 20  # bytes

Facts = dict[str, Any]


class Found(NamedTuple):
    """A verified file, and what its manifest says of it."""

    path: Path
    facts: Facts


class DamagedError(BuildError):
    """A file is not what was written, or its manifest is missing."""


def manifest_of(path: Path) -> Path:
    """Where the manifest of a file lies."""
    return path.with_name(f"{path.name}.json")


def verify(path: Path, *, check_owner: bool) -> Found | None:
    """A file whose size and SHA-256 are those of its manifest; None if there is no such file.

    Args:
        path: the file.
        check_owner: whether it must belong to the user or to root and be closed to others' writing.

    Raises:
        DamagedError: if size, content or manifest are wrong.
        FolderError: if the file's owner or mode are wrong.
        OSError: if it cannot be read.
    """
    if not os.path.lexists(path):
        return None
    if check_owner:
        folders.check(path)
    facts = read_json(manifest_of(path))
    if not isinstance(facts, dict) or not {"size", "sha256"} <= facts.keys():
        raise DamagedError(f"{path} has no valid manifest")
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != facts["size"]:
            raise DamagedError(f"{path} is damaged: {size} bytes, and it was written with "
                               f"{facts['size']}")  # fmt: skip
        if _digest(file) != facts["sha256"]:
            raise DamagedError(f"{path} is damaged: its content is not what was written")
    return Found(path, facts)


def install(made: Path, target: Path, facts: Facts) -> Found:
    """Move a new file to its place, with a manifest, so that readers see the old or the new one.

    A reader that meets the new file with the old manifest takes it for damaged, waits for the lock
    and looks again.

    Args:
        made: the file, in a folder of its own on the same file system as target.
        target: its place.
        facts: what the manifest says beside size and SHA-256.

    Raises:
        OSError: such as a full disk; target is then as before.
    """
    made.chmod(0o644)
    with made.open("rb+") as file:
        size = os.fstat(file.fileno()).st_size
        facts = {**facts, "size": size, "sha256": _digest(file)}
        os.fsync(file.fileno())
    manifest = manifest_of(made)
    _write(manifest, facts)
    for source, place in ((made, target), (manifest, manifest_of(target))):
        if place.is_dir() and not place.is_symlink():
            place.rename(source.with_name(f"{source.name}.obstacle"))
        source.replace(place)
    _sync_folder(target.parent)
    return Found(target, facts)


def read_json(path: Path) -> Any:
    """What a small JSON file holds; None if it is missing, unreadable or not JSON."""
    try:
        with _open(path) as file:
            return json.loads(file.read(MANIFEST_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, value: Facts) -> None:
    """Write a small JSON file in one step.

    Raises:
        OSError: such as a full disk; path is then as before.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        _write(draft, value)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, value: Facts) -> None:
    with path.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _open(path: Path) -> Any:
    """Open a regular file for reading. O_NONBLOCK: opening a named pipe must not wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
