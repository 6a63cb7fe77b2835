"""`python -m dflkern {info, bench, build, compile, doctor, demo}`, also installed as `dflkern`.

Exit codes shared by all subcommands: 130 after Ctrl-C, 141 if the reader of the output has gone,
and 2 (`doctor`: 3) for arguments that are wrong or a file or folder that cannot be written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the return value is the exit code.

    What any of them may meet is handled here: an output encoding without the characters that are
    printed, a reader such as `head` that closes the pipe, Ctrl-C, and what cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = argparse.Namespace(command=None)
    try:
        try:
            _parser().parse_args(argv, arguments)
            code: int = importlib.import_module(arguments.module, __package__).main(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a failure to write shows here, not at exit
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells report a process ended by SIGINT
    except BrokenPipeError:
        _discard_output()
        return 141  # as shells report a process ended by SIGPIPE
    except OSError as error:
        _discard_output()
        where, reason = error.filename or "the output", error.strerror or str(error)
        way_out = " Choose a folder with --out." if "out" in arguments else ""
        print(f"dflkern: {where}: {reason}.{way_out}", file=sys.stderr)
        return 3 if arguments.command == "doctor" else 2
    return code


def _parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="dflkern", description=text)
    parser.add_argument("--version", action="version", version=f"dflkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        importlib.import_module(module, __package__).add_arguments(command)
        command.set_defaults(module=module)
    return parser


def _discard_output() -> None:
    """Send what is still buffered nowhere, since Python flushes it once more at exit."""
    with contextlib.suppress(AttributeError, OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


COMMANDS = {
    "info": (".commands.info", "versions, devices, and the backends with available or why not"),
    "bench": (".bench", "time dflkern beside PyTorch and the detectors' own code"),
    "build": (".commands.build", "build the CPU library ahead of time"),
    "compile": (".commands.compile", "compile the GPU kernels for GPUs that are not there"),
    "doctor": (".commands.doctor", "say what is wrong with a DFL training, from recorded tensors"),
    "demo": (".demo", "train a small detector on handwritten digits with dflkern"),
}

if __name__ == "__main__":
    sys.exit(main())
