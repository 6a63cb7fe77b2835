"""Calls of the public functions that tests make on the stub CUDA device, see `host_path_worker`.

Nothing here imports dflkern before a call is made, so that a worker can choose which copy it is.
"""

from dataclasses import asdict, dataclass

import torch

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64
}  # fmt: skip
PLACES = ("default", "side stream", "second device")
DISTRIBUTIONS = ("dfl_loss", "dfl_decode", "dfl_loss_and_decode")
NORMALIZER = 7.5


@dataclass(frozen=True)
class Case:
    """One call and its backward.

    Attributes:
        op: a public function.
        dtype: of the logits, a name of DTYPES.
        layout: of `support.logits_of`, or for boxes "rows" (B, A, 4, K), "columns" (B, 4, K, A),
            "slice": channels and anchors out of a larger head, "offset": rows, not aligned,
            "empty": rows of no anchors.
        project: with non-uniform positions.
        reduction: of dfl_loss; with "sum" and a weight there is a normalizer.
        weight: "" none, "each" of the target's shape, "anchors" broadcast over the sides; for
            box_loss "anchors" or "scores" (B, A, 5).
        other_dtype: of targets, weights, anchor points and boxes.
        upstream: the gradient of the results: "packed", "expanded" (all strides 0), "reversed"
            (the strides of a transposed tensor), or "backward": none given, for scalars.
        foreground: with a mask.
        place: where the call is made, a name of PLACES. On the second device the current device is
            the first, and the device's current stream is not the default one.
        graph: captured into a CUDA graph, which is run on other values.
    """

    op: str
    backend: str = "triton"
    dtype: str = "fp32"
    bins: int = 16
    layout: str = "rows"
    project: bool = False
    reduction: str = "none"
    weight: str = ""
    other_dtype: str = "fp32"
    upstream: str = "packed"
    box_format: str = "xyxy"
    stride: bool = True
    iou: str = "ciou"
    foreground: bool = True
    place: str = "second device"
    graph: bool = False

    def __str__(self):
        changed = [f"{v}" if isinstance(v, str) else k for k, v in asdict(self).items()
                   if v != getattr(Case(self.op), k) and k != "bins"]  # fmt: skip
        return "-".join([self.op, f"K{self.bins}", *changed])


def inputs_for(case, seed):
    """The tensors of a call by name, on the CPU."""
    torch.manual_seed(seed)
    if case.op in DISTRIBUTIONS:
        return _distribution_inputs(case)
    return _box_inputs(case)


def _distribution_inputs(case):
    from support import logits_of, positions_for

    logits, dim = logits_of(case.layout, case.bins, DTYPES[case.dtype])
    shape = [size for axis, size in enumerate(logits.shape) if axis != dim % logits.ndim]
    other = DTYPES[case.other_dtype]
    tensors = {"logits": logits}
    if case.op != "dfl_decode":
        high = positions_for(case.bins)[-1] + 1 if case.project else case.bins
        tensors["target"] = (torch.rand(shape, dtype=torch.float64) * (high + 2) - 2).to(other)
    if case.weight:
        shape = [*shape[:-1], 1] if case.weight == "anchors" else shape
        tensors["weight"] = torch.rand(shape, dtype=torch.float64).to(other)
    return tensors


def _box_inputs(case):
    from support import positions_for

    logits = _box_logits(case)
    rows = BOX_DIMS[case.layout] == 3
    batch, anchors = logits.shape[0], logits.shape[1 if rows else 3]
    other = DTYPES[case.other_dtype]

    def random(*shape, size=1.0):
        return (torch.rand(*shape, dtype=torch.float64) * size).to(other)

    points = random(anchors, 2, size=20)
    if case.op == "decode_boxes":
        stride = {"stride": random(anchors, 1, size=8) + 1} if case.stride else {}
        return {"logits": logits, "anchor_points": points, **stride}
    high = positions_for(case.bins)[-1] if case.project else case.bins
    spread = random(2, batch, anchors, 2, size=high)
    weight = random(batch, anchors, *[5] * (case.weight == "scores"))
    weight[:, ::7] = 0
    tensors = {
        "logits": logits,
        "anchor_points": points,
        "target_boxes": torch.cat((points - spread[0], points + spread[1]), -1),
        "weight": weight,
    }
    if case.foreground:
        tensors["foreground"] = torch.rand(batch, anchors) < 0.4
    return tensors


def _box_logits(case, batch=2, anchors=37):
    dtype, k = DTYPES[case.dtype], case.bins
    anchors = 0 if case.layout == "empty" else anchors

    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * 2).to(dtype)

    if case.layout in ("rows", "empty"):
        return random(batch, anchors, 4, k)
    if case.layout == "offset":
        return random(batch * anchors * 4 * k + 1)[1:].view(batch, anchors, 4, k)
    if case.layout == "columns":
        return random(batch, 4, k, anchors)
    head = random(batch, 4 * k + 3, anchors + 5)[:, 2 : 2 + 4 * k]
    return head.view(batch, 4, k, anchors + 5)[..., :anchors]


DIMS = {
    "columns": 2, "empty": 2, "expanded": 1, "offset": 1, "padded": 1, "permuted": 0, "rows": 1,
    "rows-4d": 3, "single": 0, "slice": 2, "strided": 1, "unmergeable": 4,
}  # fmt: skip
BOX_DIMS = {"columns": 2, "empty": 3, "offset": 3, "rows": 3, "slice": 2}


def settings_for(case):
    """The arguments of a call that are no tensors."""
    from support import positions_for

    dims = DIMS if case.op in DISTRIBUTIONS else BOX_DIMS
    project = positions_for(case.bins) if case.project else None
    settings = {"dim": dims[case.layout], "project": project}
    if case.op == "dfl_loss":
        normalizer = NORMALIZER if case.weight and case.reduction == "sum" else None
        return {**settings, "reduction": case.reduction, "normalizer": normalizer}
    if case.op == "decode_boxes":
        return {**settings, "box_format": case.box_format}
    if case.op == "box_loss":
        return {**settings, "normalizer": NORMALIZER, "iou": case.iou}
    return settings


def results_of(case, tensors):
    """The results of the public function as a tuple, and the leaf that they depend on."""
    import dflkern

    tensors = dict(tensors)
    leaf = tensors.pop("logits").detach().requires_grad_()
    results = getattr(dflkern, case.op)(leaf, **tensors, **settings_for(case))
    return (results if isinstance(results, tuple) else (results,)), leaf


def call(case, tensors, upstream):
    """The results and the gradient of the logits, without history."""
    results, leaf = results_of(case, tensors)
    if upstream is None:
        results[0].backward()
        gradient = leaf.grad
    else:
        (gradient,) = torch.autograd.grad(results, leaf, upstream)
    return [*(result.detach() for result in results), gradient]


def upstream_for(case, tensors):
    """A random gradient for each result of a call on the CPU; None where none is to be given."""
    if case.upstream == "backward":
        return None
    return [_upstream(case.upstream, result) for result in results_of(case, tensors)[0]]


def _upstream(kind, result):
    if kind == "expanded":
        return torch.randn((), dtype=torch.float64).to(result.dtype).expand(result.shape)
    value = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    if kind == "reversed":
        axes = tuple(reversed(range(value.ndim)))
        value = value.permute(axes).contiguous().permute(axes)
    return value
