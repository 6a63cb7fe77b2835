"""The box path of a training step, and the loss of Ultralytics' own, as studies of the bench.

Both are steps: a forward to a loss, and a backward to the head's output. Beside the times stand the
kernels of a step, the bytes of the tensors that it makes, and those that the graph keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dflkern

from .. import reference
from . import gate
from .cases import MARGIN
from .contenders import OURS, ultralytics_class
from .counts import count_kernels, saved_bytes
from .timing import Context, Effort, Work, measure

ULTRALYTICS = "Ultralytics"
TENSOR_BYTES = "bytes of all tensors that a step allocates, by torch.profiler"
BINS, CLASSES, FOREGROUND = 16, 80, 100
LEVELS, STRIDES = ((80, 80), (40, 40), (20, 20)), (8, 16, 32)
GAINS = (7.5, 1.5)  # of the IoU loss and of DFL, Ultralytics' own
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BoxStep:
    """Decode of all anchors for the assigner, IoU and DFL of the foreground, backward.

    Attributes:
        images: in the batch.
        layout: "rows" (B, A, 4K), as Ultralytics' loss has it, or "columns", the head's (B, 4K, A).
    """

    images: int
    layout: str

    @property
    def name(self) -> str:
        """Such as rows-16x8400."""
        return f"{self.layout}-{self.images}x{sum(h * w for h, w in LEVELS)}"


BOX_STEPS = (BoxStep(16, "rows"), BoxStep(1, "rows"), BoxStep(16, "columns"))
MAIN = BOX_STEPS[0].name


@dataclass(frozen=True)
class BoxInputs:
    """A head's output, and what an assigner made of 100 objects' worth of anchors an image."""

    leaf: Tensor
    anchor_points: Tensor
    stride: Tensor
    target_boxes: Tensor
    scores: Tensor
    foreground: Tensor

    @property
    def normalizer(self) -> Tensor:
        """The sum of the scores, at least 1."""
        return self.scores.sum().clamp(min=1)


def make_inputs(step: BoxStep, device: str) -> BoxInputs:
    """Random logits, foreground, boxes around their anchors and class scores."""
    generator = torch.Generator().manual_seed(0)
    points, stride = dflkern.make_anchors(LEVELS, STRIDES)
    anchors = len(points)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    order = random(step.images, anchors).argsort(-1)
    foreground = order < FOREGROUND
    reach = random(2, step.images, anchors, 2) * (BINS / 2) + 0.5
    boxes = torch.cat((points - reach[0], points + reach[1]), -1)
    scores = random(step.images, anchors, CLASSES) * (random(step.images, anchors, CLASSES) < 0.05)
    scores[..., 0] += 0.1
    scores *= foreground[..., None]
    shape = (anchors, 4 * BINS) if step.layout == "rows" else (4 * BINS, anchors)
    leaf = torch.randn(step.images, *shape, generator=generator) * 2
    tensors = (leaf, points, stride, boxes, scores, foreground)
    return BoxInputs(*(tensor.to(device) for tensor in tensors))


def ours(step: BoxStep, of: BoxInputs) -> Forward:
    """The two calls of dflkern."""
    normalizer, anchors = of.normalizer, len(of.anchor_points)

    def forward(leaf: Tensor) -> Tensor:
        rows = step.layout == "rows"
        shape = (step.images, anchors, 4, BINS) if rows else (step.images, 4, BINS, anchors)
        logits, dim = leaf.view(shape), 3 if rows else 2
        with torch.no_grad():
            dflkern.decode_boxes(logits, of.anchor_points, dim=dim)
        losses = dflkern.box_loss(
            logits, of.anchor_points, of.target_boxes, of.scores, normalizer, dim=dim,
            foreground=of.foreground, margin=MARGIN,
        )  # fmt: skip
        return losses[0] * GAINS[0] + losses[1] * GAINS[1]

    return forward


def upstream(step: BoxStep, of: BoxInputs) -> Forward | None:
    """Ultralytics' bbox_decode and BboxLoss; None if that is not installed."""
    loss_class = ultralytics_class("utils.loss", "BboxLoss")
    detection = ultralytics_class("utils.loss", "v8DetectionLoss")
    if loss_class is None or detection is None:
        return None
    criterion = loss_class(BINS).to(of.leaf.device)
    owner = detection.__new__(detection)
    owner.use_dfl = True
    owner.proj = torch.arange(BINS, dtype=torch.float32, device=of.leaf.device)
    normalizer, size = of.normalizer, torch.tensor([640.0, 640.0], device=of.leaf.device)

    def forward(leaf: Tensor) -> Tensor:
        rows = leaf if step.layout == "rows" else leaf.permute(0, 2, 1).contiguous()
        boxes = owner.bbox_decode(of.anchor_points, rows)
        iou_loss, dfl_loss = criterion(
            rows, boxes, of.anchor_points, of.target_boxes, of.scores, normalizer, of.foreground,
            size, of.stride,
        )  # fmt: skip
        total: Tensor = iou_loss * GAINS[0] + dfl_loss * GAINS[1]
        return total

    return forward


def _exact(step: BoxStep, of: BoxInputs, dtype: torch.dtype) -> gate.Values:
    def definition(leaf: Tensor) -> Tensor:
        if step.layout == "columns":
            leaf = leaf.permute(0, 2, 1)
        logits = leaf.unflatten(-1, (4, BINS))
        losses = reference.box_loss(
            logits, of.anchor_points, of.target_boxes, of.scores, of.normalizer, of.foreground,
            None, None, None, 3, MARGIN, "ciou", "sum",
        )  # fmt: skip
        return losses[0] * GAINS[0] + losses[1] * GAINS[1]

    return gate.evaluate(definition, of.leaf.to(dtype))


def faults(step: BoxStep, of: BoxInputs) -> list[str]:
    """Why dflkern's values are wrong; empty if they are within the budget."""
    actual = gate.evaluate(ours(step, of), of.leaf).named()
    peer, exact = (_exact(step, of, dtype).named() for dtype in (torch.float32, torch.float64))
    return [
        f"{step.name}: {name}: {fault}"
        for name in exact
        for fault in gate.budget_faults(actual[name], peer[name], exact[name])
    ]


def run_boxes(effort: Effort, device: str) -> dict[str, Any]:
    """Times, ratios and counts of every step, and why a peer was not compared."""
    found = {}
    for step in BOX_STEPS:
        of = make_inputs(step, device)
        forwards = {OURS: ours(step, of)}
        peer = upstream(step, of)
        refused: list[str] = []
        if peer is None:
            refused = ["ultralytics is not installed"]
        else:
            try:
                values = gate.evaluate(peer, of.leaf)
                refused = gate.peer_faults(values, _exact(step, of, torch.float64), of.leaf.dtype)
            except Exception as error:  # another version's signature, for example
                refused = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
            if not refused:
                forwards[ULTRALYTICS] = peer
        leaf = of.leaf.requires_grad_()
        found[step.name] = {
            **_measured({label: (each, leaf) for label, each in forwards.items()}, effort, device),
            "refused": refused,
        }
    return found


def run_ultralytics(effort: Effort, device: str) -> dict[str, Any]:
    """Ultralytics' loss of a YOLOv8n step, as it is and under the adapter's patch()."""
    if ultralytics_class("utils.loss", "v8DetectionLoss") is None:
        return {}
    from ..adapters.ultralytics import patch
    from .ultralytics_step import criterion_step

    whole, part = criterion_step("yolov8n", 16, 640, device)
    found = {}
    for name, (forward, leaf) in {"the loss": whole, "its decode, IoU and DFL": part}.items():
        sides = {OURS: (forward, leaf), ULTRALYTICS: (forward, leaf)}
        found[name] = {**_measured(sides, effort, device, {OURS: patch}), "refused": []}
    return found


def _measured(
    sides: dict[str, tuple[Forward, Tensor]],
    effort: Effort,
    device: str,
    contexts: dict[str, Context] | None = None,
) -> dict[str, Any]:
    works = []
    for label, (forward, leaf) in sides.items():
        context = (contexts or {}).get(label, contextlib.nullcontext)

        def step(forward: Forward = forward, leaf: Tensor = leaf) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(leaf), leaf)

        works.append(Work(label, step, context=context))
    found: dict[str, Any] = {"times": measure(works, effort, device)}
    found["kernels"] = {work.label: count_kernels(work, device) for work in works}
    found["tensor_bytes"] = {work.label: tensor_bytes(work, device) for work in works}
    found["saved"] = {}
    for work, (forward, leaf) in zip(works, sides.values(), strict=True):
        with work.context():
            found["saved"][work.label] = saved_bytes(forward, leaf)
    times = found["times"]
    if len(times) > 1:
        found["ratio"] = times[ULTRALYTICS]["minimum"] / times[OURS]["minimum"]
    return found


def tensor_bytes(work: Work, device: str) -> int:
    """The bytes of all tensors that one call allocates."""
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with work.context(), profile(activities=activities, profile_memory=True) as profiler:
        work.call()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
