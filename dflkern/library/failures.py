"""Failed builds, remembered for a day beside the place of the file.

A failure belongs to the compilers that met it: with others the build is tried again.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from . import files

LIFETIME = 24 * 3600.0  # seconds


def remember(path: Path, reason: str, toolchain: str) -> None:
    """Write a failure down; where that is not possible, it is not remembered."""
    with contextlib.suppress(OSError):
        files.write_json(path, {"reason": reason, "toolchain": toolchain, "time": time.time()})


def recall(path: Path, toolchain: str) -> str | None:
    """Why a build with these compilers failed less than a day ago; None if it did not."""
    match files.read_json(path):
        case {"reason": str(reason), "toolchain": str(known), "time": int() | float() as when}:
            recent = 0 <= time.time() - when < LIFETIME
            return reason if recent and known == toolchain else None
    return None
