"""Compiled GPU kernels for boxes, run in the PTX emulator and compared with the reference."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from dflkern.gpu import plan, steps
from dflkern.gpu.offline import compile_plan, facts
from dflkern.operators.table import ALL
from emulation import MARGIN, NAMES, Outcome, buffer_of, mask_of, tensor_of
from ptxemu import PtxError, run
from support import budget_faults, positions_for

WEIGHTS = {"weights": None, "scores": 5, "80 scores": 80, "81 scores": 81, "300 scores": 300}


@dataclass(frozen=True)
class BoxCase:
    """One operator on boxes.

    Attributes:
        op: "decode_boxes", "box_loss", or a gradient of them.
        layout: "rows" (B, A, 4, K), "columns" (B, 4, K, A), "sliced columns": channels and anchors
            out of a larger head, "offset rows": not aligned.
        foreground: the share of anchors, or None for no mask.
        clustered: whether the foreground of an image is one run of neighbouring anchors.
        weight: a name of WEIGHTS.
        keep: whether the weight of each anchor is written beside the losses, and read by the
            gradient in place of class scores and mask.
        special: with NaN and infinities, in the background and beside it.
        blocks: how many blocks of the launch are run, from the first on; None: all.
    """

    op: str
    backend: str = "triton"
    arch: int = 80
    dtype: str = "fp32"
    bins: int = 16
    layout: str = "columns"
    batch: int = 2
    anchors: int = 150
    project: bool = False
    stride: bool = True
    box_format: str = "xyxy"
    iou: str = "ciou"
    foreground: float | None = 0.1
    clustered: bool = False
    weight: str = "scores"
    keep: bool = False
    weight_dtype: str = "fp32"
    special: bool = False
    blocks: int | None = None

    @property
    def classes(self):
        """Numbers that make a weight."""
        return WEIGHTS[self.weight] or 1

    def __str__(self):
        words = [self.backend, f"sm_{self.arch}", self.op, self.dtype, f"K{self.bins}"]
        words += [self.layout, f"{self.batch}x{self.anchors}"]
        if self.op.startswith("decode"):
            words += [self.box_format] + ["stride"] * self.stride
        else:
            words += [self.iou, self.weight, self.weight_dtype, f"fg{self.foreground}"]
            words += ["clustered"] * self.clustered + ["keep"] * self.keep
        words += ["project"] * self.project + ["special"] * self.special
        return "-".join(words)


def run_box_case(case):
    """Plan, compile, run, compare."""
    torch.manual_seed(0)
    logits, dim = logits_of(case)
    inputs = inputs_for(case, logits, dim)
    problem = ALL[case.op].problem({**inputs, **settings_of(case, dim)})
    aligned = logits.storage_offset() * logits.itemsize % 16 == 0
    problem = replace(problem, device=torch.device("cuda"), aligned=aligned, keep=case.keep)
    faults, costs, kernel = [], [], ""
    held, outputs, written = dict(inputs), outputs_for(case, problem, logits), {}
    for step in steps(case.op):
        launch = plan(step, problem, case.backend)
        compiled = compile_plan(launch, case.arch)
        made = dict(outputs[step])
        if step == "box_loss":
            made["partials"] = torch.empty(3, int(np.prod(launch.grid)), dtype=wide_of(logits))
        blocks = range(int(np.prod(launch.grid)))[: case.blocks]
        try:
            ran, buffers = _emulate(launch, compiled, blocks, held, made)
            _, again = _emulate(launch, compiled, blocks[::-1], held, made)
        except PtxError as error:
            return Outcome(launch.kernel, (str(error),))
        for role, empty in made.items():
            buffer = buffers[role]
            if buffer.unwritten and case.blocks is None:
                faults.append(f"{role}: {buffer.unwritten} elements unwritten")
            if buffer.written_twice:
                faults.append(f"{role}: {buffer.written_twice} elements written twice")
            if not np.array_equal(buffer.bytes, again[role].bytes):
                faults.append(f"{role}: other bits when blocks run in another order")
            held[role], written[role] = tensor_of(buffer, empty), mask_of(buffer, empty)
        costs.append((ran.counts(), facts.facts(compiled.cubin, compiled.entry)))
        kernel = kernel or launch.kernel
        if case.blocks is not None:
            break
    if not (case.blocks is not None and case.op == "box_loss"):
        faults += _differences(case, inputs, held, written, dim)
    count = int(next(iter(written.values())).sum())
    return Outcome(kernel, tuple(faults), count, *costs[0], tuple(costs[1:]))


def wide_of(logits):
    """The dtype of the arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def logits_of(case):
    """Random logits, and the axis of their bins."""
    dtype, shape = NAMES[case.dtype], (case.batch, case.anchors, 4, case.bins)

    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * 2).to(dtype)

    if case.layout == "rows":
        return random(*shape), 3
    if case.layout == "offset rows":
        return random(int(np.prod(shape)) + 1)[1:].view(shape), 3
    if case.layout == "columns":
        return random(case.batch, 4, case.bins, case.anchors), 2
    head = random(case.batch, 4 * case.bins + 3, case.anchors + 5)
    boxes = head[:, 2 : 2 + 4 * case.bins].view(case.batch, 4, case.bins, case.anchors + 5)
    return boxes[..., : case.anchors], 2


def inputs_for(case, logits, dim):
    """All tensors by role, in the dtypes that a launch gets them in."""
    wide = wide_of(logits)
    batch, anchors = case.batch, case.anchors
    positions = torch.tensor(positions_for(case.bins), dtype=wide) if case.project else None
    high = case.bins if positions is None else float(positions[-1]) + 1
    points = torch.rand(anchors, 2, dtype=wide) * 20
    if case.op.startswith("decode"):
        shape = (batch, anchors, 4) if dim == 3 else (batch, 4, anchors)
        return {
            "logits": logits,
            "anchor_points": points,
            "stride": torch.rand(anchors, dtype=wide) * 8 + 1 if case.stride else None,
            "project": positions,
            "grad_boxes": torch.randn(shape, dtype=wide),
        }
    spread = torch.rand(2, batch, anchors, 2, dtype=wide) * high
    boxes = torch.cat((points - spread[0], points + spread[1]), -1)
    classes = WEIGHTS[case.weight]
    shape = (batch, anchors) if classes is None else (batch, anchors, classes)
    weight = torch.rand(shape, dtype=torch.float64).to(NAMES[case.weight_dtype])
    weight[:, ::7] = 0
    foreground = None
    if case.foreground is not None:
        foreground = foreground_of(case)
    if case.special:
        _make_special(logits.movedim(1, 3).movedim(1, 2) if dim == 2 else logits, boxes, weight,
                      foreground)  # fmt: skip
    if case.keep and ALL[case.op].is_gradient:
        weight, foreground = anchor_weight_of(weight, foreground, wide), None
    number = torch.tensor
    return {
        "logits": logits,
        "anchor_points": points,
        "target_boxes": boxes,
        "weight": weight,
        "normalizer": number(7.5, dtype=wide),
        "foreground": foreground,
        "project": positions,
        "grad_iou": number(0.7, dtype=wide),
        "grad_dfl": number(-1.3, dtype=wide),
    }


def foreground_of(case):
    """A mask of the case's share of anchors."""
    if not case.clustered:
        return torch.rand(case.batch, case.anchors) < case.foreground
    count = round(case.foreground * case.anchors)
    first = torch.randint(case.anchors - count + 1, (case.batch, 1))
    anchor = torch.arange(case.anchors)
    return (anchor >= first) & (anchor < first + count)


def anchor_weight_of(weight, foreground, dtype):
    """The weight of each anchor, 0 in the background."""
    weight = weight.to(dtype)
    weight = weight if weight.ndim == 2 else weight.sum(-1)
    return weight if foreground is None else torch.where(foreground, weight, 0)


def _make_special(rows, boxes, weight, foreground):
    """NaN wherever nothing may be read or matter: the background, and anchors of weight 0."""
    idle = weight.reshape(*boxes.shape[:2], -1).sum(-1) == 0
    if foreground is not None:
        weight[~foreground] = float("nan")
        idle |= ~foreground
    for place in idle.nonzero().tolist():
        rows[tuple(place)] = float("nan")
        boxes[tuple(place)] = float("inf")


def outputs_for(case, problem, logits):
    """Empty results by step and role."""
    wide = wide_of(logits)
    if ALL[case.op].is_gradient:
        return {case.op: {"grad_logits": torch.empty_like(logits)}}
    if case.op == "decode_boxes":
        shape = (problem.batch, problem.anchors, 4)
        if not problem.sides_last:
            shape = (problem.batch, 4, problem.anchors)
        return {case.op: {"boxes": torch.empty(shape, dtype=wide)}}
    losses = {role: torch.empty((), dtype=wide) for role in ("iou_loss", "dfl_loss")}
    shape = problem.batch, problem.anchors
    kept = {"anchor_weight": torch.empty(shape, dtype=wide)} if case.keep else {}
    return {"box_loss": kept, "box_loss_sums": losses}


def _emulate(launch, compiled, blocks, held, made):
    buffers, arguments = {}, []
    for argument in launch.arguments:
        role = argument.value
        if isinstance(role, str):
            tensor = made[role] if role in made else held[role]
            buffers[role] = buffer_of(tensor, role, role not in made, 0)
            arguments.append(buffers[role])
        else:
            arguments.append(0 if role is None else role)
    shared = compiled.shared if launch.shared is None else launch.shared
    return (
        run(compiled.ptx, compiled.entry, launch.grid, launch.block, arguments, shared, blocks),
        buffers,
    )


def _differences(case, inputs, held, written, dim):
    """Where results are further from float64 than PyTorch in the same dtype, by the budget."""
    peers, exact = (_expected(case, inputs, dim, double) for double in (False, True))
    faults = []
    for role, peer in peers.items():
        at = written[role]
        if not at.any():
            faults.append(f"{role}: nothing written")
        found = budget_faults(held[role][at], peer[at], exact[role][at])
        faults += [f"{role}: {fault}" for fault in found]
    if "grad_logits" in peers and case.op.startswith("box_loss"):
        idle = peers["grad_logits"] == 0
        if (held["grad_logits"][idle & written["grad_logits"]] != 0).any():
            faults.append("grad_logits: not 0 off the foreground")
    return faults


def _expected(case, inputs, dim, double):
    def exact(value):
        return value.double() if value is not None and value.is_floating_point() else value

    values = {role: exact(value) if double else value for role, value in inputs.items()}
    op = ALL[case.op]
    made = op.evaluate({**op.defaults, **values, **settings_of(case, dim)})
    results = dict(
        zip(ALL[case.op].results, made if isinstance(made, tuple) else (made,), strict=True)
    )
    if case.keep and case.op == "box_loss":
        dtype = values["normalizer"].dtype
        kept = anchor_weight_of(values["weight"], values["foreground"], dtype)
        results["anchor_weight"] = kept
    return results


def settings_of(case, dim):
    """All arguments that are no tensors."""
    settings = {"margin": MARGIN, "box_format": case.box_format, "iou": case.iou}
    return {"dim": dim, "reduction": "sum", **settings}
