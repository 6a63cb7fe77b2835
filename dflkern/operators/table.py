"""The table of operators: one record each, from which everything else about an operator follows.

Its schema, its fake and its autograd (`registration`), eager calls past the dispatcher (`run`),
the arguments of the C++ operators (`cpu`) and of the GPU kernels, what `explain` shows, and what
`python -m dflkern compile` compiles.

To add a parameter: the public function in `api`, its record here, the reference, the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..geometry import column
from ..gpu.box_problem import BoxProblem, describe_boxes
from ..problem import Problem, compute_dtype, describe_besides, describe_tensor

Arguments = dict[str, Any]


class Setting(NamedTuple):
    """An argument that is no tensor.

    `default` is what the operator computes with where it stands in for another one.
    """

    name: str
    type: str
    default: Any = None


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator, or the gradient of one.

    Every operator also takes dim, between its tensors and its settings, and the requested backend
    last; with `bins` also project and positions, before dim. Only the first tensor gets a gradient.

    Attributes:
        name: in torch.ops.dflkern.
        tensors: in the order of the schema; "?" marks an optional one.
        settings: in the order of the schema.
        results: what it returns. Upstream gradients are named after them: grad_loss for loss,
            grad_iou for iou_loss.
        forward: the reference, with the schema's names but positions and backend.
        problem: what a GPU kernel needs to know of the arguments; None without GPU kernels.
        shape: the shape of each result by the arguments, all in the compute dtype.
        allocate: memory for the results by the arguments, where they differ in shape or dtype.
        bins: whether the first tensor holds distributions over bins, with positions.
        kernels: the backends that have kernels, beside the reference.
        saved: the tensors that the gradient reads.
        backward: the reference of the gradient, which can be differentiated; None for a gradient,
            and for an operator without one.
        saved_on_cpu: what is saved instead if the CPU kernels serve the call, through the operators
            `_cpu_<name>_keep`, whose last results they are, and `_cpu_<name>_backward_kept`.
        condensed: for GPU kernels, from the arguments: memory that the forward fills beside its
            results, and which arguments the gradient gets in place of those given.
        known_to_gpus: the arguments that GPU kernels know, made of those given by PyTorch.
        limits: which backends cannot serve these arguments, and why not, where that is not known
            from `problem`.
        reduced: whether PyTorch's operations weight and reduce the results of kernels that do not.
        parts: for each result, the operator that has it alone: its gradient serves where only that
            upstream gradient is given. Without parts, all are given.
        main: the name of the first tensor; in a gradient, of the operator's first.
        is_gradient: whether it is the gradient of an operator.
        rows: whether it works on each distribution alone, wherever that is.
        names: of all arguments, in the order of the schema.
        upstream: the names of the upstream gradients.
        absent: all tensors by name, as None.
        gradient: the operator that computes the gradient of the logits.
    """

    name: str
    tensors: tuple[str, ...]
    settings: tuple[Setting, ...]
    results: tuple[str, ...]
    forward: Callable[..., Any]
    problem: Callable[[Mapping[str, Any]], Problem] | None = None
    shape: Callable[..., tuple[int, ...]] | None = None
    allocate: Callable[..., Sequence[Tensor]] | None = None
    bins: bool = True
    kernels: tuple[str, ...] = ("cpu", "triton", "cuda")
    saved: tuple[str, ...] = ()
    backward: Callable[..., Tensor] | None = None
    saved_on_cpu: tuple[str, ...] = ()
    condensed: Callable[[Arguments], tuple[Arguments, Arguments]] | None = None
    known_to_gpus: Callable[[Arguments], Arguments] | None = None
    limits: Callable[[Mapping[str, Any]], dict[str, str]] | None = None
    reduced: bool = False
    parts: tuple[Operator, ...] = ()
    main: str = ""
    is_gradient: bool = False
    rows: bool = False
    names: tuple[str, ...] = field(init=False)
    upstream: tuple[str, ...] = field(init=False)
    absent: dict[str, None] = field(init=False)
    gradient: Operator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        tensors = tuple(tensor.removesuffix("?") for tensor in self.tensors)
        others = ("positions", "dim", *(setting.name for setting in self.settings), "backend")
        tensors, others = (*tensors, "project") if self.bins else tensors, others[not self.bins :]
        derived: Arguments = {
            "main": self.main or tensors[0],
            "names": (*tensors, *others),
            "upstream": tuple(f"grad_{result.removesuffix('_loss')}" for result in self.results),
            "absent": dict.fromkeys(tensors),
        }
        if self.backward is not None:
            derived["gradient"] = Operator(
                name=f"{self.name}_backward",
                tensors=(
                    *derived["upstream"],
                    *(t for t in self.tensors if t.removesuffix("?") in self.saved),
                ),
                settings=self.settings,
                results=(f"grad_{tensors[0]}",),
                forward=self.backward,
                problem=self.problem,
                bins=self.bins,
                kernels=self.kernels,
                known_to_gpus=self.known_to_gpus,
                limits=self.limits,
                reduced=self.reduced,
                main=tensors[0],
                is_gradient=True,
                rows=self.rows,
            )
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the record is frozen

    @property
    def schema(self) -> str:
        """As torch.library takes it."""
        tensors = [f"Tensor{'?' * t.endswith('?')} {t.removesuffix('?')}" for t in self.tensors]
        settings = [f"{setting.type} {setting.name}" for setting in self.settings]
        positions = ["Tensor? project", "float[]? positions"] if self.bins else []
        arguments = [*tensors, *positions, "int dim", *settings, "str backend"]
        results = ", ".join("Tensor" for _ in self.results)
        returns = f"({results})" if len(self.results) > 1 else results
        return f"{self.name}({', '.join(arguments)}) -> {returns}"

    def evaluate(self, arguments: Arguments) -> Any:
        """The reference's results for named arguments, of which it takes its own."""
        names = (name for name in self.names if name not in ("positions", "backend"))
        return self.forward(**{name: arguments[name] for name in names})

    @property
    def defaults(self) -> Arguments:
        """The optional tensors and the settings where nothing is given."""
        absent: Arguments = {t.removesuffix("?"): None for t in self.tensors if t.endswith("?")}
        return absent | {setting.name: setting.default for setting in self.settings}


def _distributions(arguments: Mapping[str, Any]) -> Problem:
    return describe_tensor(
        arguments["logits"], arguments["dim"], margin=arguments.get("margin", 0.0),
        project=_has_project(arguments), beside=describe_besides(arguments),
    )  # fmt: skip


def _boxes(arguments: Mapping[str, Any]) -> BoxProblem:
    return describe_boxes(
        arguments["logits"], arguments["dim"], project=_has_project(arguments),
        margin=arguments.get("margin", 0.0), stride=arguments.get("stride") is not None,
        box_format=arguments.get("box_format", "xyxy"), iou=arguments.get("iou", "ciou"),
        foreground=arguments.get("foreground") is not None, weight=arguments.get("weight"),
        keep=arguments.get("anchor_weight") is not None,
    )  # fmt: skip


def _target_boxes(arguments: Mapping[str, Any]) -> BoxProblem:
    """With what box_loss's kernels get in place of matched and stride."""
    given = (arguments.get(name) is not None for name in ("foreground", "matched"))
    foreground = True if any(given) else None
    return _boxes({**arguments, "foreground": foreground, "stride": None})


def _with_boxes_of_anchors(arguments: Arguments) -> Arguments:
    """A target box in cells for each anchor, and a mask, in place of matched and stride."""
    matched, stride, boxes = (arguments[name] for name in ("matched", "stride", "target_boxes"))
    if matched is None and stride is None:
        return arguments
    boxes, foreground = boxes.to(compute_dtype(arguments["logits"].dtype)), arguments["foreground"]
    if matched is not None:
        boxes, foreground = reference.boxes_of_objects(boxes, matched)
    if stride is not None:
        boxes = boxes / column(stride).to(boxes.dtype)
    return {
        **arguments, "target_boxes": boxes, "foreground": foreground, "matched": None,
        "stride": None,
    }  # fmt: skip


def _box_loss_limits(arguments: Mapping[str, Any]) -> dict[str, str]:
    if arguments["reduction"] == "sum":
        return {}
    return dict.fromkeys(("triton", "cuda"), 'it has no kernel of box_loss with reduction="none"')


def _has_project(arguments: Mapping[str, Any]) -> bool:
    return arguments["project"] is not None or arguments.get("positions") is not None


def _without_bins(*, logits: Tensor, dim: int, **others: Any) -> tuple[int, ...]:
    shape = logits.shape
    return shape[:dim] + shape[dim + 1 :]


def _reduced(*, logits: Tensor, dim: int, reduction: str, **others: Any) -> tuple[int, ...]:
    if reduction in ("sum", "mean"):
        return ()
    shape = logits.shape
    if reduction == "side_mean":
        return shape[: dim - 1] + shape[dim + 1 :]
    return shape[:dim] + shape[dim + 1 :]


def _of_anchors(*, weight: Tensor, reduction: str, **others: Any) -> tuple[int, ...]:
    return weight.shape[:2] if reduction == "none" else ()


def _with_anchor_weights(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """Each anchor's weight, 0 in the background, in place of class scores and mask."""
    logits, weight = arguments["logits"], arguments["weight"]
    if weight.ndim < 3:
        return {}, {}
    kept = logits.new_empty(weight.shape[:2], dtype=compute_dtype(logits.dtype))
    return {"anchor_weight": kept}, {"weight": kept, "foreground": None}


def _scalar(**others: Any) -> tuple[int, ...]:
    return ()


def _assigned(*, class_logits: Tensor, dim: int, **others: Any) -> Sequence[Tensor]:
    shape, dtype = (class_logits.shape[0], class_logits.shape[3 - dim]), class_logits.dtype
    new = functools.partial(class_logits.new_empty, dtype=compute_dtype(dtype))
    return class_logits.new_empty(shape, dtype=torch.int32), new(shape), new(())


MARGIN = Setting("margin", "float")

DFL_LOSS = Operator(
    name="dfl_loss",
    tensors=("logits", "target", "weight?", "normalizer?"),
    settings=(MARGIN, Setting("reduction", "str", "none")),
    results=("loss",),
    saved=("logits", "target", "weight", "normalizer", "project"),
    forward=reference.dfl_loss,
    backward=reference.dfl_loss_backward,
    problem=_distributions,
    rows=True,
    shape=_reduced,
    reduced=True,
)
DFL_DECODE = Operator(
    name="dfl_decode",
    tensors=("logits",),
    settings=(),
    results=("position",),
    saved=("logits", "project"),
    forward=reference.dfl_decode,
    backward=reference.dfl_decode_backward,
    problem=_distributions,
    rows=True,
    shape=_without_bins,
)
DFL_LOSS_AND_DECODE = Operator(
    name="dfl_loss_and_decode",
    tensors=("logits", "target"),
    settings=(MARGIN,),
    results=("loss", "position"),
    saved=("logits", "target", "project"),
    forward=reference.dfl_loss_and_decode,
    backward=reference.dfl_loss_and_decode_backward,
    problem=_distributions,
    rows=True,
    shape=_without_bins,
    parts=(DFL_LOSS, DFL_DECODE),
)
DECODE_BOXES = Operator(
    name="decode_boxes",
    tensors=("logits", "anchor_points", "stride?"),
    settings=(Setting("box_format", "str"),),
    results=("boxes",),
    saved=("logits", "stride", "project"),
    forward=reference.decode_boxes,
    backward=reference.decode_boxes_backward,
    problem=_boxes,
    shape=_without_bins,
)
BOX_LOSS = Operator(
    name="box_loss",
    tensors=(
        "logits", "anchor_points", "target_boxes", "weight", "normalizer?", "foreground?",
        "matched?", "stride?",
    ),
    settings=(MARGIN, Setting("iou", "str"), Setting("reduction", "str")),
    results=("iou_loss", "dfl_loss"),
    saved=(
        "logits", "anchor_points", "target_boxes", "weight", "normalizer", "foreground", "matched",
        "stride", "project",
    ),
    forward=reference.box_loss,
    backward=reference.box_loss_backward,
    problem=_target_boxes,
    shape=_of_anchors,
    saved_on_cpu=("logits", "anchor_points", "normalizer", "candidates", "kept", "project"),
    condensed=_with_anchor_weights,
    known_to_gpus=_with_boxes_of_anchors,
    limits=_box_loss_limits,
)  # fmt: skip
CLASS_LOSS = Operator(
    name="class_loss",
    tensors=("class_logits", "matched", "score", "gt_labels", "normalizer", "class_weight?"),
    settings=(
        Setting("kind", "str"),
        Setting("alpha", "float"),
        Setting("gamma", "float"),
        Setting("detach_modulation", "bool"),
    ),
    results=("loss",),
    saved=("class_logits", "matched", "score", "gt_labels", "normalizer", "class_weight"),
    forward=reference.class_loss,
    backward=reference.class_loss_backward,
    shape=_scalar,
    bins=False,
    kernels=("cpu",),
)
DISTANCE_LOSS = Operator(
    name="distance_loss",
    tensors=(
        "distances", "anchor_points", "target_boxes", "weight", "normalizer", "stride",
        "foreground?", "matched?",
    ),
    settings=(Setting("image_size", "float[]"), Setting("iou", "str")),
    results=("iou_loss", "l1_loss"),
    saved=(
        "distances", "anchor_points", "target_boxes", "weight", "normalizer", "stride",
        "foreground", "matched",
    ),
    forward=reference.distance_loss,
    backward=reference.distance_loss_backward,
    shape=_scalar,
    bins=False,
    kernels=(),
)  # fmt: skip

TASK_ALIGNED_ASSIGN = Operator(
    name="task_aligned_assign",
    tensors=(
        "class_logits", "boxes", "anchor_points", "stride", "gt_boxes", "gt_labels", "gt_image",
    ),
    settings=(
        Setting("topk", "int"),
        Setting("topk2", "int"),
        Setting("alpha", "float"),
        Setting("beta", "float"),
        Setting("iou", "str"),
        Setting("min_side", "float"),
        Setting("conflicts", "str"),
        Setting("eps", "float"),
    ),
    results=("matched", "score", "score_sum"),
    forward=reference.task_aligned_assign,
    allocate=_assigned,
    bins=False,
    kernels=("cpu",),
)  # fmt: skip

TABLE = {
    op.name: op
    for op in (
        DFL_LOSS, DFL_DECODE, DFL_LOSS_AND_DECODE, DECODE_BOXES, BOX_LOSS, CLASS_LOSS,
        DISTANCE_LOSS, TASK_ALIGNED_ASSIGN,
    )
}  # fmt: skip


# With their gradients
ALL = {each.name: each for op in TABLE.values() for each in (op, op.gradient) if each}
