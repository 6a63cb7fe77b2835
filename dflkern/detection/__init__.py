"""The detection loss around the distributions: assignment of anchors, class loss, distance loss."""

from .assignment import Assignment, task_aligned_assign
from .losses import class_loss, distance_loss, pack_targets

__all__ = ["Assignment", "class_loss", "distance_loss", "pack_targets", "task_aligned_assign"]
