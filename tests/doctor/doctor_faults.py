"""Faults of targets, logits and losses, each made from a healthy training."""

import math

import torch
from doctor_healthy import without

import dflkern


def coordinates_scaled(case, head):
    targets = (case["boxes"] / head.image * head.num_bins).clamp(0, head.num_bins - 1e-6)
    return case | {"targets": targets}


def coordinates_in_cells(case, head):
    return case | {"targets": case["boxes"] / case["stride"]}


def coordinates_in_pixels(case, head):
    return case | {"targets": case["boxes"].clamp(0, head.last - head.margin)}


def coordinates_bare(case, head):
    return without(coordinates_scaled(case, head), "boxes", "anchor_points", "stride")


def coordinates_with_points(case, head):
    return without(coordinates_scaled(case, head), "boxes")


def pixels_clamped(case, head):
    targets = (case["targets"] * case["stride"]).clamp(head.low, head.last - head.margin)
    return case | {"targets": targets}


def pixels_unclamped(case, head):
    return case | {"targets": case["targets"] * case["stride"]}


def pixels_without_boxes(case, head):
    return without(pixels_unclamped(case, head), "boxes", "anchor_points")


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
    return without(case, "targets") | {"boxes": case["boxes"] * case["stride"]}


def normalized_distances(case, head):
    return case | {"targets": case["targets"] * case["stride"] / head.image}


def normalized_bare(case, head):
    return without(normalized_distances(case, head), "boxes", "anchor_points", "stride")


def normalized_boxes(case, head):
    return without(case, "targets") | {"boxes": case["boxes"] / head.image}


def normalized_boxes_leaving_the_image(case, head):
    boxes = case["boxes"] / head.image
    boxes[7, 2] = 1.02
    return without(case, "targets") | {"boxes": boxes}


def normalized_coordinates_leaving_the_image(case, head):
    """Boxes as fractions taken for targets, and nothing beside them."""
    targets = case["boxes"] / head.image
    targets[7, 2] = 1.02
    return without(case, "boxes", "anchor_points", "stride") | {"targets": targets[:, [2, 0, 1, 3]]}


def negative(case, head):
    """A fifth of the anchors lies outside its box."""
    targets = case["targets"].clone()
    targets[::5, 0] = head.low - 1.5
    return without(case, "boxes") | {"targets": targets}


def above_range(case, head):
    targets = case["targets"].clone()
    targets[::10] = targets[::10] + head.last
    return without(case, "boxes") | {"targets": targets}


def above_range_by_boxes(case, head):
    boxes = case["boxes"].clone()
    boxes[::10, 2:] += case["stride"][::10] * (head.last + 1)
    targets = dflkern.bbox2dist(case["anchor_points"], boxes / case["stride"])
    return case | {"boxes": boxes, "targets": targets.clamp(head.low, head.last - head.margin)}


def at_clamp(case, head):
    targets = case["targets"].clone()
    targets[::8] = head.last - head.margin
    return without(case, "boxes") | {"targets": targets}


def integer_only(case, head):
    return without(case, "boxes") | {"targets": case["targets"].round().clamp(max=head.last - 1)}


def extra_bin(case, head):
    logits = torch.cat((case["logits"], case["logits"][..., -1:] - 1), -1)
    return case | {"logits": logits}


def extra_bin_unused(case, head):
    """A head of 17 bins, targets clamped for 16, and nobody says how many it should be."""
    bound = head.last - 1 - head.margin
    targets = case["targets"].clamp(max=bound)
    targets[::20, 1] = bound
    return without(case, "boxes", "num_bins") | {"targets": targets}


def bin_major(case, head):
    logits = case["logits"].transpose(1, 2).reshape(case["logits"].shape)
    return case | {"logits": logits}


def bin_major_without_targets(case, head):
    return without(bin_major(case, head), "targets", "boxes")


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
    return without(case, "boxes") | {"targets": targets.bfloat16()}


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
