"""Synthetic healthy trainings, over several heads and box distributions."""

import math
from dataclasses import dataclass

import torch

import dflkern

IMAGE = 640


@dataclass(frozen=True)
class Head:
    """A detector's head, and how the boxes of its data set are distributed."""

    name: str
    num_bins: int
    strides: tuple[int, ...]
    boxes: str = "uniform"
    margin: float = 0.01
    offset: float = 0.5
    project: tuple[float, ...] | None = None
    image: int = IMAGE

    @property
    def low(self):
        return self.project[0] if self.project else 0.0

    @property
    def last(self):
        return self.project[-1] if self.project else self.num_bins - 1.0


HEADS = (
    Head("yolov8", 16, (8, 16, 32)),
    Head("yolov8-p2, small objects", 16, (4, 8, 16, 32), boxes="small"),
    Head("gfl", 17, (8, 16, 32, 64, 128), margin=0.1, boxes="large"),
    Head("nanodet", 8, (8, 16, 32), margin=0.1, offset=0.0),
    Head("one level", 16, (16,), boxes="large"),
    Head("perspective", 16, (8, 16, 32), boxes="perspective"),
    Head("yolov6", 17, (8, 16, 32), boxes="square"),
    Head("ppyoloe-sod", 19, (8, 16, 32), project=tuple(range(-2, 17)), boxes="small"),
    Head("long", 33, (4, 8), boxes="uniform", image=1280),
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def healthy(head, seed, count=600):
    """Everything `examine` takes, of a training in which nothing is wrong."""
    g = seeded(seed)
    sizes = [(head.image // s, head.image // s) for s in head.strides]
    points, stride = dflkern.make_anchors(sizes, head.strides, offset=head.offset)
    level = torch.randint(len(head.strides), (count,), generator=g)
    ends = torch.tensor([h * w for h, w in sizes]).cumsum(0)
    begin, number = ends[level] - torch.tensor([h * w for h, w in sizes])[level], None
    number = begin + (torch.rand(count, generator=g) * (ends[level] - begin)).long()
    points, stride = points[number], stride[number]
    sides = _sides(head, points, stride, count, g)
    # Boxes end where the image does.
    room = torch.cat((points, head.image / stride - points), -1)
    sides = torch.minimum(sides, room.clamp(min=0.2))
    boxes = dflkern.dist2bbox(sides, points) * stride
    targets = dflkern.bbox2dist(points, boxes / stride).clamp(head.low, head.last - head.margin)
    bins = torch.tensor(head.project or range(head.num_bins), dtype=torch.float32)
    logits = -1.5 * (targets[..., None] - bins).abs()
    logits = logits + 0.3 * torch.randn(logits.shape, generator=g)
    steps = torch.arange(200)
    losses = 0.6 + (math.log(head.num_bins) - 0.6) * (-steps / 40).exp()
    losses = losses * (1 + 0.05 * torch.randn(200, generator=g))
    norms = {
        f"layer{i}": ((3 - steps / 100) * (1 + 0.3 * torch.rand(200, generator=g))).tolist()
        for i in range(12)
    }
    return {
        "targets": targets,
        "num_bins": head.num_bins,
        "logits": logits,
        "boxes": boxes,
        "anchor_points": points,
        "stride": stride,
        "losses": losses,
        "gradients": norms,
        "project": head.project,
        "margin": head.margin,
        "weight": 0.05 + 0.9 * torch.rand(count, generator=g),
        "normalizer": 20 + 10 * torch.rand(200, generator=g),
    }


def _sides(head, points, stride, count, g):
    """Distances in cells within the reach of the head."""
    reach, u = head.last - 0.5, torch.rand(count, 4, generator=g)
    if head.boxes == "small":
        return 0.1 + 0.25 * reach * u * u
    if head.boxes == "large":
        return 0.3 * reach + 0.65 * reach * u
    if head.boxes == "square":
        side = (1 + 0.9 * reach * u[:, :1]).expand(-1, 4)
        return side * (0.5 + 0.5 * u)
    if head.boxes == "perspective":  # the lower in the image, the larger
        depth = (points * stride)[:, 1:] / head.image
        return 0.3 + 0.9 * reach * depth * (0.4 + 0.6 * u)
    return 0.2 + (reach - 0.2) * u


# --- faults: each changes a healthy case, and returns it ----------------------------------------


def without(case, *names):
    return {key: value for key, value in case.items() if key not in names}
