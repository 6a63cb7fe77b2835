"""The whole loss of a dense detector: assignment, classes and boxes, from a head's raw outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .checks import check_other
from .detection import Assignment, class_loss, distance_loss, task_aligned_assign
from .detection.head_checks import (
    check_class_weight,
    check_maps,
    check_outputs,
    check_settings,
    check_strides,
)
from .functional import box_loss, decode_boxes
from .geometry import column, dist2bbox, make_anchors
from .operators import positions
from .operators.modes import is_observed
from .problem import compute_dtype


class DetectionLosses(NamedTuple):
    """What `DetectionLoss` returns.

    Attributes:
        total: box + cls + dfl, 0-dim.
        box: box_gain · Σ w (1 − IoU) / normalizer.
        cls: class_gain · (the classification loss of all anchors and classes) / normalizer.
        dfl: dfl_gain · Σ w (mean over the 4 sides of DFL) / normalizer; with num_bins=1 of L1.
        assignment: which anchor answers for which object, and the scores that are the weights w.
    """

    total: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    assignment: Assignment


class _Head(NamedTuple):
    """The outputs of a head, all levels in one tensor."""

    box_logits: Tensor  # (B, 4, K, A), or distances (B, 4, A)
    class_logits: Tensor  # (B, C, A)
    points: Tensor
    stride: Tensor
    image_size: Sequence[float] | None


class DetectionLoss(nn.Module):
    """The training loss of an anchor-free detector with task-aligned assignment.

        boxes      = decode_boxes(box logits)                                  no gradient
        assignment = task_aligned_assign(class logits, boxes, objects)         no gradient
        cls        = class_gain · class_loss(class logits, assignment)
        box, dfl   = box_gain, dfl_gain · box_loss(box logits, objects' boxes, assignment)
        total      = box + cls + dfl

    With the default settings these are the losses of YOLOv8 and YOLO11, not multiplied by the
    number of images.

    Args:
        num_classes: C, at least 1.
        num_bins: K, the bins of each side's distribution; 1 for a head that predicts distances
            themselves, whose dfl is the L1 loss of `distance_loss`.
        strides: pixels per cell of each level.
        box_gain: factor of the IoU loss, like the other gains a finite number of at least 0.
        class_gain: factor of the classification loss.
        dfl_gain: factor of the DFL, or of the L1 loss.
        topk: how many anchors an object claims at most; see `task_aligned_assign`.
        topk2: how many it keeps; None: all.
        alpha: the power of the class score in the assignment's metric.
        beta: the power of the overlap in the metric.
        iou: "iou", "giou", "diou" or "ciou", for the assignment and the IoU loss.
        min_side: in pixels: smaller objects are enlarged to it when candidates are looked for.
            None: the second of the strides, or the only one.
        class_kind: "bce", "varifocal" or "quality"; see `class_loss`.
        class_weight: a factor of each class, C numbers or a (C,) tensor, whose values are read
            here, once; None: 1.

    Raises:
        TypeError: for settings that are not numbers.
        ValueError: for settings out of range, and unknown words.
    """

    def __init__(
        self,
        num_classes: int,
        num_bins: int = 16,
        *,
        strides: Sequence[float] = (8, 16, 32),
        box_gain: float = 7.5,
        class_gain: float = 0.5,
        dfl_gain: float = 1.5,
        topk: int = 10,
        topk2: int | None = None,
        alpha: float = 0.5,
        beta: float = 6.0,
        iou: str = "ciou",
        min_side: float | None = None,
        class_kind: str = "bce",
        class_weight: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.strides = check_strides("DetectionLoss", strides)
        if min_side is None:
            min_side = self.strides[min(1, len(self.strides) - 1)]
        self.assigner: dict[str, Any] = {
            "topk": topk, "topk2": topk2, "alpha": alpha, "beta": beta, "iou": iou,
            "min_side": min_side,
        }  # fmt: skip
        check_settings(
            "DetectionLoss", num_classes=num_classes, num_bins=num_bins, class_kind=class_kind,
            box_gain=box_gain, class_gain=class_gain, dfl_gain=dfl_gain, **self.assigner,
        )  # fmt: skip
        self.num_classes, self.num_bins = num_classes, num_bins
        self.gains = (float(box_gain), float(class_gain), float(dfl_gain))
        self.iou, self.class_kind = iou, class_kind
        self.class_weight = check_class_weight("DetectionLoss", class_weight, num_classes)

    def forward(
        self,
        box_logits: Tensor | Sequence[Tensor],
        class_logits: Tensor | Sequence[Tensor],
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_image: Tensor,
        *,
        anchor_points: Tensor | None = None,
        stride: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        image_size: Sequence[float] | None = None,
    ) -> DetectionLosses:
        """The losses of a batch.

        Args:
            box_logits: raw head outputs, (B, 4K, A), or one map (B, 4K, H, W) of each level; with
                K = 1 distances in cells. Channels are ordered by side (left, top, right, bottom),
                then by bin. Read in place; maps are joined in one copy.
            class_logits: raw class scores, (B, C, A), or one map (B, C, H, W) of each level.
            gt_boxes: (N, 4) as xyxy in pixels: the boxes of all objects of the batch.
            gt_labels: (N,) int32 or int64, the class of each object.
            gt_image: (N,) int32 or int64, the index of each object's image, in any order.
            anchor_points: (A, 2) as (x, y) in cells, with (B, 4K, A) only; see `make_anchors`.
            stride: (A,) or (A, 1), pixels per cell, with (B, 4K, A) only.
            normalizer: divides all three losses: a float or a 0-dim tensor, used as given, such as
                the mean over the processes of a distributed training. None: the sum of the
                assignment's scores, at least 1.
            image_size: (height, width) in pixels; for num_bins=1 only, where no maps tell it.

        Returns:
            (total, box, cls, dfl, assignment), see `DetectionLosses`; losses 0-dim, gains applied,
            fp64 for fp64 logits, else fp32, whatever autocast says. Gradients flow to both logits;
            they can be differentiated again. Objects that `task_aligned_assign` ignores do not
            matter. Without objects box and dfl are 0, and cls is that of the background.

        Raises:
            TypeError: for tensors of the wrong dtype.
            ValueError: for shapes that do not fit each other or the settings.
        """
        head = self._head(box_logits, class_logits, anchor_points, stride, image_size)
        check_other("DetectionLoss", "gt_boxes", gt_boxes, head.class_logits)
        assigned = task_aligned_assign(
            head.class_logits, self._boxes(head), head.points, head.stride, gt_boxes, gt_labels,
            gt_image, dim=1, **self.assigner,
        )  # fmt: skip
        if normalizer is None:
            normalizer = assigned.score_sum.clamp(min=1)
        cls = class_loss(
            head.class_logits, assigned.matched, assigned.score, gt_labels, normalizer, dim=1,
            kind=self.class_kind, class_weight=self._weight(head.class_logits),
        )  # fmt: skip
        box, dfl = self._box_losses(head, gt_boxes, assigned, normalizer)
        losses = torch.stack((box, cls, dfl))
        losses = losses * _numbers(self.gains, losses.dtype, losses.device)
        box, cls, dfl = losses.unbind()
        return DetectionLosses(losses.sum(), box, cls, dfl, assigned)

    def _head(
        self,
        box_logits: Tensor | Sequence[Tensor],
        class_logits: Tensor | Sequence[Tensor],
        points: Tensor | None,
        stride: Tensor | None,
        image_size: Sequence[float] | None,
    ) -> _Head:
        channels = {"box_logits": 4 * self.num_bins, "class_logits": self.num_classes}
        if isinstance(box_logits, Tensor):
            points, stride = check_outputs(box_logits, class_logits, points, stride, channels)
        else:
            sizes = check_maps(box_logits, class_logits, points, stride, channels, self.strides)
            points, stride = _anchors(sizes, self.strides, box_logits[0].device)
            (height, width), first = sizes[0], self.strides[0]
            image_size = image_size or (height * first, width * first)
            box_logits = torch.cat([level.flatten(2) for level in box_logits], 2)
            class_logits = torch.cat([level.flatten(2) for level in class_logits], 2)
        assert isinstance(box_logits, Tensor)
        assert isinstance(class_logits, Tensor)
        if self.num_bins > 1:
            box_logits = box_logits.unflatten(1, (4, self.num_bins))
        return _Head(cast(Tensor, box_logits), class_logits, points, stride, image_size)

    def _boxes(self, head: _Head) -> Tensor:
        """(B, 4, A) in pixels, without a gradient."""
        box_logits = head.box_logits.detach()
        if self.num_bins > 1:
            return decode_boxes(box_logits, head.points, head.stride, dim=2)
        distances = box_logits.mT.to(compute_dtype(box_logits.dtype))
        boxes = dist2bbox(distances, head.points.to(distances.dtype))
        return (boxes * column(head.stride)).mT

    def _box_losses(
        self, head: _Head, gt_boxes: Tensor, assigned: Assignment, normalizer: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        if self.num_bins > 1:
            return box_loss(
                head.box_logits, head.points, gt_boxes, assigned.score, normalizer, dim=2,
                matched=assigned.matched, stride=head.stride, iou=self.iou,
            )  # fmt: skip
        if head.image_size is None:
            raise ValueError(
                "DetectionLoss: image_size is missing; with num_bins=1 the L1 loss is taken in "
                "fractions of the image. Pass image_size=(height, width) in pixels."
            )
        return distance_loss(
            head.box_logits, head.points, gt_boxes, assigned.score, normalizer, dim=1,
            matched=assigned.matched, stride=head.stride, image_size=head.image_size, iou=self.iou,
        )  # fmt: skip

    def _weight(self, class_logits: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        return _numbers(self.class_weight, compute_dtype(class_logits.dtype), class_logits.device)

    def extra_repr(self) -> str:
        """The settings."""
        settings = {
            "num_classes": self.num_classes, "num_bins": self.num_bins, "strides": self.strides,
            "gains": self.gains, "class_kind": self.class_kind, **self.assigner,
        }  # fmt: skip
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _is_seen() -> bool:
    """Whether tensors belong to whoever observes or compiles the call, and cannot be kept."""
    return torch.compiler.is_compiling() or is_observed()


def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if _is_seen():
        return torch.tensor(values, dtype=dtype, device=device)
    return positions.cached(values, dtype, device)


def _anchors(
    sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Anchor points and strides of feature levels, made once for the levels of later calls."""
    if _is_seen():
        return make_anchors(sizes, strides, device=device)
    return _cached_anchors(sizes, strides, device)


@functools.lru_cache(maxsize=32)
def _cached_anchors(
    sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    words = "the grid of anchor points", "pass anchor_points and stride"
    make = functools.partial(make_anchors, sizes, strides, device=device)
    return positions.outside_modes(make, device, words)
