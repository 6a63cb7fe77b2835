"""`python -m dflkern build`: build the CPU library ahead of time."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..cpu import library
from ..library import BuildError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to put it."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a folder for a library that runs on other machines of this kind; by default it is "
        "built for this machine, into the user's cache",
    )


def main(arguments: argparse.Namespace) -> int:
    """Build, and say where and how long."""
    began = time.perf_counter()
    try:
        path = library.build(arguments.out)
    except (BuildError, OSError) as error:
        print(f"dflkern: {error}", file=sys.stderr)
        return 1
    print(f"built {path} in {time.perf_counter() - began:.1f} s")
    return 0
