"""From a specification to a call and what the model says of it."""

from __future__ import annotations

import numpy as np

from . import assign_cases, box_cases, class_cases, geometry_cases
from .distribution_cases import distributions
from .making import Case, Maker
from .specs import DISTRIBUTIONS, Spec

CASES = {
    **dict.fromkeys(DISTRIBUTIONS, distributions),
    "decode_boxes": box_cases.decode_boxes,
    "box_loss": box_cases.box_loss,
    "class_loss": class_cases.class_loss,
    "task_aligned_assign": assign_cases.task_aligned_assign,
    "paired_box_iou": geometry_cases.paired_box_iou,
    "bbox2dist": geometry_cases.bbox2dist,
    "dist2bbox": geometry_cases.dist2bbox,
    "dfl_targets": geometry_cases.dfl_targets,
    "make_anchors": geometry_cases.make_anchors,
}


def build(spec: Spec) -> Case:
    with np.errstate(all="ignore"):
        return CASES[spec.op](Maker(spec))


__all__ = ["Case", "build"]
