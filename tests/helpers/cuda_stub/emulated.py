"""Runs what this process launches on the stub device in the PTX emulator, as it is launched.

    emulation = Emulation().start()
    loss = dflkern.dfl_loss(logits, target)     # on the stub's "cuda"; loss holds its values
    emulation.faults, emulation.launches

Device memory is memory of this process, so kernels read and write it in place. A kernel sees the
live blocks of PyTorch's allocator on the device of the launch, each as long as it was asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptxemu import Kernel, Machine
from ptxemu.memory import SECTOR

from . import LIBRARY


class _Kernel(ctypes.Structure):
    _fields_ = [  # StubKernel of stub.h
        ("name", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("image_size", ctypes.c_size_t),
        ("device", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [  # StubLaunch of stub.h
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("captured", ctypes.c_int),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    ]


_LAUNCH_HOOK = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.POINTER(_Launch))
_REPLAY_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_void_p)


@dataclass(frozen=True)
class Launch:
    """A captured launch.

    Attributes:
        name: the kernel's entry.
        kernel: its PTX, parsed; None if the PTX is unknown, as for PyTorch's own kernels.
        parameters: the bytes of all parameters, as the PTX lays them out.
        stream: the handle, 0 for the default stream.
        captured: whether it went into a CUDA graph instead of running.
        blocks: address and bytes of the live memory on its device.
    """

    name: str
    kernel: Kernel | None
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    device: int
    captured: bool
    parameters: bytes
    blocks: tuple[tuple[int, int], ...] = field(repr=False)


class Emulation:
    """The launches of this process, run one by one.

    Attributes:
        launches: all so far, those of replayed CUDA graphs too.
        unknown: names of kernels that were not run, since their PTX is not known.
        faults: what the emulator found wrong.
    """

    def __init__(self, *folders: Path):
        """Look for PTX in folders: a file `name.ptx` beside the `name.cubin` that was loaded.

        By default in the caches of Triton and dflkern. For others there is `know`.
        """
        names = ("TRITON_CACHE_DIR", "DFLKERN_CACHE")
        self._folders = folders or tuple(Path(os.environ[name]) for name in names)
        self._kernels: dict[tuple[str, int], Kernel | None] = {}
        self._cubins: dict[int, list[Path]] = {}
        self._known: dict[bytes, str] = {}
        self._captured: list[Callable[[], object]] = []
        self._hooks = _LAUNCH_HOOK(self._on_launch), _REPLAY_HOOK(self._on_replay)
        self.clear()

    def clear(self) -> None:
        """Forget what happened so far, but for the contents of CUDA graphs."""
        self.launches: list[Launch] = []
        self.unknown: list[str] = []
        self.faults: list[str] = []

    def start(self) -> Emulation:
        """Run launches from here on."""
        ctypes.CDLL(LIBRARY).stub_set_hooks(*self._hooks)
        return self

    def know(self, cubin: bytes, ptx: str) -> None:
        """Remember the PTX that a cubin was made of."""
        self._known[cubin] = ptx

    def add_to_graph(self, work: Callable[[], object]) -> None:
        """Do work whenever the CUDA graph runs that the current stream is captured into."""
        stub = ctypes.CDLL(LIBRARY)
        stub.stub_capture_of.restype = ctypes.c_void_p
        graph = stub.stub_capture_of(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        stub.stub_graph_add_launch(ctypes.c_void_p(graph), self._keep(work))

    def _keep(self, work: Callable[[], object]) -> int:
        self._captured.append(work)
        return len(self._captured)  # 0 stands for nothing

    def _on_launch(self, pointer: Any) -> int:
        try:
            launch = self._read(pointer.contents)
            run = functools.partial(self._run, launch)
            if launch.captured:
                return self._keep(run)
            run()
        except Exception as error:  # an exception cannot pass through the driver's C code
            self.faults.append(f"{type(error).__name__}: {error}")
        return 0

    def _on_replay(self, number: int, stream: int | None) -> None:
        try:
            self._captured[number - 1]()
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def _read(self, raw: _Launch) -> Launch:
        name = raw.kernel.contents.name.decode()
        kernel = self._kernel(name, raw.kernel.contents)
        return Launch(
            name=name,
            kernel=kernel,
            grid=tuple(raw.grid),
            block=tuple(raw.block),
            shared_bytes=raw.shared_bytes,
            stream=raw.stream or 0,
            device=raw.device,
            captured=bool(raw.captured),
            parameters=_parameters(kernel, raw.parameters) if kernel else b"",
            blocks=live_blocks(raw.device) if kernel else (),
        )

    def _kernel(self, name: str, loaded: _Kernel) -> Kernel | None:
        key = name, loaded.image or 0
        if key not in self._kernels:
            ptx = self._ptx(ctypes.string_at(loaded.image, loaded.image_size))
            self._kernels[key] = Kernel(ptx, name) if ptx else None
        return self._kernels[key]

    def _ptx(self, image: bytes) -> str | None:
        if image.lstrip().startswith((b"//", b".version")):  # the driver was given PTX
            return image.decode().rstrip("\0")
        for cubin, ptx in self._known.items():
            if cubin.startswith(image):
                return ptx
        for look_again in (False, True):
            if look_again:
                self._index()
            for path in self._cubins.get(len(image), ()):
                if path.read_bytes() == image and path.with_suffix(".ptx").exists():
                    return path.with_suffix(".ptx").read_text()
        return None

    def _index(self) -> None:
        self._cubins = {}
        for folder in self._folders:
            for path in folder.rglob("*.cubin"):
                self._cubins.setdefault(path.stat().st_size, []).append(path)

    def _run(self, launch: Launch) -> None:
        self.launches.append(launch)
        if launch.kernel is None:
            self.unknown.append(launch.name)
            return
        machine = _LiveMachine(launch.kernel)
        machine.memory.buffers = [_LiveBuffer(*block) for block in launch.blocks]
        machine.launch(launch.grid, launch.block, launch.parameters, launch.shared_bytes)
        for buffer in machine.memory.buffers:
            if buffer.written_twice:
                message = f"{launch.name}: {buffer.written_twice} elements written twice"
                self.faults.append(message)


def _parameters(kernel: Kernel, pointers: Any) -> bytes:
    data = bytearray(max((each.offset + each.size for each in kernel.parameters), default=0))
    for i, parameter in enumerate(kernel.parameters):
        end = parameter.offset + parameter.size
        data[parameter.offset : end] = ctypes.string_at(pointers[i], parameter.size)
    return bytes(data)


def live_blocks(device: int, state: str = "active") -> tuple[tuple[int, int], ...]:
    """Address and bytes of the allocator's blocks on a device that are "active" or "inactive"."""
    return tuple(
        (block["address"], block["requested_size"] if state == "active" else block["size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"].startswith(state)
    )


def poison(device: int) -> None:
    """Fill the free memory of a device with ones: what reads it undefined gets NaN, −1, True."""
    for address, size in live_blocks(device, "inactive"):
        ctypes.memset(address, 0xFF, size)


class _LiveMachine(Machine):
    """An emulated GPU whose launches are given the bytes of their parameters."""

    def _parameters(self, arguments: bytes) -> np.ndarray:
        return np.frombuffer(arguments + bytes(8), np.uint8)


class _LiveBuffer:
    """Memory of this process as `ptxemu.memory.Buffer`: all of it is defined."""

    ahead = 0

    def __init__(self, address: int, size: int):
        self.name = f"the {size} bytes at {address:#x}"
        self.first, self.end = address % SECTOR, address % SECTOR + size
        self.base = address - self.first
        whole = (self.end // SECTOR + 1) * SECTOR
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(self.base))
        self.defined = np.ones(whole, bool)
        self.writer = np.full(whole, -1, np.int64)
        self.written_twice = 0
        self.sectors_read = np.zeros(whole // SECTOR, bool)
        self.sectors_written = np.zeros(whole // SECTOR, bool)
