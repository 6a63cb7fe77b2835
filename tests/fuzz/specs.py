"""Specifications of cases: what is drawn, and how it is made simpler."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from .tensors import DTYPES, LAYOUTS, MASKS, VALUES

DISTRIBUTIONS = ("dfl_loss", "dfl_decode", "dfl_loss_and_decode")
BOXES = ("decode_boxes", "box_loss")
GEOMETRY = ("paired_box_iou", "bbox2dist", "dist2bbox", "dfl_targets", "make_anchors")
CLASSES = ("class_loss",)
ASSIGN = ("task_aligned_assign",)
OPS = DISTRIBUTIONS + BOXES + GEOMETRY + CLASSES + ASSIGN
BACKENDS = ("cpu", "cpu", "registered", "reference")
FREQUENCY = (4, 3, 3, 3, 6, 1, 0.3, 0.3, 0.3, 0.1, 3, 2)

BINS = (2, 2, 3, 4, 7, 8, 8, 9, 10, 15, 16, 16, 16, 17, 19, 22, 31, 32, 33, 64, 91, 128, 255, 256)
SIZES = (0, 1, 1, 2, 3, 4, 4, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130)
ANCHORS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 97, 130)
# "default": 0, 1, …, K − 1 as a list. The values of a tensor are not checked: any order may come
PROJECTS = (
    None,
    None,
    None,
    "default",
    "list",
    "tensor",
    "double",
    "half",
    "unsorted",
    "descending",
)
TARGETS = ("inside", "inside", "edges", "special", "wide")
WEIGHTS = ("positive", "signed", "ones", "zeros", "some zeros", "special", "background")
UPSTREAM = ("normal", "normal", "equal", "zero", "special", "first", "second")
NORMALIZERS = ("sum", "one", "number", "zero", "tiny", "negative", "nan")
OBJECTS = (0, 1, 1, 2, 3, 5, 8, 20)
POWERS = ((0.5, 6.0), (0.5, 6.0), (1.0, 6.0), (0.0, 1.0), (1.5, 0.0), (0.3, 2.7), (2.0, 3.5))
PLACES = ("normal", "normal", "normal", "integers", "background", "special", "large")


@dataclass(frozen=True)
class Spec:
    """One case; every tensor's numbers depend on `seed` and on what is said of that tensor."""

    op: str
    seed: tuple[int, int]
    backend: str = "cpu"  # on the fast path; "registered": through the registered operators
    threads: int = 1
    repeat: str = "again"  # what must give the same bits: "again", "threads", "no grad"
    dtype: str = "float32"
    shape: tuple[int, ...] = (3,)  # of the logits without bins; (batch, anchors) of boxes
    dim: int = 0  # where the bins are put into shape; 2 or 3 for boxes
    bins: int = 4
    layout: str = "contiguous"
    values: str = "normal"
    other_dtype: str = "float32"
    other_layout: str = "contiguous"  # of targets, weights, masks and all else
    project: str | None = None
    margin: float = 0.01
    target: str = "inside"
    weight: str | None = None
    reduction: str = "none"
    upstream: str = "normal"
    mask: str | None = None
    classes: int | None = None
    normalizer: str = "one"
    places: str = "normal"  # of anchor points and target boxes
    iou: str = "iou"
    stride: str | None = None
    box_format: str = "xyxy"
    objects: int = 3
    topk: int = 10
    topk2: int | None = None
    powers: tuple[float, float] = (0.5, 6.0)  # alpha and beta
    min_side: float = 0.0
    conflicts: str = "inside"

    def __repr__(self):
        """Without what has its default."""
        fields = [field for field in dataclasses.fields(self) if field.name not in ("op", "seed")]
        values = {field.name: getattr(self, field.name) for field in fields}
        told = [f"{f.name}={values[f.name]!r}" for f in fields if values[f.name] != f.default]
        return f"Spec({', '.join([repr(self.op), repr(self.seed), *told])})"


# What is tried for each field, simplest first, when a failing case is made simpler
SIMPLER = {
    "backend": ("cpu",),
    "threads": (1,),
    "repeat": ("again",),
    "dtype": ("float32",),
    "bins": (2, 3, 4, 8, 16),
    "layout": ("contiguous",),
    "values": ("zero", "normal"),
    "other_dtype": ("float32",),
    "other_layout": ("contiguous",),
    "project": (None, "list"),
    "margin": (0.01,),
    "target": ("inside",),
    "weight": (None, "ones", "positive"),
    "reduction": ("none",),
    "upstream": ("equal", "normal"),
    "mask": (None, "all", "bits"),
    "classes": (None, 1),
    "normalizer": ("one",),
    "places": ("normal",),
    "iou": ("iou",),
    "stride": (None,),
    "box_format": ("xyxy",),
    "objects": (1, 2, 3, 5, 8),
    "topk": (1, 2, 3, 10),
    "topk2": (None, 1),
    "powers": ((0.5, 6.0), (1.0, 6.0)),
    "min_side": (0.0,),
    "conflicts": ("inside",),
}


def draw(seed, index, ops=OPS, backends=BACKENDS):
    """The index-th case of a seed."""
    rng = np.random.default_rng((seed, index))

    def pick(options):
        return options[int(rng.integers(len(options)))]

    frequency = np.asarray([FREQUENCY[OPS.index(op)] for op in ops])
    op = ops[int(rng.choice(len(ops), p=frequency / frequency.sum()))]
    bins = pick(BINS)
    large = rng.random() < 0.01
    shapes = {BOXES: _box_shape, CLASSES: _class_shape, ASSIGN: _assign_shape}
    make_shape = next((make for ops, make in shapes.items() if op in ops), _shape)
    shape, dim = make_shape(rng, pick, bins, large)
    mild = rng.random() < 0.5  # half of all cases have only finite, ordinary numbers
    spec = Spec(
        op, (seed, index), pick(backends), threads=pick((1, 2)),
        repeat=pick(("again", "threads", "no grad")), dtype=pick(tuple(DTYPES)), shape=shape,
        dim=dim, bins=bins, layout=pick(LAYOUTS),
        values=pick(("normal", "sharp") if mild else VALUES),
        other_dtype=pick(tuple(DTYPES)), other_layout=pick(LAYOUTS), project=pick(PROJECTS),
        margin=pick((0.0, 0.01, 0.1, 0.5)), target=pick(("inside",) if mild else TARGETS),
        weight=pick(("positive",) if mild else WEIGHTS),
        reduction=pick(("none", "sum", "mean", "side_mean")),
        upstream=pick(("normal",) if mild else UPSTREAM), mask=pick((None, *MASKS)),
        classes=pick((None, None, 1, 3, 17, 80)),
        normalizer=pick(("sum", "one") if mild else NORMALIZERS),
        places=pick(("normal", "background") if mild else PLACES),
        iou=pick(("iou", "giou", "diou", "ciou")), stride=pick((None, "(A,)", "(A, 1)")),
        box_format=pick(("xyxy", "cxcywh")), objects=pick(OBJECTS),
        topk=pick((1, 2, 3, 10, 13, 200)), powers=pick(POWERS),
        min_side=pick((0.0, 0.0, 16.0, 1000.0)),
        conflicts=pick(("inside", "inside", "claimed", "all")),
    )  # fmt: skip
    if rng.random() < 0.5:
        spec = dataclasses.replace(spec, topk2=int(rng.integers(1, spec.topk + 1)))
    if op not in BOXES:
        spec = dataclasses.replace(spec, weight=pick((None, spec.weight)))
    if spec.reduction == "side_mean" and dim == 0:
        spec = dataclasses.replace(spec, reduction="mean")
    return spec


def _shape(rng, pick, bins, large):
    room = (400_000 if large else 3_000) // bins
    shape = []
    for _ in range(int(rng.integers(0, 5))):
        size = pick(SIZES) if not large else pick((4, 16, 33, 130))
        if np.prod([*shape, max(size, 1)]) <= room:
            shape.append(size)
    return tuple(shape), int(rng.integers(0, len(shape) + 1))


def _box_shape(rng, pick, bins, large):
    room = (400_000 if large else 6_000) // (4 * bins)
    anchors = min(1_000 if large else pick(ANCHORS), max(room, 1))
    batch = min(pick((0, 1, 1, 2, 3)), max(room // max(anchors, 1), 1))
    return (batch, anchors), pick((2, 3))


def _class_shape(rng, pick, bins, large):
    return (pick((0, 1, 1, 2, 3)), 1100 if large else pick(ANCHORS)), pick((1, 2))


def _assign_shape(rng, pick, bins, large):
    return (pick((0, 1, 1, 2, 3)), pick(ANCHORS)), pick((1, 2))


def simpler(spec):
    """Specifications that differ from this one in one field that they have simpler."""
    for axis, size in enumerate(spec.shape):
        for smaller in {1, size // 2, size - 1} - {size, -1}:
            if smaller < size:
                shape = (*spec.shape[:axis], smaller, *spec.shape[axis + 1 :])
                yield dataclasses.replace(spec, shape=shape)
    if spec.op in DISTRIBUTIONS and spec.reduction != "side_mean":
        for axis in range(len(spec.shape)):
            shape = (*spec.shape[:axis], *spec.shape[axis + 1 :])
            yield dataclasses.replace(spec, shape=shape, dim=min(spec.dim, len(shape)))
    for field, values in SIMPLER.items():
        current = getattr(spec, field)
        before = values.index(current) if current in values else len(values)
        for value in values[:before]:
            if not (field in ("bins", "objects", "topk") and value >= current):
                yield dataclasses.replace(spec, **{field: value})
