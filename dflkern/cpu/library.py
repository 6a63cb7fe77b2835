"""The CPU library: found in the package or the user's cache, else built at the first call."""

from __future__ import annotations

import functools
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

from ..library import BuildError, Loader, Recipe, store
from . import compiler

LIBRARY = "dflkern_cpu.so"
PREBUILT = Path(__file__).parent.parent / "lib"
WAY_OUT = "`python -m dflkern build` tries again and shows the compiler's message"


def load_once(path: Path) -> None:
    """Load an operator library, unless one of its name is loaded.

    A process can register an operator once. PyTorch keeps the names of what is loaded, also for a
    dflkern that is imported a second time.
    """
    if path.name not in {Path(loaded).name for loaded in torch.ops.loaded_libraries}:
        torch.ops.load_library(path)


def _fits(facts: dict[str, Any]) -> bool:
    """Whether a prebuilt library runs on this machine."""
    known = set(compiler.cpu_features())
    return facts["machine"] == platform.machine() and set(facts["features"]) <= known


def _compiler() -> str:
    if os.name != "posix":
        raise BuildError("its C++ library is built on Linux and macOS only")
    return shlex.join(compiler.compilers()[0])


RECIPE = Recipe(
    file=LIBRARY,
    purpose="CPU kernels",
    duration="about 20 s",
    key=compiler.key,
    build=compiler.build,
    compiler=_compiler,
    toolchain=compiler.toolchain,
    prebuilt=PREBUILT,
    fits=_fits,
    timeout=compiler.COMPILE_TIMEOUT + compiler.LINK_TIMEOUT + 4 * compiler.VERSION_TIMEOUT,
)
LOADER = Loader(
    RECIPE,
    load_once,
    otherwise=f"Calls on CPU tensors run on the reference, in plain PyTorch; {WAY_OUT}.",
)


def load() -> bool:
    """Whether the CPU library is there; the first call finds or builds it.

    A failure is warned of once.
    """
    loaded = LOADER.loaded
    return LOADER.load() if loaded is None else loaded


def refusals() -> list[str]:
    """Why there is no CPU library, as far as is known without building one."""
    reason = LOADER.refusal()
    return [] if reason is None else [reason]


def describe() -> str:
    """One line on the library's state, without building or loading anything."""
    return LOADER.describe()


def build(out: Path | None = None) -> Path:
    """Build the library now, whatever was remembered.

    Args:
        out: a folder for a library that runs on other machines of this kind, with a manifest; None
            builds for this machine into the user's cache.

    Returns:
        The library's path.

    Raises:
        BuildError: with the compiler's first error message.
        OSError: if out cannot be written to.
    """
    if out is None:
        return LOADER.build()
    out.mkdir(parents=True, exist_ok=True)
    portable = functools.partial(compiler.build, portable=True)
    return store.build_in(out, LIBRARY, portable).path
