"""`python -m dflkern build`: build a library ahead of time, the CPU's or the CUDA one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..cpu import library as cpu_library
from ..gpu.cuda import library as cuda_library
from ..library import BuildError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which library, for which GPUs, and where to put it."""
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="the CUDA kernels, with nvcc; CUDA is never built on first use",
    )
    parser.add_argument(
        "--arch",
        type=_archs,
        metavar="80,90",
        help="compute capabilities to build the CUDA kernels for; by default those of the GPUs "
        "that are here, else 75,80,86,89,90,100,120",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a folder for a library that runs on other machines of this kind; by default it is "
        "built for this machine, into the user's cache",
    )


def _archs(text: str) -> tuple[int, ...]:
    """80,90 or sm_80,sm_90 or 8.0,9.0."""
    return tuple(int(word.removeprefix("sm_").replace(".", "")) for word in text.split(","))


def main(arguments: argparse.Namespace) -> int:
    """Build, and say where and how long."""
    began = time.perf_counter()
    try:
        if arguments.arch and not arguments.cuda:
            raise BuildError("--arch is for the CUDA kernels; add --cuda")
        if arguments.cuda:
            path = cuda_library.build(arguments.arch, arguments.out)
        else:
            path = cpu_library.build(arguments.out)
    except (BuildError, OSError) as error:
        print(f"dflkern: {error}", file=sys.stderr)
        return 1
    print(f"built {path} in {time.perf_counter() - began:.1f} s")
    return 0
