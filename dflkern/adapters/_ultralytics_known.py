"""Which calls of Ultralytics' functions the adapter computes exactly, and why it leaves the others.

Each function takes the arguments of the one that is replaced and returns None, or the reason to run
Ultralytics' own code: whatever that code reads must be what it is in a model that nobody changed.
Only metadata is read, never a value on a GPU.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules import module as hooks
from torch.nn.modules.conv import Conv2d
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import FLOAT_DTYPES, MAX_BINS, MIN_BINS
from ..interception import is_intercepted
from ._patch import SILENTLY

# Why a call is left to Ultralytics
NO_DFL = "this model has reg_max: 1, so it has no DFL"
ARGUMENTS = (
    "its arguments differ from Ultralytics' in kind, dtype, shape or device, or require grad"
)
POSITIONS = "criterion.proj is no vector of the bins' positions 0, 1, 2, …"
LOSS = "the DFL loss of the criterion is not Ultralytics' DFLoss for that many bins"
CALL = "DFLoss.__call__, which it calls, has been replaced since patch()"
BOXES = "its boxes are not, or no longer, what bbox_decode made of the logits"
MODULE = "the convolution in the DFL module is not the one that Ultralytics makes"
HOOKS = "a hook is registered on the convolution in the DFL module, or on all modules"
TRAINED = "the positions of the bins in the DFL module require grad"

FLOP_COUNTER = "thop.profile"  # its hooks are there for one call before each training
BINS = range(MIN_BINS, MAX_BINS + 1)
_FORWARD, _CONV_FORWARD = Conv2d.forward, Conv2d._conv_forward


def _are_plain(*values: Any) -> bool:
    """Whether all are floating-point tensors, of no subclass and on one device."""
    for value in values:  # a loop: this runs at every call
        if type(value) not in (Tensor, Parameter) or value.dtype not in FLOAT_DTYPES:
            return False
        if value is not values[0] and value.device != values[0].device:
            return False
    return True


def _are_constant(*values: Any) -> bool:
    """Whether all are plain and no gradient flows to them."""
    if torch.is_grad_enabled():
        for value in values:
            if getattr(value, "requires_grad", False):
                return False
    return _are_plain(*values)


def unknown_rows(self: Any, pred_dist: Tensor, target: Tensor) -> str | None:
    """`DFLoss.__call__`."""
    if not (_are_plain(pred_dist) and _are_constant(target)):
        return ARGUMENTS
    fits = target.ndim > 0 and pred_dist.shape == (target.numel(), self.reg_max)
    return None if fits and self.reg_max in BINS else ARGUMENTS


def unknown_logits(
    self: Any, anchor_points: Tensor, pred_dist: Tensor, pred_angle: Tensor | None = None
) -> str | None:
    """`bbox_decode` of either criterion."""
    if not self.use_dfl:
        return NO_DFL
    proj = self.proj
    if not _are_constant(proj) or proj.ndim != 1 or len(proj) not in BINS:
        return POSITIONS
    fits = (
        _are_plain(pred_dist, proj, anchor_points)
        and _are_constant(anchor_points)
        and (pred_angle is None or _are_plain(pred_angle, proj))
        and pred_dist.ndim == 3
        and anchor_points.shape == (pred_dist.shape[1], 2)
        and pred_dist.shape[2] == 4 * len(proj)
    )
    return None if fits else ARGUMENTS


class _Origin(NamedTuple):
    """What boxes were decoded from, in which state."""

    logits: weakref.ref[Tensor]
    anchor_points: weakref.ref[Tensor]
    versions: tuple[int, ...]
    counting: bool


_origins: Any = WeakTensorKeyDictionary()  # of boxes; a copy of boxes has none


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple([each._version for each in tensors])


def _record_nothing(*tensors: Tensor) -> bool:
    """Whether changes to the tensors would go unrecorded, or the graph of a compiler is made."""
    for each in tensors:
        if each.is_inference():
            return True
    return torch.compiler.is_compiling()


def note_origin(boxes: Tensor, logits: Tensor, anchor_points: Tensor, *, counting: bool) -> None:
    """Note what boxes were decoded from, for `unknown_boxes`.

    Args:
        boxes: just decoded.
        logits: what they were decoded from.
        anchor_points: likewise.
        counting: whether the bins were at 0, 1, 2, …, as in DFL's targets.
    """
    tensors = logits, boxes, anchor_points
    if not _record_nothing(*tensors):
        _origins[boxes] = _Origin(
            weakref.ref(logits), weakref.ref(anchor_points), _versions(*tensors), counting
        )


def unknown_boxes(
    known_loss: Any,
    self: Any,
    pred_dist: Tensor,
    pred_bboxes: Tensor,
    anchor_points: Tensor,
    target_bboxes: Tensor,
    target_scores: Tensor,
    target_scores_sum: Tensor | float,
    fg_mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    """`BboxLoss.forward`, whose DFL loss must be a known_loss: Ultralytics' `DFLoss`."""
    loss = self.dfl_loss
    if loss is None:
        return NO_DFL
    tensors = pred_dist, pred_bboxes, anchor_points
    if _record_nothing(*tensors):
        return SILENTLY
    if type(loss) is not known_loss or 4 * loss.reg_max != pred_dist.shape[-1]:
        return LOSS
    if not is_intercepted(known_loss, "__call__"):
        return CALL
    origin: _Origin | None = _origins.get(pred_bboxes)
    if (
        origin is None
        or origin.logits() is not pred_dist
        or origin.anchor_points() is not anchor_points
        or origin.versions != _versions(*tensors)
        or pred_bboxes.requires_grad != pred_dist.requires_grad
        or pred_bboxes._backward_hooks  # it may change the gradient
        or pred_bboxes.retains_grad
    ):
        return BOXES
    if not origin.counting:
        return POSITIONS
    shape, constants = pred_dist.shape[:2], [target_bboxes, target_scores]
    if isinstance(target_scores_sum, Tensor):
        constants.append(target_scores_sum)
    fits = (
        _are_constant(*constants)
        and target_bboxes.device == pred_dist.device == fg_mask.device
        and (target_bboxes.shape, target_scores.shape[:-1]) == ((*shape, 4), shape)
        and all(each.ndim == 0 for each in constants[2:])
        and fg_mask.shape == shape
        and (fg_mask.dtype == torch.bool or fg_mask.is_floating_point())
    )
    return None if fits else ARGUMENTS


def unknown_sides(self: Any, x: Tensor) -> str | None:
    """`DFL.forward`."""
    conv, bins = self.conv, self.c1
    if (
        type(conv) is not Conv2d
        or getattr(conv.forward, "__func__", None) is not _FORWARD
        or getattr(conv._conv_forward, "__func__", None) is not _CONV_FORWARD
    ):
        return MODULE
    if (
        conv._forward_hooks or conv._forward_pre_hooks
        or conv._backward_hooks or conv._backward_pre_hooks
        or hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks or hooks._global_backward_pre_hooks
    ):  # fmt: skip
        owners = {getattr(each, "__module__", "") for each in conv._forward_hooks.values()}
        return SILENTLY if owners == {FLOP_COUNTER} else HOOKS
    weight = conv.weight
    settings = conv.stride, conv.padding, conv.groups, conv.padding_mode, conv.bias
    if settings != ((1, 1), (0, 0), 1, "zeros", None) or weight.shape != (1, bins, 1, 1):
        return MODULE
    if not _are_constant(weight):
        return TRAINED
    fits = _are_plain(x, weight) and x.ndim == 3 and x.shape[1] == 4 * bins and bins in BINS
    return None if fits else ARGUMENTS


def unknown_angle(
    self: Any, bboxes: Tensor, anchors: Tensor, angle: Tensor | None = None
) -> str | None:
    """`OBB.decode_bboxes`."""
    return None if _are_plain(bboxes, self.angle if angle is None else angle) else ARGUMENTS
