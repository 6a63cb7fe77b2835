"""The maths in plain PyTorch: the definition, the fallback on every device, the truth in tests.

Each function has the parameters of its record in `operators.table`, by name and in that order.
"""

from .assigner import task_aligned_assign
from .boxes import (
    box_loss,
    box_loss_backward,
    boxes_of_objects,
    decode_boxes,
    decode_boxes_backward,
)
from .classes import class_loss, class_loss_backward
from .distances import distance_loss, distance_loss_backward
from .distributions import (
    dfl_decode,
    dfl_decode_backward,
    dfl_loss,
    dfl_loss_and_decode,
    dfl_loss_and_decode_backward,
    dfl_loss_backward,
)

__all__ = [
    "box_loss",
    "box_loss_backward",
    "boxes_of_objects",
    "class_loss",
    "class_loss_backward",
    "decode_boxes",
    "decode_boxes_backward",
    "dfl_decode",
    "dfl_decode_backward",
    "dfl_loss",
    "dfl_loss_and_decode",
    "dfl_loss_and_decode_backward",
    "dfl_loss_backward",
    "distance_loss",
    "distance_loss_backward",
    "task_aligned_assign",
]
