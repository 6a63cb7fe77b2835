"""Where and with what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..commands.info import cpu_name

_PACKAGES = ("torch", "triton", "ultralytics")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Machine, versions, commit and date, as the JSON holds them."""
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {"dflkern": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"machine": machine, "versions": versions, "commit": _commit(), "date": date}


def _commit() -> str | None:
    """The commit of a checkout, marked if files differ from it; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12",
               "--exclude=*"]  # fmt: skip
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError:
        return None
    return done.stdout.strip() or None
