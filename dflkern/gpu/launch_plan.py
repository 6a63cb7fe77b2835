"""What a launch plan is: a pure value that says how one launch of an operator runs.

Making one imports no Triton and touches no device, so that a plan can be explained, compiled for
another machine, or run in an emulator; what is launched is exactly what the plan says.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

ELEMENT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
GRID_LIMIT = 65535  # of the grid's second and third axis
UNROLLED_BINS = 64  # above, a lane cannot hold a distribution in registers
LAZY_BINS = 33


class Step(NamedTuple):
    """One launch of an operator, or of its gradient: what it computes, or gets the gradient of."""

    name: str
    loss: bool = False
    decode: bool = False
    backward: bool = False


_FORWARD = (
    Step("dfl_loss", loss=True),
    Step("dfl_decode", decode=True),
    Step("dfl_loss_and_decode", loss=True, decode=True),
    Step("decode_boxes", decode=True),
    Step("box_loss", loss=True),
)
# The second launch of a reduced loss, over what the first one wrote
_SUMS = (Step("dfl_loss_sums"), Step("box_loss_sums"))
STEPS = {
    step.name: step
    for forward in _FORWARD
    for step in (forward, forward._replace(name=f"{forward.name}_backward", backward=True))
} | {step.name: step for step in _SUMS}


def steps(op: str, reduction: str = "none") -> tuple[str, ...]:
    """The names of an operator's launches, in their order."""
    if op == "box_loss" or (op == "dfl_loss" and reduction != "none"):
        return op, f"{op}_sums"
    return (op,)


@dataclass(frozen=True)
class Argument:
    """A runtime argument of a kernel.

    `value` is the role of a tensor ("logits", "target", …) for a pointer, whose type begins with
    "*", else the number; the type "null" is a pointer to nothing. `divisible` says that the pointer
    or number is a multiple of 16.
    """

    name: str
    type: str
    value: str | int | float
    divisible: bool = False


@dataclass(frozen=True)
class LaunchPlan:
    """How one operator runs on one problem: kernel, grid, block, arguments, constants.

    `block` counts threads on NVIDIA GPUs. `shared` is the bytes of dynamic shared memory, beside
    what the kernel itself declares; None where the compiler decides. `rows` is for kernels that
    take nothing but the number n of distributions, whose plan serves any n: how many distributions
    a lane takes, and the lanes of a program. `scratch` is the role of a tensor in the compute dtype
    that this launch writes and the next one reads, and how many numbers each program writes there,
    0 for one for each distribution.
    """

    op: str
    backend: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Any], ...]
    shared: int | None = None
    rows: tuple[int, int] | None = None
    counts: bool = False
    scratch: tuple[str, int] | None = None

    @property
    def num_warps(self) -> int:
        """Warps of 32 threads in a block."""
        return self.block[0] // 32

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """All that its compiled kernel depends on: no sizes, but for what their types say."""
        types = tuple((a.name, a.type, a.divisible) for a in self.arguments)
        return self.backend, self.kernel, self.block, self.constants, self.shared, types


class Start(Protocol):
    """A kernel loaded on one device: starts it on a grid and a stream of that device.

    It takes the arguments of its plan in their order, but for those of type "null"; pointers are
    addresses. The device is the current one.
    """

    def __call__(self, x: int, y: int, z: int, stream: int, *arguments: int | float) -> None:
        """Launch."""


def blocks(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def programs_for(n: int, rows: tuple[int, int]) -> int:
    """How many programs take n distributions; those that fill no lane get one more program."""
    each, block = rows
    return -(-(n // each) // block) + (n % each > 0)
