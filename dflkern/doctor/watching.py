"""`watch`: look over the shoulder of a running training."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..checks import Project
from ..interception import Function, intercept
from ..modules import BoxLoss, DFLoss
from .examination import examine
from .findings import Report
from .samples import kind, rows_of_call, thinned
from .signatures import arguments, losses_in, roles

ROWS = 256  # anchors kept of a call
MAX_NUMBERS = 10_000  # losses and normalizers kept


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
    Ultralytics' `BboxLoss` and `DFLoss`, mmdet's `DistributionFocalLoss`) and the gradients of the
    model's parameters. It keeps an even sample of the first steps; memory stays bounded, no random
    number is drawn, and the training computes exactly what it would without. A loss called as a
    function is seen by `Watch.record`.

    Args:
        watched: a loss module, a criterion, or a model; with none of those losses in it (yet), all
            that are called in the block. None: all, without gradients.
        num_bins: K that the head should have; None: as many as the logits show.
        stride: pixels per cell of each anchor, (A,) or (A, 1), where the loss is not given it.
        project: W; None: the module's, else 0, 1, …, K − 1.
        margin: None: the module's, else 0.01.
        steps: how many calls are kept.

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
        self._margin, self._steps = margin, steps
        self._rows: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._normalizers: list[Tensor] = []
        self._norms: dict[str, list[Tensor]] = {}
        self._current: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._only: set[int] = set()
        self._inside: list[nn.Module] = []
        self._thread = 0

    def __enter__(self) -> Watch:
        found = list(losses_in(self._watched))
        self._only = {id(module) for module in found}
        self._thread = threading.get_ident()
        self._handles = [
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        for owner in {type(module) for module in found if not roles(type(module).forward)}:
            self._replace_call(owner)
        if isinstance(self._watched, nn.Module):
            for name, parameter in self._watched.named_parameters():
                if parameter.requires_grad:
                    self._handles.append(
                        parameter.register_post_accumulate_grad_hook(self._norm_hook(name))
                    )
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._close_step()

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
        with torch.no_grad():
            self._note(self._normalizers, normalizer)
            self._note(self._losses, loss)
            given = {
                "logits": logits, "targets": targets, "boxes": boxes,
                "anchor_points": anchor_points, "stride": stride, "weight": weight,
            }  # fmt: skip
            rows = {name: value for name, value in given.items() if value is not None}
            if rows and len(self._rows) < self._steps:
                self._rows.append(thinned(rows, ROWS))

    @property
    def report(self) -> Report:
        """The findings so far.

        Raises:
            RuntimeError: if no DFL loss and no gradient was seen.
        """
        evidence = self._evidence()
        if not evidence:
            raise RuntimeError(
                "watch: no DFL loss was called in the block. Pass the model or its criterion, and "
                "run at least one training step; for a loss that is called as a function, call "
                "record(logits=..., targets=..., ...) in the step."
            )
        return examine(**evidence)

    def _evidence(self) -> dict[str, Any]:
        rows = self._rows
        evidence: dict[str, Any] = {}
        if rows:
            same = [step for step in rows if kind(step) == kind(rows[0])]
            evidence = {name: torch.cat([step[name] for step in same]) for name in same[0]}
        if self._losses:
            evidence["losses"] = torch.cat(self._losses)
        if self._normalizers:
            evidence["normalizer"] = torch.cat(self._normalizers)
        norms = {name: torch.stack(values) for name, values in self._norms.items() if values}
        if norms:
            evidence["gradients"] = {name: values.tolist() for name, values in norms.items()}
        if evidence:
            evidence |= {"num_bins": self._num_bins, "project": self._project}
            evidence["margin"] = 0.01 if self._margin is None else self._margin
        return evidence

    def _note(self, numbers: list[Tensor], value: Tensor | float | None) -> None:
        if value is not None and len(numbers) < MAX_NUMBERS:
            value = torch.as_tensor(value).detach().float()
            numbers.append(value.flatten()[:: max(1, value.numel() // ROWS)].clone())

    # --- what hooks see -------------------------------------------------------------------------

    def _counts(self, module: nn.Module) -> bool:
        mine = not self._only or id(module) in self._only
        return mine and threading.get_ident() == self._thread

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._counts(module) and roles(type(module).forward):
            self._inside.append(module)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        if not self._inside or self._inside[-1] is not module:
            return
        self._inside.pop()
        if not self._inside and output is not None:  # a loss within a loss is seen once
            self._see(module, arguments(type(module).forward, module, args, kwargs))
            self._see_loss(output)

    def _replace_call(self, owner: Any) -> None:
        """See the calls of a class that replaces `__call__`, and with it all hooks."""
        signature = owner.__call__

        def seen(call: Function, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            first = not self._inside and self._counts(module)
            if first:  # before the call: Ultralytics' DFLoss clamps the caller's targets
                self._see(module, arguments(signature, module, args, kwargs))
            output = call(module, *args, **kwargs)
            if first:
                self._see_loss(output)
            return output

        self._handles.append(intercept(owner, "__call__", seen))

    def _see(self, module: Any, call: dict[str, Any]) -> None:
        ours = isinstance(module, (DFLoss, BoxLoss))
        if ours and self._margin is None:
            self._margin = module.margin
        if ours and self._project is None:
            self._project = module.project
        with torch.no_grad():
            self._note(self._normalizers, call.get("normalizer"))
            if len(self._rows) < self._steps:
                dim = module.dim if ours else -1
                # A loss of another kind under these names must not stop the training.
                with contextlib.suppress(AttributeError, LookupError, RuntimeError, TypeError):
                    if rows := rows_of_call(call, dim, self._stride, ROWS):
                        self._rows.append(rows)

    def _see_loss(self, output: object) -> None:
        if isinstance(output, Sequence) and len(output) > 1:
            output = output[1]  # (IoU loss, DFL loss)
        if isinstance(output, Tensor) and output.numel():
            self._note(self._losses, output.detach().float().mean())

    # --- gradients ------------------------------------------------------------------------------

    def _norm_hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None or len(self._norms.get("", ())) >= self._steps:
                return
            if name in self._current:
                self._close_step()
            with torch.no_grad():
                self._current[name] = parameter.grad.detach().float().norm()

        return hook

    def _close_step(self) -> None:
        """Keep the norms of a backward pass: of each layer, in its order, and of all together."""
        norms, self._current = self._current, {}
        if not norms:
            return
        self._norms.setdefault("", []).append(torch.stack(list(norms.values())).norm())
        for name, norm in norms.items():
            if name.endswith("weight"):
                self._norms.setdefault(name, []).append(norm)
