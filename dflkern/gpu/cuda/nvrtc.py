"""Compiling a CUDA kernel of csrc with NVRTC, the compiler in the CUDA build of PyTorch.

Needs neither a CUDA toolkit nor a GPU nor its driver.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...cpu.compiler import digest, sources
from ...library import BuildError

# -fmad=false: a multiply-add is fused where the source says so and nowhere else
FLAGS = ("--std=c++17", "--fmad=false", "--prec-div=false")
TORCH_HAS_IT = "a build of PyTorch for CUDA brings it (https://pytorch.org/get-started)"


class Compiled(NamedTuple):
    """A kernel: the name of its entry, its PTX and its machine code."""

    entry: str
    ptx: str
    cubin: bytes


def compile_kernel(kernel: str, arch: int) -> Compiled:
    """Compile a kernel.

    Args:
        kernel: as launch plans name it, such as "rows_forward<fp32, 16, What::loss>".
        arch: 80 for sm_80; one of `archs()`.

    Raises:
        BuildError: if there is no NVRTC, or with its first error message.
    """
    with Program(source_of(kernel)) as program:
        program.ask_for(kernel)
        program.compile(arch)
        ptx = program.result("PTX").rstrip(b"\0").decode()
        return Compiled(program.entry_of(kernel), ptx, program.result("CUBIN"))


def source_of(kernel: str) -> str:
    """The file in csrc that holds a kernel."""
    return f"cuda/{kernel.partition('_')[0]}.cu"


@functools.cache
def key(file: str) -> str:
    """What the kernels of a file depend on, as a name."""
    return f"cuda-{digest([file], FLAGS, version())}"


@functools.cache
def archs() -> tuple[int, ...]:
    """The architectures that this NVRTC compiles for, ascending.

    Raises:
        BuildError: if there is no NVRTC.
    """
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(found))
    return tuple(sorted(found))


@functools.cache
def version() -> str:
    """NVRTC's version, such as "13.0".

    Raises:
        BuildError: if there is no NVRTC.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


class Program:
    """A file of csrc, of which NVRTC compiles the kernels that are asked for."""

    def __init__(self, file: str) -> None:
        self._lib, self._handle = _library(), ctypes.c_void_p()
        source = f'#include "{file}"\nusing namespace dflkern;\n'.encode()
        place = ctypes.byref(self._handle)
        _check(self._lib.nvrtcCreateProgram(place, source, None, 0, None, None))

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.nvrtcDestroyProgram(ctypes.byref(self._handle))

    def ask_for(self, kernel: str) -> None:
        """Ask for a kernel, as launch plans name it."""
        _check(self._lib.nvrtcAddNameExpression(self._handle, kernel.encode()))

    def compile(self, arch: int, *options: str) -> None:
        """Compile what was asked for.

        Raises:
            BuildError: with the first error message.
        """
        words = [*FLAGS, f"--gpu-architecture=sm_{arch}", "-I", str(sources()), *options]
        given = (ctypes.c_char_p * len(words))(*map(os.fsencode, words))
        code = self._lib.nvrtcCompileProgram(self._handle, len(words), given)
        if code:
            log = self.result("ProgramLog").rstrip(b"\0").decode(errors="replace").splitlines()
            told = [line for line in log if "error" in line] or log or [_text(code)]
            raise BuildError(f"NVRTC {version()} failed: {told[0].strip()}")

    def entry_of(self, kernel: str) -> str:
        """The name that a kernel has in the compiled code."""
        found, name = ctypes.c_char_p(), kernel.encode()
        _check(self._lib.nvrtcGetLoweredName(self._handle, name, ctypes.byref(found)))
        return (found.value or b"").decode()

    def result(self, kind: str) -> bytes:
        """The "PTX", the "CUBIN" or the "ProgramLog"."""
        size = ctypes.c_size_t()
        _check(getattr(self._lib, f"nvrtcGet{kind}Size")(self._handle, ctypes.byref(size)))
        found = ctypes.create_string_buffer(size.value)
        _check(getattr(self._lib, f"nvrtcGet{kind}")(self._handle, found))
        return found.raw


@functools.cache
def _library() -> Any:
    """NVRTC. PyTorch has loaded it already, or it lies beside PyTorch's other libraries."""
    if torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} has no NVRTC: {TORCH_HAS_IT}")
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    beside = Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}")  # in wheels
    for path in (Path(name), *sorted(beside)):
        # NVRTC loads its built-in headers by name, which only finds what is loaded already
        needed = path.parent.glob("libnvrtc-builtins.so.*") if path.is_absolute() else ()
        try:
            for each in (*needed, path):
                library = ctypes.CDLL(str(each))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise BuildError(f"{name} was not found: {TORCH_HAS_IT}")


def _text(code: int) -> str:
    return (_library().nvrtcGetErrorString(code) or b"").decode()


def _check(code: int) -> None:
    if code:
        raise BuildError(f"NVRTC: {_text(code)}")
