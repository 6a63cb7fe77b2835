"""Synthetic trainings, healthy or with one fault, over several heads and box distributions."""

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


def _without(case, *names):
    return {key: value for key, value in case.items() if key not in names}


def coordinates_scaled(case, head):
    targets = (case["boxes"] / head.image * head.num_bins).clamp(0, head.num_bins - 1e-6)
    return case | {"targets": targets}


def coordinates_in_cells(case, head):
    return case | {"targets": case["boxes"] / case["stride"]}


def coordinates_in_pixels(case, head):
    return case | {"targets": case["boxes"].clamp(0, head.last - head.margin)}


def coordinates_bare(case, head):
    return _without(coordinates_scaled(case, head), "boxes", "anchor_points", "stride")


def coordinates_with_points(case, head):
    return _without(coordinates_scaled(case, head), "boxes")


def pixels_clamped(case, head):
    targets = (case["targets"] * case["stride"]).clamp(head.low, head.last - head.margin)
    return case | {"targets": targets}


def pixels_unclamped(case, head):
    return case | {"targets": case["targets"] * case["stride"]}


def pixels_without_boxes(case, head):
    return _without(pixels_unclamped(case, head), "boxes", "anchor_points")


def pixels_of_anchor_points(case, head):
    """Boxes divided, anchor points not."""
    points, boxes = case["anchor_points"] * case["stride"], case["boxes"] / case["stride"]
    targets = dflkern.bbox2dist(points, boxes).clamp(head.low, head.last - head.margin)
    return case | {"targets": targets}


def pixels_of_boxes(case, head):
    """Anchor points in cells, boxes not divided."""
    return case | {"targets": dflkern.bbox2dist(case["anchor_points"], case["boxes"])}


def boxes_in_pixels(case, head):
    """No targets, and boxes that the loss takes for cells."""
    return _without(case, "targets") | {"boxes": case["boxes"] * case["stride"]}


def normalized_distances(case, head):
    return case | {"targets": case["targets"] * case["stride"] / head.image}


def normalized_bare(case, head):
    return _without(normalized_distances(case, head), "boxes", "anchor_points", "stride")


def normalized_boxes(case, head):
    return _without(case, "targets") | {"boxes": case["boxes"] / head.image}


def normalized_boxes_leaving_the_image(case, head):
    boxes = case["boxes"] / head.image
    boxes[7, 2] = 1.02
    return _without(case, "targets") | {"boxes": boxes}


def normalized_coordinates_leaving_the_image(case, head):
    """Boxes as fractions taken for targets, and nothing beside them."""
    targets = case["boxes"] / head.image
    targets[7, 2] = 1.02
    return _without(case, "boxes", "anchor_points", "stride") | {
        "targets": targets[:, [2, 0, 1, 3]]
    }


def anchor_points_in_pixels(case, head):
    return _without(case, "targets") | {"anchor_points": case["anchor_points"] * case["stride"]}


def anchor_points_in_pixels_beside_targets(case, head):
    """The targets are right."""
    return case | {"anchor_points": case["anchor_points"] * case["stride"]}


def anchor_points_in_pixels_throughout(case, head):
    points = case["anchor_points"] * case["stride"]
    targets = dflkern.bbox2dist(points, case["boxes"] / case["stride"])
    return case | {"anchor_points": points, "targets": targets.clamp(head.low, head.last - 0.01)}


def boxes_in_cells(case, head):
    return _without(case, "targets") | {"boxes": case["boxes"] / case["stride"]}


def boxes_in_cells_beside_targets(case, head):
    return case | {"boxes": case["boxes"] / case["stride"]}


def corner_and_size(boxes):
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), -1)


def centre_and_size(boxes):
    return torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), -1)


def boxes_as_corner_and_size(case, head):
    return _without(case, "targets") | {"boxes": corner_and_size(case["boxes"])}


def boxes_as_centre_and_size(case, head):
    return _without(case, "targets") | {"boxes": centre_and_size(case["boxes"])}


def corner_and_size_beside_targets(case, head):
    return case | {"boxes": corner_and_size(case["boxes"])}


def centre_and_size_beside_targets(case, head):
    return case | {"boxes": centre_and_size(case["boxes"])}


def corner_and_size_alone(case, head):
    return {"boxes": corner_and_size(case["boxes"]), "num_bins": head.num_bins}


def tiny_objects(case, head):
    """Objects of a tenth to a third of the smallest stride, beside their anchor points by more."""
    step = float(case["stride"].min())
    points = case["anchor_points"] * case["stride"] / step
    number = torch.arange(len(points))[:, None]
    centre = points + (0.1 + 0.1 * (number % 7)) * torch.tensor([1.0, -1.0])
    half = 0.05 + 0.01 * (number % 12)
    boxes = torch.cat((centre - half, centre + half), -1)
    targets = dflkern.bbox2dist(points, boxes).clamp(head.low, head.last - head.margin)
    stride = torch.full_like(case["stride"], step)
    return case | {
        "targets": targets, "boxes": boxes * step, "anchor_points": points, "stride": stride
    }  # fmt: skip


def tiny_objects_as_distances(case, head):
    """Before any clamp, without boxes."""
    tiny = tiny_objects(case, head)
    targets = dflkern.bbox2dist(tiny["anchor_points"], tiny["boxes"] / tiny["stride"])
    return _without(tiny, "boxes") | {"targets": targets}


def negative(case, head):
    """A fifth of the anchors lies outside its box."""
    targets = case["targets"].clone()
    targets[::5, 0] = head.low - 1.5
    return _without(case, "boxes") | {"targets": targets}


def above_range(case, head):
    targets = case["targets"].clone()
    targets[::10] = targets[::10] + head.last
    return _without(case, "boxes") | {"targets": targets}


def above_range_by_boxes(case, head):
    boxes = case["boxes"].clone()
    boxes[::10, 2:] += case["stride"][::10] * (head.last + 1)
    targets = dflkern.bbox2dist(case["anchor_points"], boxes / case["stride"])
    return case | {"boxes": boxes, "targets": targets.clamp(head.low, head.last - head.margin)}


def at_clamp(case, head):
    targets = case["targets"].clone()
    targets[::8] = head.last - head.margin
    return _without(case, "boxes") | {"targets": targets}


def integer_only(case, head):
    return _without(case, "boxes") | {"targets": case["targets"].round().clamp(max=head.last - 1)}


def extra_bin(case, head):
    logits = torch.cat((case["logits"], case["logits"][..., -1:] - 1), -1)
    return case | {"logits": logits}


def extra_bin_unused(case, head):
    """A head of 17 bins, targets clamped for 16, and nobody says how many it should be."""
    bound = head.last - 1 - head.margin
    targets = case["targets"].clamp(max=bound)
    targets[::20, 1] = bound
    return _without(case, "boxes", "num_bins") | {"targets": targets}


def bin_major(case, head):
    logits = case["logits"].transpose(1, 2).reshape(case["logits"].shape)
    return case | {"logits": logits}


def bin_major_without_targets(case, head):
    return _without(bin_major(case, head), "targets", "boxes")


def loss_clamp(case, head):
    """A sum over the four sides, clamped at 10 for most of the training."""
    losses = 4 * case["losses"]
    return case | {"losses": losses.clamp(max=float(losses.quantile(0.4)))}


def loss_clamp_from_the_start(case, head):
    return case | {"losses": [10.0] * 30}


def negative_losses(case, head):
    return case | {"losses": case["losses"] - 0.8}


def one_negative_loss(case, head):
    return {"losses": [1.52, 1.31, 0.4, -0.234]}


def summed_losses(case, head):
    return {"losses": [1494.0, 1480.0, 1466.0]}


def summed_losses_of_anchors(case, head):
    """A sum over sides and anchors where the mean is known."""
    return case | {"losses": 4 * len(case["targets"]) * case["losses"]}


def flat_logits(case, head):
    return case | {"logits": 0.001 * case["logits"]}


def saturated_logits(case, head):
    return case | {"logits": 40 * case["logits"]}


def wrong_dequantization(case, head):
    return case | {"logits": 256 * case["logits"]}


def half_clamp(case, head):
    targets = case["targets"].clone()
    targets[::25] = head.last - head.margin
    return _without(case, "boxes") | {"targets": targets.bfloat16()}


def half_decode(case, head):
    return case | {"logits": case["logits"].bfloat16()}


def half_anchors(case, head):
    points, _ = dflkern.make_anchors([(160, 160)], [8])
    return {"anchor_points": points.bfloat16()}


def half_anchors_once(case, head):
    """They are in fp32 now, but were not when they were made."""
    points, _ = dflkern.make_anchors([(160, 160)], [8])
    return {"anchor_points": points.bfloat16().float()}


def zero_weight(case, head):
    return case | {"weight": case["weight"] * (torch.arange(len(case["weight"])) % 10 == 0)}


def zero_loss(case, head):
    return case | {"losses": [0.0] * 50}


def zero_normalizer(case, head):
    normalizer = case["normalizer"].clone()
    normalizer[7] = 0
    return case | {"normalizer": normalizer}


def exploding_layers(case, head):
    norms = {f"layer{i}": 0.1 * 3.0**i for i in range(14)}
    return case | {"gradients": norms}


def exploding_steps(case, head):
    return case | {"gradients": [2.0 * 1.1**i for i in range(120)]}


def non_finite(case, head):
    logits = case["logits"].clone()
    logits[3, 1, 2] = math.nan
    return case | {"logits": logits}


def non_finite_losses(case, head):
    losses = case["losses"].clone()
    losses[150:] = math.nan
    return case | {"losses": losses}


# Fault, and the code that must come first.
FAULTS = {
    coordinates_scaled: "coordinates",
    coordinates_in_cells: "coordinates",
    coordinates_in_pixels: "coordinates",
    coordinates_bare: "coordinates",
    coordinates_with_points: "coordinates",
    pixels_clamped: "pixels",
    pixels_unclamped: "pixels",
    pixels_without_boxes: "pixels",
    pixels_of_anchor_points: "pixels",
    pixels_of_boxes: "pixels",
    boxes_in_pixels: "pixels",
    normalized_distances: "normalized",
    normalized_bare: "normalized",
    normalized_boxes: "normalized",
    normalized_boxes_leaving_the_image: "normalized",
    normalized_coordinates_leaving_the_image: "normalized",
    anchor_points_in_pixels: "anchor-units",
    anchor_points_in_pixels_beside_targets: "anchor-units",
    anchor_points_in_pixels_throughout: "anchor-units",
    boxes_in_cells: "box-units",
    boxes_in_cells_beside_targets: "box-units",
    boxes_as_corner_and_size: "box-format",
    boxes_as_centre_and_size: "box-format",
    corner_and_size_beside_targets: "box-format",
    centre_and_size_beside_targets: "box-format",
    corner_and_size_alone: "box-format",
    tiny_objects: "tiny-objects",
    tiny_objects_as_distances: "tiny-objects",
    negative: "negative",
    above_range: "above-range",
    above_range_by_boxes: "above-range",
    at_clamp: "at-clamp",
    integer_only: "integer-only",
    extra_bin: "extra-bin",
    extra_bin_unused: "extra-bin",
    bin_major: "bin-major",
    bin_major_without_targets: "bin-major",
    loss_clamp: "loss-clamp",
    loss_clamp_from_the_start: "loss-clamp",
    negative_losses: "negative-loss",
    one_negative_loss: "negative-loss",
    summed_losses: "summed-loss",
    summed_losses_of_anchors: "summed-loss",
    flat_logits: "flat-logits",
    saturated_logits: "saturated-logits",
    wrong_dequantization: "saturated-logits",
    half_clamp: "half-clamp",
    half_decode: "half-decode",
    half_anchors: "half-anchors",
    half_anchors_once: "half-anchors",
    zero_weight: "zero-weight",
    zero_loss: "zero-weight",
    zero_normalizer: "zero-normalizer",
    exploding_layers: "exploding-gradient",
    exploding_steps: "exploding-gradient",
    non_finite: "non-finite",
    non_finite_losses: "non-finite",
}
# What a bf16 dtype does not round up, or a head cannot show.
IMPOSSIBLE = {
    "half_clamp": lambda head: head.margin > 0.05,
    "extra_bin_unused": lambda head: head.project is not None,
    "integer_only": lambda head: head.project is not None,
    "normalized_bare": lambda head: head.project is not None,
    "normalized_coordinates_leaving_the_image": lambda head: head.project is not None,
    # Their bins reach 2 cells behind the anchor point, farther than any assigner here goes.
    "tiny_objects": lambda head: head.low < 0,
    "tiny_objects_as_distances": lambda head: head.low < 0,
}
# Targets or boxes in the wrong unit, or all on a bin, have no floor worth a note.
FLOORLESS = {
    "coordinates", "pixels", "normalized", "integer-only", "anchor-units", "box-units",
    "box-format",
}  # fmt: skip
