"""`python -m dflkern demo`: train a small anchor-free detector on handwritten digits.

Scans of handwritten digits are composed into scenes with true boxes; a detector with distributions
for box sides learns to find and read them, with dflkern's targets, loss and decode. It ends with a
table of what was expected and what was measured, and writes pictures, metrics and predictions.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from ..operators.requests import NAMES
from .config import Config
from .mistakes import ALL, MISTAKES

# Module to import, and the package that brings it.
NEEDED = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "pycocotools": "pycocotools",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of `demo`."""
    parser.add_argument(
        "--backend", choices=NAMES, default="auto", help="dflkern's backend (default: auto)"
    )
    parser.add_argument(
        "--epochs",
        type=_count,
        default=Config.epochs,
        help=f"of {Config.steps_per_epoch} steps each (default: {Config.epochs})",
    )
    parser.add_argument(
        "--seed", type=int, default=Config.seed, help="of split, scenes and detector (default: 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)"
    )
    parser.add_argument(
        "--mistake",
        nargs="+",
        choices=(*MISTAKES, ALL),
        metavar="NAME",
        help="train with a mistake beside the corrected training, the doctor watching: "
        f"{', '.join(MISTAKES)}, or {ALL} together; several names give several trainings",
    )
    parser.add_argument("--device", help="a torch device (default: cuda if there is one, else cpu)")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0 if every expectation is met, 1 if one is not, 2 if the demo cannot run here; with
        --mistake 0 if the doctor names each mistake and finds the corrected training healthy.
    """
    began = time.perf_counter()
    missing = [package for module, package in NEEDED.items() if not _installed(module)]
    if missing:
        return _refuse(
            f"The demo needs {', '.join(missing)}, not installed here: "
            'pip install "dflkern[demo]" brings all it needs.'
        )
    # Only now: it imports packages that dflkern itself can do without.
    from . import command

    try:
        device = command.choose_device(arguments.device)
        decode_backend = command.choose_decode_backend(arguments.backend, device)
    except RuntimeError as error:
        return _refuse(str(error))
    config = Config(
        epochs=arguments.epochs,
        seed=arguments.seed,
        device=device,
        backend=arguments.backend,
        decode_backend=decode_backend,
    )
    if arguments.mistake:
        from . import compare

        return compare.run(config, arguments.mistake, arguments.out)
    return command.run(config, arguments.out, began)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of epochs; at least 1")
    return value
