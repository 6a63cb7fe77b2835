"""A kernel that does nothing, to find out whether this machine compiles, loads and starts one."""

import triton
import triton.language as tl


@triton.jit
def probe_kernel(n, BLOCK: tl.constexpr):
    """Nothing."""
