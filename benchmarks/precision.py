"""How far decode, loss and gradient are from float64: Ultralytics against dflkern.

Both sides get the same logits, rounded to fp32, fp16 or bf16, and run as in Ultralytics' training,
the halves under autocast: `bbox_decode`, `BboxLoss` and the `DFL` module, without and with
`patch()`. The truth is Ultralytics in float64 on the rounded logits.

    python benchmarks/precision.py
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from ultralytics.nn.modules.block import DFL
from ultralytics.utils.loss import BboxLoss, v8DetectionLoss

import dflkern
from dflkern.adapters.ultralytics import patch
from dflkern.bench.machine import describe

RESULT = Path(__file__).resolve().parent / "results" / "precision.json"
BINS, STRIDE, CELLS = 16, 32, 20  # the level of stride 32 of an image of 640 pixels
DTYPES = {"fp32": torch.float32, "fp16 autocast": torch.float16, "bf16 autocast": torch.bfloat16}
UPSTREAM, PATCHED = "Ultralytics", "dflkern"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    found = errors(arguments.images)
    for what, by_dtype in found.items():
        for label, sides in by_dtype.items():
            values = ", ".join(f"{side} {error:.1e}" for side, error in sides.items())
            print(f"{what}, {label}: {values}")
    record = {
        **describe("cpu", torch.get_num_threads()),
        "settings": {"images": arguments.images, "stride": STRIDE, "bins": BINS},
        "errors": found,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def errors(images: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what is wrong, dtype and side: the error."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for label, dtype in DTYPES.items():
        given = inputs(images, dtype)
        exact = run(to_double(given))
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        for side, context in ((UPSTREAM, contextlib.nullcontext), (PATCHED, patch)):
            with context(), autocast:
                measured = differences(run(given), exact)
            for what, error in measured.items():
                found.setdefault(what, {}).setdefault(label, {})[side] = error
    return found


def inputs(images: int, dtype: torch.dtype) -> SimpleNamespace:
    """Peaks of all widths around random distances, and the boxes at these distances, in cells."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    points, _ = dflkern.make_anchors([(CELLS, CELLS)], [STRIDE])
    anchors = len(points)
    distances = random(images, anchors, 4, 1) * (BINS - 1)
    sharpness = random(images, anchors, 4, 1) * 2
    logits = -sharpness * (torch.arange(BINS) - distances).abs() + random(images, anchors, 4, BINS)
    sides = (distances.squeeze(-1) + random(images, anchors, 4)).clamp(0, BINS)
    return SimpleNamespace(
        logits=logits.flatten(2).to(dtype),
        points=points.to(dtype),  # exact: 19.5 is the largest
        boxes=torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1),
        scores=random(images, anchors, 1),
        foreground=random(images, anchors) < 0.3,
    )


def to_double(given: SimpleNamespace) -> SimpleNamespace:
    """The same numbers in float64."""
    return SimpleNamespace(
        **{k: v.double() if v.is_floating_point() else v for k, v in vars(given).items()}
    )


def run(given: SimpleNamespace) -> dict[str, Tensor]:
    """What Ultralytics' functions return, whoever implements them now."""
    leaf = given.logits.clone().requires_grad_()
    positions = torch.arange(BINS, dtype=torch.float32)
    criterion = SimpleNamespace(use_dfl=True, proj=positions)
    boxes = v8DetectionLoss.bbox_decode(criterion, given.points, leaf)
    image = [torch.ones(2), torch.ones(len(given.points), 1)]  # only for models without DFL
    known = len(inspect.signature(BboxLoss.forward).parameters) - 8
    iou_loss, dfl_loss = BboxLoss(BINS)(
        leaf, boxes, given.points, given.boxes, given.scores, given.scores.sum(), given.foreground,
        *image[:known],
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(7.5 * iou_loss + 1.5 * dfl_loss, leaf)
    with torch.no_grad():
        distances = DFL(BINS).to(leaf.dtype)(leaf.mT.contiguous())
    results = {
        "boxes": boxes, "distances": distances, "iou": iou_loss, "dfl": dfl_loss,
        "gradient": gradient,
    }  # fmt: skip
    return {name: value.detach().double() for name, value in results.items()}


def differences(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The errors that the table shows, by what is wrong and in which unit."""
    error = {name: actual[name] - exact[name] for name in exact}
    return {
        "decode in training, largest, pixels": _largest(error["boxes"]) * STRIDE,
        "decode in training, mean, pixels": float(error["boxes"].abs().mean()) * STRIDE,
        "decode at inference, largest, pixels": _largest(error["distances"]) * STRIDE,
        "IoU loss, relative": _largest(error["iou"] / exact["iou"]),
        "DFL loss, relative": _largest(error["dfl"] / exact["dfl"]),
        "gradient of the logits, relative L2": float(
            error["gradient"].norm() / exact["gradient"].norm()
        ),
    }


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


if __name__ == "__main__":
    sys.exit(main())
