"""The functions of `dflkern` as modules, for code that is built from modules.

A project is checked once, here, and kept as numbers, so that `module.half()` cannot round it.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .checks import (
    IOU_KINDS,
    REDUCTIONS,
    Project,
    check_choice,
    check_dim,
    check_margin,
    check_positions,
)
from .detection.checks import BOX_REDUCTIONS


def _positions(op: str, project: Project, margin: float) -> tuple[float, ...] | None:
    check_margin(op, margin, bounded=project is None)
    if project is None:
        return None
    values = project.tolist() if isinstance(project, Tensor) else project
    return tuple(check_positions(op, values, margin))


def _listed(**given: object) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)


class DFLoss(nn.Module):
    """`dfl_loss` as a module, with the same defaults and the same shapes, dtypes and errors.

    Args:
        dim: the axis of the bins.
        project: the position of each bin, or None; the values of a tensor are read here, once.
        margin: how far below the last bin targets are clamped.
        reduction: "none", "sum", "mean" or "side_mean".

    Raises:
        ValueError: for a project that does not increase, or a bad margin or reduction.
    """

    def __init__(
        self,
        *,
        dim: int = -1,
        project: Project = None,
        margin: float = 0.01,
        reduction: str = "none",
    ) -> None:
        super().__init__()
        check_dim("DFLoss", dim)
        check_choice("DFLoss", "reduction", reduction, REDUCTIONS)
        self.dim, self.margin, self.reduction = dim, margin, reduction
        self.project = _positions("DFLoss", project, margin)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """`dfl_loss(logits, target, weight=weight, normalizer=normalizer)`."""
        return functional.dfl_loss(
            logits, target, dim=self.dim, project=self.project, margin=self.margin,
            weight=weight, reduction=self.reduction, normalizer=normalizer,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return _listed(
            dim=self.dim, project=self.project, margin=self.margin, reduction=self.reduction
        )


class DFLDecode(nn.Module):
    """`dfl_decode` as a module, with the same defaults and the same shapes, dtypes and errors.

    Args:
        dim: the axis of the bins.
        project: the position of each bin, or None; the values of a tensor are read here, once.

    Raises:
        ValueError: for a project that does not increase.
    """

    def __init__(self, *, dim: int = -1, project: Project = None) -> None:
        super().__init__()
        check_dim("DFLDecode", dim)
        self.dim = dim
        self.project = _positions("DFLDecode", project, 0.0)

    def forward(self, logits: Tensor) -> Tensor:
        """`dfl_decode(logits)`."""
        return functional.dfl_decode(logits, dim=self.dim, project=self.project)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return _listed(dim=self.dim, project=self.project)


class BoxLoss(nn.Module):
    """`box_loss` as a module, with the same defaults and the same shapes, dtypes and errors.

    Args:
        dim: the axis of the bins, -1 or 2.
        project: the position of each bin, or None; the values of a tensor are read here, once.
        margin: how far below the last bin targets are clamped.
        iou: "iou", "giou", "diou" or "ciou".
        reduction: "sum" or "none".

    Raises:
        ValueError: for a project that does not increase, or a bad margin, iou or reduction.
    """

    def __init__(
        self,
        *,
        dim: int = -1,
        project: Project = None,
        margin: float = 0.01,
        iou: str = "ciou",
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_dim("BoxLoss", dim, -1, 2, 3, -2)
        check_choice("BoxLoss", "iou", iou, IOU_KINDS)
        check_choice("BoxLoss", "reduction", reduction, BOX_REDUCTIONS)
        self.dim, self.margin, self.iou, self.reduction = dim, margin, iou, reduction
        self.project = _positions("BoxLoss", project, margin)

    def forward(
        self,
        logits: Tensor,
        anchor_points: Tensor,
        target_boxes: Tensor,
        weight: Tensor,
        normalizer: Tensor | float | None = None,
        foreground: Tensor | None = None,
        *,
        matched: Tensor | None = None,
        stride: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`box_loss(logits, …, matched=matched, stride=stride)`: (iou_loss, dfl_loss)."""
        return functional.box_loss(
            logits, anchor_points, target_boxes, weight, normalizer, dim=self.dim,
            foreground=foreground, matched=matched, stride=stride, project=self.project,
            margin=self.margin, iou=self.iou, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return _listed(
            dim=self.dim, project=self.project, margin=self.margin, iou=self.iou,
            reduction=self.reduction,
        )  # fmt: skip
