"""Faults of boxes and anchor points, each made from a healthy training."""

import torch
from doctor_healthy import without

import dflkern


def anchor_points_in_pixels(case, head):
    return without(case, "targets") | {"anchor_points": case["anchor_points"] * case["stride"]}


def anchor_points_in_pixels_beside_targets(case, head):
    """The targets are right."""
    return case | {"anchor_points": case["anchor_points"] * case["stride"]}


def anchor_points_in_pixels_throughout(case, head):
    points = case["anchor_points"] * case["stride"]
    targets = dflkern.bbox2dist(points, case["boxes"] / case["stride"])
    return case | {"anchor_points": points, "targets": targets.clamp(head.low, head.last - 0.01)}


def boxes_in_cells(case, head):
    return without(case, "targets") | {"boxes": case["boxes"] / case["stride"]}


def boxes_in_cells_beside_targets(case, head):
    return case | {"boxes": case["boxes"] / case["stride"]}


def corner_and_size(boxes):
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), -1)


def centre_and_size(boxes):
    return torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), -1)


def boxes_as_corner_and_size(case, head):
    return without(case, "targets") | {"boxes": corner_and_size(case["boxes"])}


def boxes_as_centre_and_size(case, head):
    return without(case, "targets") | {"boxes": centre_and_size(case["boxes"])}


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
    return without(tiny, "boxes") | {"targets": targets}
