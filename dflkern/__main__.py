"""`python -m dflkern {info, bench, build, compile, doctor, demo}`, also installed as `dflkern`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the return value is the exit code."""
    parser = argparse.ArgumentParser(prog="dflkern", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dflkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        importlib.import_module(module, __package__).add_arguments(command)
        command.set_defaults(module=module)
    arguments = parser.parse_args(argv)
    code: int = importlib.import_module(arguments.module, __package__).main(arguments)
    return code


COMMANDS = {
    "info": (".info", "versions, devices, and the backends with available or why not"),
    "bench": (".bench", "time dflkern beside PyTorch and the detectors' own code"),
    "build": (".build", "build the CPU library ahead of time"),
    "compile": (".compile", "compile the GPU kernels for GPUs that are not there"),
    "doctor": (".doctor.command", "say what is wrong with a DFL training, from recorded tensors"),
    "demo": (".demo", "train a small detector on handwritten digits with dflkern"),
}

if __name__ == "__main__":
    sys.exit(main())
