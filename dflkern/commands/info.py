"""`python -m dflkern info`: versions, devices, and each backend with available or why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

import torch

from .. import __version__
from ..operators import backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no arguments."""


def main(arguments: argparse.Namespace) -> int:
    """Print the report."""
    print(report())
    return 0


def report() -> str:
    """All of `info`, as text."""
    lines = [
        f"dflkern   {__version__}",
        f"torch     {torch.__version__}",
        f"triton    {_version('triton')}",
        f"python    {platform.python_version()} on {platform.platform()}",
        "",
        "devices",
        f"  cpu     {cpu_name()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"  cuda:{i}  {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        reason = "no GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        lines.append(f"  cuda    none: {reason}")
    lines += ["", "backends"]
    for backend, description in backends.DESCRIPTIONS.items():
        reasons = backends.unavailable(backend)
        if reasons:
            state = f"not available: {'; '.join(reasons)}"
        else:
            state = f"available{backends.state(backend)}"
        lines.append(f"  {backend:<10}{description}: {state}")
    return "\n".join(lines)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
