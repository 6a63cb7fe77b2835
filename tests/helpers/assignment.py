"""Scenes for task_aligned_assign, where rounding decides in them, and the definition in loops."""

import torch

import dflkern

OPTIONS = {
    "topk": 10, "topk2": None, "alpha": 0.5, "beta": 6.0, "iou": "ciou", "min_side": 16.0,
    "conflicts": "inside", "eps": 1e-9,
}  # fmt: skip
STRIDES = (8, 16, 32)
KINDS = ("usual", "crowd", "tiny", "doubles", "border", "one class", "empty image", "empty")
CLOSE = 1e-6  # relative difference below which two fp32 computations may differ in an order


def anchors_of(image):
    """(anchor points in cells, stride) of a square image."""
    return dflkern.make_anchors([(-(-image // s),) * 2 for s in STRIDES], STRIDES)


def objects_of(kind, generator, image):
    """Boxes of one image's objects."""
    count, low, high = {
        "usual": (12, 10, 200), "crowd": (60, 8, 60), "tiny": (30, 2, 8), "doubles": (10, 20, 120),
        "border": (20, 20, 150), "one class": (12, 10, 200), "empty image": (12, 10, 200),
        "empty": (0, 1, 2),
    }[kind]  # fmt: skip
    size = low + (high - low) * torch.rand(count, 2, generator=generator)
    centre = image * torch.rand(count, 2, generator=generator)
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
    if kind == "border":  # of the image, and sides that lie on anchor points
        boxes = boxes + image * torch.rand(count, 1, generator=generator).sub(0.5)
        boxes[:, :2] = (boxes[:, :2] / 4).round() * 4
    if kind == "doubles":
        boxes = boxes.repeat_interleave(2, 0)
    boxes = boxes.clamp(0, image)
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)]


def scene(seed, kind="usual", trained=False, batch=3, image=320, classes=5, boxes=None):
    """The tensors of a call, with objects of a kind or these boxes in each image."""
    g = torch.Generator().manual_seed(seed)
    points, stride = anchors_of(image)
    classes = 1 if kind == "one class" else classes
    of_image = [objects_of(kind, g, image) if boxes is None else boxes for _ in range(batch)]
    if kind == "empty image" and batch > 1:
        of_image[1] = of_image[1][:0]
    gt_boxes = torch.cat(of_image)
    gt_image = torch.repeat_interleave(
        torch.arange(batch), torch.tensor([len(each) for each in of_image])
    )
    gt_labels = torch.randint(0, classes, (len(gt_boxes),), generator=g)
    if kind == "doubles":
        gt_labels = gt_labels[::2].repeat_interleave(2)
    shape = (batch, len(points))
    logits = torch.randn(*shape, classes, generator=g) - 3
    reach = 0.5 + 6 * torch.rand(*shape, 4, generator=g)
    found = dflkern.dist2bbox(reach, points) * stride
    if trained:
        _train(g, logits, found, points * stride, gt_boxes, gt_labels, gt_image)
    return {
        "class_logits": logits, "boxes": found, "anchor_points": points, "stride": stride,
        "gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_image": gt_image,
    }  # fmt: skip


def _train(g, logits, found, points, gt_boxes, gt_labels, gt_image):
    """Let the anchors inside an object predict it, roughly."""
    for box, label, image in zip(gt_boxes, gt_labels, gt_image, strict=True):
        inside = ((points > box[:2]) & (points < box[2:])).all(1)
        noise = torch.randn(int(inside.sum()), 4, generator=g)
        found[image, inside] = box + noise * (box[2:] - box[:2]).repeat(2) * 0.08
        logits[image, inside, label] += 4


def run(given, backend="cpu", **options):
    with dflkern.use_backend(backend):
        return dflkern.task_aligned_assign(**given, **{**OPTIONS, **options})


def same(found, expected):
    """Whether two assignments have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def transposed(given):
    """The layout of a head, with the anchors last."""
    return {**given, "class_logits": given["class_logits"].mT, "boxes": given["boxes"].mT, "dim": 1}


def tables(given, min_side, iou, alpha, beta, **others):
    """(inside, overlap, metric), (N, A) each: every object against every anchor of its image.

    Overlaps and metrics in float64; what is inside is decided in the dtype of the boxes.
    """
    points, (first, second) = (
        given["anchor_points"] * given["stride"],
        given["gt_boxes"].chunk(2, 1),
    )
    if min_side > 0:
        centre, size = (first + second) / 2, second - first
        half = torch.where(size < min_side, min_side, size) / 2
        first, second = centre - half, centre + half
    inside = (points > first[:, None] + 1e-9) & (points < second[:, None] - 1e-9)
    image, label = given["gt_image"], given["gt_labels"]
    boxes = given["gt_boxes"][:, None].double()
    overlap = dflkern.paired_box_iou(boxes, given["boxes"].double()[image], iou).clamp(0, 1)
    score = given["class_logits"].double()[image, :, label].sigmoid()
    return inside.all(-1), overlap, score**alpha * overlap**beta


def close_images(given, **options):
    """Images in which two deciding metrics or overlaps differ by less than CLOSE."""
    options = {**OPTIONS, **options}
    inside, overlap, metric = tables(given, **options)
    found = set()
    candidates = torch.where(inside, metric, 0)
    topk = min(options["topk"], metric.shape[1] - 1)
    ranked = candidates.sort(1, descending=True).values
    found |= set(given["gt_image"][_is_close(ranked[:, topk - 1], ranked[:, topk])].tolist())
    claimed = (candidates >= ranked[:, topk - 1, None] * (1 - CLOSE)) & (candidates > 0)
    rivals = {"inside": inside, "claimed": claimed, "all": torch.ones_like(inside)}
    for image in range(len(given["boxes"])):
        of = given["gt_image"] == image
        contested = claimed[of].sum(0) > 1
        each = torch.where(rivals[options["conflicts"]][of], overlap[of], -1)[:, contested]
        if len(each) > 1 and each.shape[1]:
            first, second = each.topk(2, 0).values
            if _is_close(first, second).any():
                found.add(image)
    return found


def _is_close(larger, smaller):
    """Close, but not the same: what is equal in float64 comes from equal numbers."""
    gap = larger - smaller
    return (gap > 0) & (gap < CLOSE * larger)


def by_loops(given, fault=None, **options):
    """The definition, image by image and object by object, with one of FAULTS or none."""
    options = {**OPTIONS, **options}
    topk, topk2 = options["topk"], options["topk2"] or options["topk"]
    if fault == "topk off by one":
        topk += 1
    if fault == "no minimum side":
        options["min_side"] = 0.0
    inside, overlap, metric = tables(given, **options)
    batch, anchors = given["boxes"].shape[:2]
    matched, score = torch.full((batch, anchors), -1), torch.zeros(batch, anchors).double()
    for image in range(batch):
        objects = (given["gt_image"] == image).nonzero()[:, 0].tolist()
        first_cut = topk2 if fault == "topk2 before conflicts" else topk
        claims = {n: _best(metric[n], inside[n], first_cut, fault) for n in objects}
        final = {n: set() for n in objects}
        for anchor in sorted(set().union(*claims.values())):
            claimers = [n for n in objects if anchor in claims[n]]
            final[_winner(anchor, claimers, objects, inside, overlap, metric, options, fault)].add(
                anchor
            )
        for n, mine in final.items():
            if topk2 < topk and fault != "topk2 before conflicts":
                chosen = torch.zeros_like(inside[n])
                chosen[list(mine)] = True
                mine = _best(metric[n], chosen, topk2, fault)
            for anchor in mine:
                most = max(float(metric[n, a]) for a in mine)
                reach = max(float(overlap[n, a]) for a in mine)
                share = float(metric[n, anchor]) * reach / (most + options["eps"])
                matched[image, anchor] = n
                score[image, anchor] = (
                    metric[n, anchor] if fault == "score not normalized" else share
                )
    return matched.int(), score.float(), score.sum().float()


FAULTS = (
    "topk off by one",
    "no minimum side",
    "conflicts among claimers only",
    "conflicts among all objects",
    "conflicts by metric",
    "conflicts to the last object",
    "ties to the last anchor",
    "topk2 before conflicts",
    "metrics of 0 claimed",
    "score not normalized",
)


def _best(metric, candidates, count, fault):
    """The anchors of the largest metrics."""
    anchors = candidates.nonzero()[:, 0].tolist()
    if fault != "metrics of 0 claimed":
        anchors = [a for a in anchors if metric[a] > 0]
    sign = -1 if fault == "ties to the last anchor" else 1
    return set(sorted(anchors, key=lambda a: (-float(metric[a]), sign * a))[:count])


def _winner(anchor, claimers, objects, inside, overlap, metric, options, fault):
    """The object that an anchor goes to."""
    if len(claimers) == 1:
        return claimers[0]
    conflicts = options["conflicts"]
    conflicts = "claimed" if fault == "conflicts among claimers only" else conflicts
    conflicts = "all" if fault == "conflicts among all objects" else conflicts
    within = [n for n in objects if inside[n, anchor]]
    rivals = {"inside": within, "claimed": claimers, "all": objects}[conflicts]
    rivals = rivals[::-1] if fault == "conflicts to the last object" else rivals
    by = metric if fault == "conflicts by metric" else overlap
    return max(rivals, key=lambda n: float(by[n, anchor]))  # of equal ones the first


def differences(found, wanted, images=None):
    """Anchors matched otherwise, and the largest difference of two scores, in some images."""
    images = list(range(len(found[0]))) if images is None else sorted(images)
    other = int((found[0] != wanted[0])[images].sum())
    gap = (found[1] - wanted[1])[images].abs()
    return other, float(gap.max()) if gap.numel() else 0.0
