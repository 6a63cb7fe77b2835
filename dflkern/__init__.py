"""Fused kernels for Distribution Focal Loss (DFL) and its expected-value decode.

Importing this package registers operators and nothing else: it imports no Triton, builds nothing
and asks no device.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from .detection import (
    Assignment,
    class_loss,
    distance_loss,
    pack_targets,
    task_aligned_assign,
)
from .detection_loss import DetectionLoss, DetectionLosses
from .functional import box_loss, decode_boxes, dfl_decode, dfl_loss, dfl_loss_and_decode, explain
from .geometry import bbox2dist, dfl_targets, dist2bbox, make_anchors
from .iou import paired_box_iou
from .modules import BoxLoss, DFLDecode, DFLoss
from .operators.requests import use_backend

if TYPE_CHECKING:
    from . import doctor as doctor

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "BoxLoss",
    "DFLDecode",
    "DFLoss",
    "DetectionLoss",
    "DetectionLosses",
    "bbox2dist",
    "box_loss",
    "class_loss",
    "decode_boxes",
    "dfl_decode",
    "dfl_loss",
    "dfl_loss_and_decode",
    "dfl_targets",
    "dist2bbox",
    "distance_loss",
    "explain",
    "make_anchors",
    "pack_targets",
    "paired_box_iou",
    "task_aligned_assign",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    """`dflkern.doctor`, imported at its first use."""
    if name == "doctor":
        return importlib.import_module(".doctor", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
