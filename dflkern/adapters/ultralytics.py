"""Ultralytics (YOLOv8, 9, 10, 11, 12, …) on dflkern.

    import dflkern.adapters.ultralytics
    dflkern.adapters.ultralytics.patch()

and everything after that, `YOLO(...).train(...)` included, uses it.

Replaced, on the classes:

| function | by |
| --- | --- |
| `v8DetectionLoss.bbox_decode` | `dflkern.decode_boxes` |
| `BboxLoss.forward` (detect, segment, pose) | `dflkern.box_loss`, from the logits alone |
| `v8OBBLoss.bbox_decode` | `dflkern.dfl_decode`, then Ultralytics' rotation in fp32 |
| `DFLoss.__call__` (OBB, whose targets and ProbIoU stay Ultralytics') | `dflkern.dfl_loss` |
| `DFL.forward`, the decode at inference | `dflkern.dfl_decode` |
| `OBB.decode_bboxes`, the rotation at inference | Ultralytics' own, with the angle in fp32 |

What is different afterwards: boxes and losses are fp32 under autocast too, and `DFLoss` no longer
clamps its caller's target in place. What is not: the clamp (0.01 below the last bin), the weights,
the normalizer, CIoU, the assigner, and every checkpoint.

Training on several GPUs starts processes of its own, which import the trainer's module: call
`patch()` there, beside a subclass of Ultralytics' trainer, and pass that as `trainer=`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import dflkern

from ..interception import Function
from . import _ultralytics_known as known
from ._patch import (
    Patch,
    Replacement,
    Replacements,
    Trial,
    check_own,
    check_same,
    lock,
    replacement,
)

VERSIONS = ("8.3", "8.4")
TOLERANCE = 1e-4  # of the self-check, in fp32, where CIoU's gradient cancels some digits

_BOX_LOSS = (
    "self", "pred_dist", "pred_bboxes", "anchor_points", "target_bboxes", "target_scores",
    "target_scores_sum", "fg_mask",
)  # fmt: skip
_current: Replacements | None = None


def patch() -> Patch:
    """Replace Ultralytics' DFL code by dflkern's, in this process.

    Before anything is replaced, the version and the parameters of each function are checked, and
    each function is compared with its replacement on 64 random anchors, values and gradients.

    Whatever has been changed about a model or its criterion runs Ultralytics' own code, and a
    warning says so, once for each reason: another `dfl_loss`, other positions in `proj`, a subclass
    or a hook that changes the boxes between decode and loss, a replaced `bbox_iou`, hooks on the
    DFL module's convolution or another module in its place, `reg_max: 1` (YOLO26, which has no
    DFL). Changes through `.data`, which PyTorch does not record, are not noticed on boxes, nor in
    `proj` on a GPU.

    Calls that are traced or exported (ONNX, TorchScript, torch.export, torch.fx) run Ultralytics'
    own code without a warning. `BboxLoss` also does under torch.compile, and on inference tensors,
    whose changes PyTorch does not record; its boxes and DFL are dflkern's.

    Returns:
        A handle: `replaced` names the functions, `undo()` gives it up, and `with patch():` does so
        at the end of the block. Each call returns its own; the functions are put back when all
        handles have been undone, in any order.

    Raises:
        ImportError: without Ultralytics.
        RuntimeError: for a version or a function that is not known, or one that computes something
            else. Nothing is replaced then.
    """
    global _current
    try:
        version = importlib.import_module("ultralytics").__version__
    except ImportError as error:
        raise ImportError(
            "dflkern.adapters.ultralytics needs Ultralytics: pip install ultralytics."
        ) from error
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise RuntimeError(
            f"dflkern knows Ultralytics {' and '.join(VERSIONS)}, and found {version}. Nothing was "
            "replaced; install one of these versions, or call dflkern's functions from your own "
            "loss."
        )
    framework = f"Ultralytics {version}"
    with lock:
        if _current is None or not _current.in_use:
            replacements = _replacements(framework)
            check_same(framework, replacements, _trials, TOLERANCE)
            check_own(framework, "ultralytics", replacements)
            _current = Replacements(framework, replacements)
        return _current.handle()


def _replacements(framework: str) -> list[Replacement]:
    loss = importlib.import_module("ultralytics.utils.loss")
    block = importlib.import_module("ultralytics.nn.modules.block")
    head = importlib.import_module("ultralytics.nn.modules.head")
    decode, rotate = ("self", "anchor_points", "pred_dist"), ("self", "bboxes", "anchors")
    box_losses = [_BOX_LOSS, (*_BOX_LOSS, "imgsz", "stride")]
    boxes = functools.partial(known.unknown_boxes, loss.DFLoss)
    table: list[tuple[type, str, list[tuple[str, ...]], Function, Any]] = [
        (loss.DFLoss, "__call__", [("self", "pred_dist", "target")], _dfl_loss, known.unknown_rows),
        (loss.BboxLoss, "forward", box_losses, _box_loss, boxes),
        (loss.v8DetectionLoss, "bbox_decode", [decode], _decode_boxes, known.unknown_logits),
        (
            loss.v8OBBLoss, "bbox_decode", [(*decode, "pred_angle")], _decode_rotated_boxes,
            known.unknown_logits,
        ),
        (block.DFL, "forward", [("self", "x")], _decode_sides, known.unknown_sides),
        (head.OBB, "decode_bboxes", [rotate, (*rotate, "angle")], _rotate, known.unknown_angle),
    ]  # fmt: skip
    return [replacement(framework, *each) for each in table]


def _dfl_loss(original: Function, self: Any, pred_dist: Tensor, target: Tensor) -> Tensor:
    """Rows (4N, K) and targets (N, 4) to (N, 1)."""
    loss = dflkern.dfl_loss(pred_dist.unflatten(0, target.shape), target, reduction="side_mean")
    return loss.unsqueeze(-1)


def _box_loss(
    original: Function,
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
) -> Any:
    """The gradient that reached pred_dist through pred_bboxes now comes from box_loss itself."""
    return dflkern.box_loss(
        _sides(pred_dist),
        anchor_points,
        target_bboxes,
        target_scores,
        target_scores_sum,
        foreground=fg_mask.bool(),  # the assigner returns floats for a batch without objects
    )


_counted: Any = WeakTensorKeyDictionary()


def _project(proj: Tensor) -> Tensor | None:
    """None for 0, 1, 2, …; a GPU is asked once for each tensor, and after a change."""
    if torch.compiler.is_compiling():
        return proj
    if proj.device.type == "cpu":
        return None if proj.tolist() == [*range(len(proj))] else proj
    state = proj.data_ptr(), 0 if proj.is_inference() else proj._version
    known = _counted.get(proj)
    if known is None or known[0] != state:
        known = _counted[proj] = state, proj.tolist() == [*range(len(proj))]
    return None if known[1] else proj


def _decode_boxes(
    original: Function, self: Any, anchor_points: Tensor, pred_dist: Tensor
) -> Tensor:
    """Boxes (B, A, 4), whose origin is noted for the loss."""
    project = _project(self.proj)
    boxes = dflkern.decode_boxes(_sides(pred_dist), anchor_points, project=project)
    known.note_origin(boxes, pred_dist, anchor_points, counting=project is None)
    return boxes


def _decode_rotated_boxes(
    original: Function, self: Any, anchor_points: Tensor, pred_dist: Tensor, pred_angle: Tensor
) -> Tensor:
    """Boxes (B, A, 5)."""
    distances = dflkern.dfl_decode(_sides(pred_dist), project=_project(self.proj))
    angle = _as_wide_as(distances, pred_angle)
    boxes: Tensor = original(SimpleNamespace(use_dfl=False), anchor_points, distances, angle)
    return boxes


def _sides(pred_dist: Tensor) -> Tensor:
    """(B, A, 4K) as (B, A, 4, K), without a copy whatever the strides."""
    logits: Tensor = pred_dist.unflatten(-1, (4, -1))
    return logits


def _as_wide_as(distances: Tensor, angle: Tensor) -> Tensor:
    """The angle, so that a rotation of fp32 distances is fp32 too."""
    return angle.to(torch.promote_types(distances.dtype, angle.dtype))


def _decode_sides(original: Function, self: Any, x: Tensor) -> Tensor:
    """A head's (B, 4K, A) to (B, 4, A), read in place."""
    weight = self.conv.weight  # the positions of the bins
    logits = x.unflatten(1, (4, self.c1))
    return dflkern.dfl_decode(logits, dim=2, project=weight.detach().flatten())


def _rotate(
    original: Function, self: Any, bboxes: Tensor, anchors: Tensor, angle: Tensor | None = None
) -> Tensor:
    """Distances (B, 4, A) to boxes; Ultralytics 8.3 keeps the angle in the head."""
    if angle is not None:
        rotated: Tensor = original(self, bboxes, anchors, _as_wide_as(bboxes, angle))
    else:
        head = SimpleNamespace(angle=_as_wide_as(bboxes, self.angle))
        rotated = original(head, bboxes, anchors)
    return rotated


def _trials() -> dict[str, Trial]:
    """What the self-check runs; each returns values, then the gradient of the logits."""
    loss = importlib.import_module("ultralytics.utils.loss")
    block = importlib.import_module("ultralytics.nn.modules.block")
    bins, anchors, classes = 16, 64, 3

    def random(*shape: int, seed: int = 0) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    criterion = SimpleNamespace(use_dfl=True, proj=torch.arange(bins, dtype=torch.float32))
    points = random(anchors, 2) * 20
    spread = random(2, anchors, 4, seed=1) * 17  # some beyond the last bin
    boxes = torch.cat((points - spread[..., :2], points + spread[..., 2:]), -1)
    scores, foreground = random(2, anchors, classes, seed=2), random(2, anchors, seed=3) < 0.5
    parameters = inspect.signature(loss.BboxLoss.forward).parameters
    image = [torch.ones(2), torch.ones(anchors, 1)] if "imgsz" in parameters else []

    def logits(*shape: int) -> Tensor:
        return (random(*shape, seed=4) * 6).requires_grad_()

    def with_gradient(leaf: Tensor, *results: Tensor) -> list[Tensor]:
        total = sum((r * random(*r.shape, seed=5)).sum() for r in results)
        assert isinstance(total, Tensor)
        return [*(r.detach() for r in results), *torch.autograd.grad(total, leaf)]

    def dfl_loss(functions: Mapping[str, Function]) -> list[Tensor]:
        rows = logits(anchors, bins)
        target = random(anchors // 4, 4, seed=6) * 17 - 1
        return with_gradient(rows, functions["DFLoss.__call__"](loss.DFLoss(bins), rows, target))

    def box_loss(functions: Mapping[str, Function]) -> list[Tensor]:
        leaf = logits(2, anchors, 4 * bins)
        decoded = functions["v8DetectionLoss.bbox_decode"](criterion, points, leaf)
        results = functions["BboxLoss.forward"](
            loss.BboxLoss(bins), leaf, decoded, points, boxes, scores, scores.sum(), foreground,
            *image,
        )  # fmt: skip
        return with_gradient(leaf, decoded, *results)

    def rotated_boxes(functions: Mapping[str, Function]) -> list[Tensor]:
        leaf, angle = logits(2, anchors, 4 * bins), random(2, anchors, 1, seed=7)
        decode = functions["v8OBBLoss.bbox_decode"]
        return with_gradient(leaf, decode(criterion, points, leaf, angle))

    def decode(functions: Mapping[str, Function]) -> list[Tensor]:
        leaf = logits(2, 4 * bins, anchors)
        return with_gradient(leaf, functions["DFL.forward"](block.DFL(bins), leaf))

    return {
        "DFL": dfl_loss,
        "box loss": box_loss,
        "decode of rotated boxes": rotated_boxes,
        "decode": decode,
    }
