"""Runs the PTX of compiled GPU kernels on the CPU, unmodified: one NumPy element per GPU thread.

    machine = run(ptx, entry, grid, block, [Buffer(x), Buffer(out, defined=False), n], shared)

raises `PtxError` with the PTX line, block and thread for an access out of bounds or misaligned, for
undefined data that reaches an address, a branch or a store, for a race in shared memory, a wrong
shuffle mask, a divergent barrier, and for every instruction that no module of `opcodes` knows.
`Buffer.unwritten` and `Buffer.written_twice` tell of the outputs, `Machine.counts()` what the run
cost, and `model` what that would take on a GPU: modelled, never measured.

PTX is not yet what a GPU executes: ptxas, which turns it into machine code, is trusted.
"""

from .machine import Machine, run
from .memory import Buffer
from .parse import Kernel, PtxError

__all__ = ["Buffer", "Kernel", "Machine", "PtxError", "run"]
