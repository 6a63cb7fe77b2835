"""The CUDA library: found prebuilt or in the user's cache, and never built on first use.

`python -m dflkern build --cuda` builds it. Its manifest says which GPUs it runs on.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...cpu.library import PREBUILT, load_once
from ...library import Loader, Recipe, store
from . import compiler as cuda_compiler

LIBRARY = "dflkern_cuda.so"
NOT_BUILT = "its library is not built; `python -m dflkern build --cuda` builds it with nvcc"


def _fits(facts: dict[str, Any]) -> bool:
    return bool(facts["machine"] == platform.machine() and facts["archs"])


def _build(path: Path) -> dict[str, Any]:
    nvcc = cuda_compiler.find_nvcc()
    return cuda_compiler.build(path, cuda_compiler.choose_archs(None, nvcc), nvcc)


RECIPE = Recipe(
    file=LIBRARY,
    purpose="CUDA kernels",
    duration="some minutes",
    key=cuda_compiler.key,
    build=_build,
    compiler=cuda_compiler.find_nvcc,
    prebuilt=PREBUILT,
    fits=_fits,
    timeout=2 * cuda_compiler.TIMEOUT,
)
LOADER = Loader(
    RECIPE,
    load_once,
    otherwise="Calls on GPUs run on Triton's kernels; `python -m dflkern build --cuda` builds it "
    "anew.",
    absent=NOT_BUILT,
)


def load() -> bool:
    """Whether the CUDA library is there; the first call finds and loads it, or says why not."""
    return torch.version.hip is None and LOADER.load()


def refusals() -> list[str]:
    """Why there are no CUDA kernels on this machine."""
    if torch.version.hip:
        return ["this PyTorch is for AMD GPUs, and its kernels are for NVIDIA's"]
    reason = LOADER.refusal()
    return [] if reason is None else [reason]


def why_not(device: torch.device) -> list[str]:
    """Why the library that is there cannot serve a device."""
    if device.type != "cuda":
        return [f"the logits are on {device}"]
    found = LOADER.find()
    if found is None:
        return [NOT_BUILT]
    major, minor = torch.cuda.get_device_capability(device)
    archs = found.facts["archs"]
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
    reasons = refusals()
    return reasons[0] if reasons else LOADER.describe()


def build(archs: Sequence[int] | None = None, out: Path | None = None) -> Path:
    """Build the library now.

    Args:
        archs: compute capabilities, 80 for sm_80; None means the GPUs that are here, else many.
        out: a folder; None builds into the user's cache, where it is found.

    Returns:
        The library's path.

    Raises:
        BuildError: with the way out, or nvcc's first error message.
        OSError: if out cannot be written to.
    """
    nvcc = cuda_compiler.find_nvcc()
    chosen = cuda_compiler.choose_archs(archs, nvcc)

    def make(path: Path) -> dict[str, Any]:
        return cuda_compiler.build(path, chosen, nvcc)

    if out is None:
        return LOADER.build(make)
    out.mkdir(parents=True, exist_ok=True)
    return store.build_in(out, LIBRARY, make).path
