"""The Triton kernels, their launch plans, and what compiles them."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def kernel_of(name: str) -> Any:
    """A kernel; the first one imports Triton. A kernel's name begins with that of its module."""
    return getattr(importlib.import_module(f".{name.partition('_')[0]}", __package__), name)
