"""`python -m dflkern doctor`: examine a file of recorded tensors, and say what is wrong.

The file is a .pt, .npz or .safetensors with tensors named like the arguments of
`dflkern.doctor.examine`; it is read so that it cannot run code. The exit code is that of the
gravest finding: 0 for nothing above a note, 1 for a warning, 2 for an error; and 3 for a file that
cannot be examined.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from .examination import examine
from .example import seed
from .files import UnreadableError, read
from .findings import Report

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
    """Examine, print, draw.

    Returns:
        0, 1 or 2: the gravest finding is a note, a warning, an error; 3: nothing could be examined.
    """
    try:
        report = examine(**(seed() if arguments.demo else read(arguments.file)))
    except (UnreadableError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    drawn = _draw(report, arguments.picture)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(f"{report}\n\n{drawn}" if drawn else report)
    return int(report.severity)


def _draw(report: Report, path: Path) -> str:
    if not report.levels:
        return ""
    if importlib.util.find_spec("matplotlib") is None:
        return 'No picture: pip install "dflkern[demo]" brings matplotlib.'
    from .picture import draw

    draw(report, path)
    return f"Drawn: {path}"
