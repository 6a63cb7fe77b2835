"""The CUDA library: found prebuilt or in the user's cache, and never built on first use.

`python -m dflkern build --cuda` builds it. Beside the library lies a manifest of what it runs on.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from . import cache, compiler, cuda_compiler
from .compiler import BuildError
from .native import PREBUILT

LIBRARY, MANIFEST = "dflkern_cuda.so", "dflkern_cuda.json"
NOT_BUILT = "its library is not built; `python -m dflkern build --cuda` builds it with nvcc"


class _State:
    """What this process knows: nothing yet, a loaded library, or why it cannot be loaded."""

    lock = threading.Lock()
    path: Path | None = None
    reason: str | None = None


def load() -> bool:
    """Load the CUDA library if it is built; whether it is there."""
    with _State.lock:
        if _State.path is None and _State.reason is None:
            try:
                path = _find()
                if path is None:
                    return False
                torch.ops.load_library(path)
                _State.path = path
            except (BuildError, OSError) as error:
                _State.reason = str(error)
        return _State.path is not None


def refusals() -> list[str]:
    """Why there are no CUDA kernels on this machine."""
    if torch.version.hip:
        return ["this PyTorch is for AMD GPUs, and its kernels are for NVIDIA's"]
    if _State.reason is not None:
        return [_State.reason]
    try:
        return [] if _State.path or _find() else [NOT_BUILT]
    except BuildError as error:
        return [str(error)]


def why_not(device: torch.device) -> list[str]:
    """Why the library that is there cannot serve a device."""
    if device.type != "cuda":
        return [f"the logits are on {device}"]
    path = _State.path or _find()
    if path is None:
        return [NOT_BUILT]
    major, minor = torch.cuda.get_device_capability(device)
    archs = _manifest(path)["archs"]
    if runs_on(archs, 10 * major + minor):
        return []
    built = ", ".join(f"sm_{arch}" for arch in archs)
    return [
        f"its library is built for {built}, and {device} is sm_{major}{minor}; "
        "`python -m dflkern build --cuda` builds it for the GPUs that are here"
    ]


def runs_on(archs: Sequence[int], capability: int) -> bool:
    """Whether a build for archs, with PTX for the last, has code for a compute capability."""
    same_major = any(
        arch // 10 == capability // 10 and arch % 10 <= capability % 10 for arch in archs
    )
    return same_major or archs[-1] <= capability


def describe() -> str:
    """One line on the library's state, without loading anything."""
    if _State.path is not None:
        return f"loaded from {_State.path}"
    reasons = refusals()
    return reasons[0] if reasons else f"built, at {_find()}"


def build(archs: Sequence[int] | None = None, out: Path | None = None) -> Path:
    """Build the library now.

    Args:
        archs: compute capabilities, 80 for sm_80; None means the GPUs that are here, else many.
        out: a folder; None builds into the user's cache, where it is found.

    Returns:
        The library's path.

    Raises:
        BuildError: with the way out, or nvcc's last words.
    """
    nvcc = cuda_compiler.find_nvcc()
    archs = cuda_compiler.choose_archs(archs, nvcc)
    folder = cache.folder(cuda_compiler.key()) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "abi": compiler.ABI_TARGET,
        "archs": list(archs),
        "compiler": compiler.compiler_version(nvcc).strip().splitlines()[-1],
        "flags": list(cuda_compiler.FLAGS),
        "machine": os.uname().machine,
    }
    with FileLock(folder / "lock"):
        cuda_compiler.build(folder / LIBRARY, archs, nvcc)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder / LIBRARY


def _find() -> Path | None:
    """The library inside the package, if it was built for such a machine, else the cached one."""
    prebuilt = PREBUILT / LIBRARY
    if prebuilt.exists() and _manifest(prebuilt)["machine"] == os.uname().machine:
        return prebuilt
    cached = _folder() / LIBRARY
    if not (cached.exists() and cached.with_name(MANIFEST).exists()):
        return None
    cache.check_owner(cached)
    return cached


@functools.cache
def _key() -> str:
    return cuda_compiler.key()


def _folder() -> Path:
    return cache.folder(_key())


def _manifest(library: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(library.with_name(MANIFEST).read_text())
    return found
