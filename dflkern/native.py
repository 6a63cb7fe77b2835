"""The CPU library: found prebuilt or in the user's cache, else built once; a failure is remembered.

Processes that need a build at the same time wait for the first one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from filelock import FileLock

from . import cache, compiler
from .compiler import BuildError

LIBRARY = "dflkern_cpu.so"
FAILURE = "failure.json"
PREBUILT = Path(__file__).parent / "lib"
WAY_OUT = "`python -m dflkern build` tries again and shows the compiler's words"


class _State:
    """What this process knows: nothing yet, a loaded library, or why there is none."""

    lock = threading.Lock()
    path: Path | None = None
    reason: str | None = None


def load() -> bool:
    """Load the CPU library, building it if need be; whether it is there.

    The first call decides; later calls return what it found. A failure is warned of once.
    """
    with _State.lock:
        if _State.path is None and _State.reason is None:
            try:
                path = _find_or_build()
                torch.ops.load_library(path)
                _State.path = path
            except (BuildError, OSError) as error:
                _State.reason = str(error)
                warnings.warn(
                    f"dflkern: no CPU kernels: {error}. Calls on CPU tensors run on the reference, "
                    f"in plain PyTorch; {WAY_OUT}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _State.path is not None


def refusals() -> list[str]:
    """Why there is no CPU library, as far as is known without building one."""
    if os.name != "posix":
        return ["its C++ library is built on Linux and macOS only"]
    return [] if _State.reason is None else [_State.reason]


def describe() -> str:
    """One line on the library's state, without building or loading anything."""
    if _State.path is not None:
        return f"loaded from {_State.path}"
    if _State.reason is not None:
        return _State.reason
    try:
        found = _prebuilt() or _cached(_folder())
        if found is not None:
            return f"built, at {found}"
        return f"to be built at the first call, with {compiler.find_compiler()}"
    except BuildError as error:
        return str(error)


def build(out: Path | None = None) -> Path:
    """Build the library now, whatever was remembered.

    Args:
        out: a folder for a library that runs on other machines of this kind, with a manifest; None
            builds for this machine into the user's cache.

    Returns:
        The library's path.

    Raises:
        BuildError: with the compiler's last words.
    """
    chosen = compiler.find_compiler()
    if out is None:
        folder = _folder()
        with FileLock(folder / "lock"):
            compiler.build(folder / LIBRARY, compiler=chosen)
            (folder / FAILURE).unlink(missing_ok=True)
        return folder / LIBRARY
    out.mkdir(parents=True, exist_ok=True)
    compiler.build(out / LIBRARY, compiler=chosen, portable=True)
    manifest = {
        "abi": compiler.ABI_TARGET,
        "compiler": compiler.compiler_version(chosen).partition("\n")[0],
        "flags": [*compiler.FLAGS, *compiler.target_flags(portable=True)],
        "features": list(compiler.PORTABLE.get(os.uname().machine, ())),
        "machine": os.uname().machine,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return out / LIBRARY


def _find_or_build() -> Path:
    prebuilt = _prebuilt()
    if prebuilt is not None:
        return prebuilt
    folder = _folder()
    with FileLock(folder / "lock"):  # whoever waited here finds what the first one made
        cached = _cached(folder)
        if cached is not None:
            return cached
        print("dflkern: building its CPU kernels, once (about 20 s)", file=sys.stderr, flush=True)
        try:
            compiler.build(folder / LIBRARY, compiler=compiler.find_compiler())
        except BuildError as error:
            failure = {"reason": str(error), "time": time.time()}
            (folder / FAILURE).write_text(json.dumps(failure))
            raise
        return folder / LIBRARY


def _prebuilt() -> Path | None:
    """The library inside the package, if it was built for a machine like this one."""
    library, manifest = PREBUILT / LIBRARY, PREBUILT / "manifest.json"
    if not (library.exists() and manifest.exists()):
        return None
    needs = json.loads(manifest.read_text())
    fits = needs["machine"] == os.uname().machine
    return library if fits and set(needs["features"]) <= set(compiler.cpu_features()) else None


def _cached(folder: Path) -> Path | None:
    """The library built earlier; a failure remembered from earlier is raised again."""
    library, failure = folder / LIBRARY, folder / FAILURE
    if library.exists():
        cache.check_owner(library)
        return library
    if failure.exists():
        reason = json.loads(failure.read_text())["reason"]
        raise BuildError(f"{reason} (remembered from an earlier attempt; {WAY_OUT})")
    return None


def _folder() -> Path:
    """The folder of this machine's build, made if need be."""
    return cache.folder(compiler.key(compiler.find_compiler()))
