"""`watch`: record what a running training gives to its DFL losses, and examine it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import Project
from ..modules import BoxLoss, DFLoss
from .calls import Call, Observer, harmless
from .examination import examine
from .findings import Finding, Severity
from .records import GradientNorms, Samples, Series
from .report import Report
from .samples import rows_of_call
from .signatures import losses_in


def watch(
    watched: object = None,
    *,
    num_bins: int | None = None,
    stride: Tensor | float | None = None,
    project: Project = None,
    margin: float | None = None,
    steps: int = 100,
) -> Watch:
    """Watch the DFL losses of a training for a few steps, as a context manager.

        with dflkern.doctor.watch(model) as w:
            for batch in itertools.islice(loader, 50):
                train_step(batch)
        print(w.report)

    It sees every call of a module that takes DFL's arguments (`dflkern.DFLoss`, `dflkern.BoxLoss`,
    Ultralytics' `BboxLoss` and `DFLoss`, mmdet's `DistributionFocalLoss`) in this thread, and the
    gradients of the model's parameters. Of a loss within a loss the outer one is taken, or the
    inner one where the outer one's arguments cannot be read, as with rotated boxes. It keeps an
    even sample of the first steps; memory stays bounded, no random number is drawn, and the
    training computes exactly what it would without. Steps that raise are seen as well; the watch
    itself never raises in a step. A loss called as a function is seen by `Watch.record`.

    Args:
        watched: a loss module, a criterion, or a model; with none of those losses in it (yet), all
            that are called in the block. None: all, without gradients.
        num_bins: K that the head should have; None: as many as the logits show.
        stride: pixels per cell of each anchor, (A,) or (A, 1), where the loss is not given it.
        project: W; None: the module's, else 0, 1, …, K − 1.
        margin: None: the module's, else 0.01.
        steps: how many calls are kept; together at most 25 600 anchors.

    Returns:
        The `Watch`; its `report` is there during and after the block.
    """
    return Watch(watched, num_bins, stride, project, margin, steps)


class Watch:
    """What `watch` returns. `report` holds the findings so far."""

    def __init__(
        self,
        watched: object,
        num_bins: int | None,
        stride: Tensor | float | None,
        project: Project,
        margin: float | None,
        steps: int,
    ) -> None:
        self._watched = watched
        self._num_bins, self._stride, self._project = num_bins, stride, project
        self._margin = margin
        self._samples, self._norms = Samples(steps), GradientNorms(steps)
        self._losses, self._normalizers = Series(), Series()
        self._readable: set[type] = set()
        self._unread: dict[str, int] = {}  # calls by the class's name
        self._unread_losses = Series()
        self._columns: dict[str, int] = {}
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> Watch:
        if self._undo is not None:
            raise RuntimeError("watch: this watch is active already; call watch() for another.")
        undo = contextlib.ExitStack()
        try:
            Observer(self, losses_in(self._watched), undo)
            if isinstance(self._watched, nn.Module):
                for name, parameter in self._watched.named_parameters():
                    lazy = nn.parameter.is_lazy(parameter)
                    if not lazy and parameter.requires_grad and parameter.is_leaf:
                        hook = self._norm_hook(name)
                        undo.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        except BaseException:
            undo.close()
            raise
        self._undo = undo
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()
        self._norms.end_pass()

    def record(
        self,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        boxes: Tensor | None = None,
        anchor_points: Tensor | None = None,
        stride: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        loss: Tensor | float | None = None,
    ) -> None:
        """Show the watch one step of a loss that is no module, over the foreground only.

        Args:
            logits: (N, 4, K).
            targets: (N, 4), as they go into the loss.
            boxes: (N, 4) as xyxy in pixels.
            anchor_points: (N, 2) in cells.
            stride: (N,) or (N, 1).
            weight: (N,).
            normalizer: what this step divides by.
            loss: the step's loss, or the losses of its anchors.
        """
        given = {
            "logits": logits, "targets": targets, "boxes": boxes,
            "anchor_points": anchor_points, "stride": stride, "weight": weight,
        }  # fmt: skip
        rows = {name: value for name, value in given.items() if value is not None}
        counts = {name: len(value) for name, value in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"record: all need a row for each foreground anchor; got {counts}.")
        self._normalizers.add(normalizer)
        self._losses.add(loss)
        if rows and not self._samples.full():
            self._samples.add(self._samples.thin(rows))

    @property
    def report(self) -> Report:
        """The findings so far.

        Raises:
            RuntimeError: if no DFL loss and no gradient was seen.
        """
        evidence: dict[str, Any] = self._samples.rows()
        unread = None if evidence else self._without_targets()
        losses = self._unread_losses if unread and self._unread else self._losses
        series = {"losses": losses.values(), "normalizer": self._normalizers.values()}
        evidence |= {name: values for name, values in series.items() if values is not None}
        if norms := self._norms.by_layer():
            evidence["gradients"] = norms
        if not evidence:
            raise RuntimeError(
                "watch: no DFL loss was called in the block. Pass the model or its criterion, and "
                "run at least one training step; for a loss that is called as a function, call "
                "record(logits=..., targets=..., ...) in the step."
            )
        bins = evidence["logits"].shape[-1] if "logits" in evidence else None
        evidence |= {"num_bins": self._num_bins or bins, "project": self._project}
        evidence["margin"] = 0.01 if self._margin is None else self._margin
        report = examine(**evidence)
        return replace(report, findings=(unread, *report.findings)) if unread else report

    def _without_targets(self) -> Finding:
        calls = ", ".join(f"{count} of {name}" for name, count in self._unread.items())
        return Finding(
            "no-targets",
            Severity.WARNING,
            "No targets were seen, so they were not examined.",
            f"calls whose arguments could not be read: {calls or 'none'}",
            "Boxes other than x1, y1, x2, y2, batches without foreground, or a head without bins "
            "(reg_max: 1)."
            if calls
            else "The loss is a function, or was not called in the block.",
            "w.record(logits=logits, targets=targets, loss=loss)  # in the step, over the "
            "foreground",
        )

    # --- what the calls of losses are shown to --------------------------------------------------

    def read(self, call: Call, given: dict[str, Any]) -> None:
        """Take a sample of a loss's arguments, by role."""
        module: Any = call.module
        ours = isinstance(module, (DFLoss, BoxLoss))
        if ours and self._margin is None:
            self._margin = module.margin
        if ours and self._project is None:
            self._project = module.project
        call.normalizer = given.get("normalizer")
        if not self._samples.full():
            with torch.no_grad():
                rows = rows_of_call(given, module.dim if ours else -1, self._stride)
                if rows:
                    self._readable.add(type(module))
                    call.samples.append(self._samples.thin(rows))

    def keep(self, call: Call, outer: Call | None, output: object) -> None:
        """Keep what was read of a loss, or leave it to the loss that it is part of."""
        if isinstance(output, Sequence) and len(output) > 1:
            output = output[1]  # (IoU loss, DFL loss)
        if isinstance(output, Tensor) and output.numel():
            call.loss = output.detach().float().mean()
        if not call.samples:
            call.samples = [rows for inner in call.inner for rows in inner.samples]
        if outer is not None:
            outer.inner.append(call)
            return
        for rows in call.samples:
            self._samples.add(rows)
        if self._readable & {type(each.module) for each in (call, *call.inner)}:
            self._normalizers.add(call.normalizer)
            self._losses.add(call.loss)
        else:
            name = type(call.module).__name__
            self._unread[name] = self._unread.get(name, 0) + 1
            self._unread_losses.add(call.loss)

    # --- gradients ------------------------------------------------------------------------------

    def _norm_hook(self, name: str) -> Callable[[Tensor], None]:
        if name not in self._columns:
            self._columns[name] = self._norms.name(name)
        column = self._columns[name]

        @harmless
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._norms.add(column, parameter.grad)

        return hook
