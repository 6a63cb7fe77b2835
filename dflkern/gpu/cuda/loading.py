"""CUDA kernels on a GPU that is here: compiled at the first use, kept in the user's cache, loaded.

PyTorch's launcher for the kernels of torch.compile loads and starts them: of all ways that need no
compiler on the machine it has the least host time (0.8 µs; 5 µs through ctypes).
"""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ...library import BuildError, Found, Recipe, store
from ..launch_plan import LaunchPlan, Start
from . import nvrtc

PROBE = "probe"  # a kernel that does nothing, in csrc/cuda/probe.cu
# How PyTorch's launcher names the types of arguments
LETTERS = {"null": "K", "i64": "l", "fp32": "f", "fp64": "d"}


def load(plan: LaunchPlan) -> Start:
    """Load a plan's kernel on the current device, compiled if need be.

    Raises:
        BuildError: if it does not compile, or cannot be kept.
        RuntimeError: from the driver, if it does not load.
    """
    types = [a.type for a in plan.arguments]
    return _start(plan.kernel, plan.num_warps, plan.shared or 0, types)


def refusals() -> list[str]:
    """Why there are no CUDA kernels on this machine, as far as is known without compiling one."""
    if torch.version.hip:
        return ["this PyTorch is for AMD GPUs, and its kernels are for NVIDIA's"]
    try:
        nvrtc.version()
    except BuildError as error:
        return [str(error)]
    if not torch.cuda.is_available():
        return ["its kernels need a GPU, and none is visible"]
    return []


@functools.cache
def why_not(device: torch.device) -> tuple[str, ...]:
    """Why a device cannot run CUDA kernels; empty if it can, as a kernel that does nothing shows.

    A GPU that cannot is warned of, once.

    Raises:
        RuntimeError: if a CUDA graph is being captured.
    """
    if device.type != "cuda":
        return (f"the logits are on {device}",)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dflkern: no CUDA kernel has run on this GPU yet, and none can be loaded while a "
                "CUDA graph is being captured. Run the call once before the capture."
            )
        try:
            _start(PROBE, 1, 0, [])(1, 1, 1, torch.cuda.current_stream().cuda_stream)
        except Exception as error:  # of any kind: PyTorch's launcher is not a public interface
            reason = f"{device} cannot run them: {str(error).partition(chr(10))[0]}"
            warnings.warn(
                f"dflkern: no CUDA kernels: {reason}. Calls run on Triton's kernels.",
                RuntimeWarning,
                stacklevel=3,
            )
            return (reason,)
    return ()


def describe() -> str:
    """One line on the state of the CUDA kernels, without compiling one."""
    reasons = refusals()
    return reasons[0] if reasons else f"compiled at the first use, by NVRTC {nvrtc.version()}"


def obtain(kernel: str, arch: int) -> Found:
    """The machine code of a kernel, out of the user's cache or else compiled into it.

    Raises:
        BuildError: from NVRTC, or if no folder can hold it.
    """

    def build(path: Path) -> dict[str, Any]:
        compiled = nvrtc.compile_kernel(kernel, arch)
        path.write_bytes(compiled.cubin)
        compiler = f"NVRTC {nvrtc.version()}"
        return {
            "kernel": kernel,
            "arch": arch,
            "entry": compiled.entry,
            "compiler": compiler,
            "flags": list(nvrtc.FLAGS),
        }

    words = "_".join(re.findall(r"\w+", kernel))
    recipe = Recipe(
        file=f"{words}_sm{arch}.cubin",
        purpose=f"CUDA kernel {kernel}",
        duration="",
        key=functools.partial(nvrtc.key, nvrtc.source_of(kernel)),
        build=build,
        compiler=lambda: f"NVRTC {nvrtc.version()}",
        executable=False,
    )
    return store.obtain(recipe)


def choose_arch(capability: tuple[int, int]) -> int:
    """The architecture to compile for: the GPU's, else the next lower one that runs on it.

    Raises:
        BuildError: if this NVRTC knows neither.
    """
    major, minor = capability
    able = [arch for arch in nvrtc.archs() if arch // 10 == major and arch % 10 <= minor]
    if not able:
        known = ", ".join(f"sm_{arch}" for arch in nvrtc.archs())
        raise BuildError(
            f"NVRTC {nvrtc.version()} does not compile for sm_{major}{minor}; it knows {known}. "
            "Another version of PyTorch's CUDA build may"
        )
    return max(able)


def _start(kernel: str, warps: int, shared: int, types: list[str]) -> Start:
    """A kernel on the current device."""
    device = torch.cuda.current_device()
    arch = choose_arch(torch.cuda.get_device_capability(device))
    path, facts = obtain(kernel, arch)
    launcher = torch._C._StaticCudaLauncher
    # The function, registers and spills; PyTorch 2.14 has the module before them
    function = launcher._load_kernel(str(path), facts["entry"], shared, device)[-3]
    letters = "".join("K" if each[0] == "*" else LETTERS[each] for each in types)
    values = ["0" if each == "null" else f"a{i}" for i, each in enumerate(types)]
    parameters = ", ".join(["x, y, z, stream", *(name for name in values if name != "0")])
    # A function made for its arguments: to put the null pointers among them would take 0.5 µs
    start: Start = eval(
        f"lambda {parameters}: launch(function, x, y, z, {warps}, {shared}, {letters!r}, "
        f"({''.join(f'{value}, ' for value in values)}), stream)",
        {"launch": launcher._launch_kernel, "function": function},
    )
    return start
