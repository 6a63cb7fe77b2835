"""`python -m dflkern doctor`: examine a file of recorded tensors, and say what is wrong.

The file is a .pt, .npz or .safetensors with tensors named like the arguments of
`dflkern.doctor.examine`; it is read so that it cannot run code. The exit code is that of the
gravest finding: 0 for nothing above a note, 1 for a warning, 2 for an error; and 3 for a file that
cannot be examined, with the reason on stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from ..doctor.examination import examine
from ..doctor.example import seed
from ..doctor.files import read
from ..doctor.report import Report

UNUSABLE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of `doctor`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, help="a .pt, .npz or .safetensors file")
    what.add_argument(
        "--demo", action="store_true", help="examine the mistakes that dflkern grew out of"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("runs/doctor/targets.png"),
        help="where to draw the targets (default: runs/doctor/targets.png)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Examine, print, then draw; a picture that cannot be drawn is one line on stderr.

    Returns:
        0, 1 or 2: the gravest finding is a note, a warning, an error; 3: nothing could be examined.
    """
    try:
        report = examine(**(seed() if arguments.demo else read(arguments.file)))
        text = str(report)
        if arguments.json:
            text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except Exception as error:  # a fault of the doctor's own, or too little memory
        reason = _first_line(f"{type(error).__name__}: {error}")
        print(f"The doctor failed on {arguments.file or 'the demo'}: {reason}", file=sys.stderr)
        return UNUSABLE
    print(text, flush=True)
    if report.levels:
        _draw(report, arguments.picture, quiet=arguments.json)
    return int(report.severity)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _draw(report: Report, path: Path, *, quiet: bool) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print('No picture: pip install "dflkern[doctor]" brings matplotlib.', file=sys.stderr)
        return
    try:
        from ..doctor.picture import draw

        draw(report, path)
    except Exception as error:  # of the folder, the format, or a broken matplotlib
        print(f"No picture: {_first_line(str(error))}", file=sys.stderr)
        return
    if not quiet:
        print(f"\nDrawn: {path}")
