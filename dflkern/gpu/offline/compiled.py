"""What compiling a launch plan gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one GPU architecture.

    `ptx` and `cubin` are empty for an AMD target, whose machine code `hsaco` holds. `shared` is
    the bytes of shared memory that the launch asks for.
    """

    entry: str
    ptx: str
    cubin: bytes
    shared: int
    hsaco: bytes = b""
