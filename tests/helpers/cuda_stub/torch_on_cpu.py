"""PyTorch's own operators, computed by the CPU in the memory of the stub device.

PyTorch's CUDA kernels do not run on the stub. Where a call of dflkern needs a fill, a cast or a
sum, the operator is replaced by its CPU form on the same memory, and its name is noted.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .emulated import Emulation

OPERATORS = (
    "add.Tensor", "add_.Tensor", "arange.start_out", "clone", "copy_", "div.Tensor", "div_.Tensor",
    "fill_.Scalar", "fill_.Tensor", "mean", "mean.dim", "mul.Tensor", "mul_.Tensor", "sum",
    "sum.dim_IntList", "zero_",
)  # fmt: skip


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor in the memory of a tensor on the stub device."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    shared = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(shared, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(tensor: Tensor, device: torch.device | int) -> Tensor:
    """A copy of a CPU tensor on the stub device, with its strides and what lies between."""
    storage = tensor.untyped_storage()
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=torch.device("cuda", device))
    if storage.nbytes():
        ctypes.memmove(copy.data_ptr(), storage.data_ptr(), storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=copy.device)
    return empty.set_(
        copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


class TorchOnCpu:
    """Replaces OPERATORS for CUDA tensors of this process; `used` lists the calls."""

    def __init__(self, emulation: Emulation) -> None:
        self.used: list[str] = []
        self._emulation = emulation
        self._library = torch.library.Library("aten", "IMPL")
        for name in OPERATORS:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            self._library.impl(name, self._replacement(name, op), "CUDA")

    def _replacement(self, name: str, op: Any) -> Any:
        written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
        names = [argument.name for argument in op._schema.arguments]

        def run(*args: Any, **kwargs: Any) -> Any:
            self.used.append(name)
            given = dict(zip(names, args, strict=False)) | kwargs
            host = {key: _host(value) for key, value in given.items()}
            if not torch.cuda.is_current_stream_capturing():
                result = op(**host)
                return given[written[0]] if written else on_device(result, _device_of(given))
            if written:
                self._emulation.add_to_graph(lambda: op(**host))
                return given[written[0]]
            result = on_device(op(**host), _device_of(given))
            memory = on_host(result)
            self._emulation.add_to_graph(lambda: memory.copy_(op(**host)))
            return result

        return run


def _host(value: Any) -> Any:
    return on_host(value) if isinstance(value, Tensor) and value.is_cuda else value


def _device_of(given: dict[str, Any]) -> int:
    tensors = [value for value in given.values() if isinstance(value, Tensor) and value.is_cuda]
    return tensors[0].device.index
