"""`python -m dflkern bench`: how fast dflkern is here, against PyTorch and Ultralytics.

Every case passes a gate against float64 before it is timed. On CPUs, both sides of a ratio run in
one process, in interleaved rounds, under allocator settings that keep freed memory: glibc maps each
tensor over 32 MB afresh, so by default large eager temporaries mostly measure page faults. A second
process measures the default allocator's ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from ..operators.requests import NAMES

# Module to import, and the package that brings it.
NEEDED = {"matplotlib": "matplotlib", "rich": "rich"}
ROUNDS, QUICK_ROUNDS = 30, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of `bench`."""
    parser.add_argument("--quick", action="store_true", help="under a minute: no torch.compile, "
                        "fewer cases and rounds")  # fmt: skip
    parser.add_argument("--filter", type=_pattern, metavar="REGEX", help="only the cases and "
                        "studies (calls, dtypes, threads) whose names match")  # fmt: skip
    parser.add_argument(
        "--rounds", type=_count, help=f"default: {ROUNDS}, with --quick {QUICK_ROUNDS}"
    )
    parser.add_argument("--threads", type=_count, help="PyTorch's threads (default: its own)")
    parser.add_argument("--device", help="a torch device (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--backend", choices=NAMES, default="auto", help="dflkern's backend (default: auto)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder to write (default: runs/bench)"
    )
    parser.add_argument("--json", type=Path, help="results (default: bench.json in the folder)")
    parser.add_argument("--chart", type=Path, help="picture (default: bench.png in the folder)")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write.

    Returns:
        0; 1 if a gate is red, whose case then shows no time; 2 if the bench cannot run here.
    """
    missing = [name for module, name in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        return _refuse(
            f"The bench needs {', '.join(missing)}, not installed here: "
            'pip install "dflkern[bench]" brings all it needs.'
        )
    # Only now: these import packages that dflkern itself can do without.
    from . import command
    from .cases import CASES, select

    cases, studies = select(arguments.filter, arguments.quick)
    if not cases and not studies:
        names = ", ".join(case.name for case in CASES)
        return _refuse(f"No case or study matches {arguments.filter!r}. The cases: {names}.")
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    return command.run(arguments, cases, studies)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; at least 1")
    return value


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error
    return text
