"""Ultralytics' criterion without its model, its inputs, and runs of it with and without patch()."""

import warnings
from types import SimpleNamespace

import torch
import ultralytics
from ultralytics.nn.modules import block, head
from ultralytics.utils import loss

from dflkern.adapters.ultralytics import patch

OLD = ultralytics.__version__.startswith("8.3")
FUNCTIONS = [
    (loss.DFLoss, "__call__"),
    (loss.BboxLoss, "forward"),
    (loss.v8DetectionLoss, "bbox_decode"),
    (loss.v8OBBLoss, "bbox_decode"),
    (block.DFL, "forward"),
    (head.OBB, "decode_bboxes"),
]
BINS, ANCHORS = 16, 80
POSITIONS = torch.arange(BINS, dtype=torch.float)
OTHER_POSITIONS = torch.linspace(0, 20, BINS)


def installed():
    """What the classes hold now."""
    return [vars(owner)[name] for owner, name in FUNCTIONS]


ORIGINAL = installed()


def inputs(dtype=torch.float32, foreground=0.3):
    """What a criterion passes on: rounded to dtype where autocast would round it."""
    width = 10
    index = torch.arange(ANCHORS)
    points = torch.stack((index % width, index // width), -1) + 0.5
    corners = torch.rand(2, ANCHORS, 4) * 17  # some sides beyond the last bin
    boxes = torch.cat((points - corners[..., :2], points + corners[..., 2:]), -1)
    scores = torch.rand(2, ANCHORS, 3)
    return SimpleNamespace(
        logits=(torch.randn(2, ANCHORS, 4 * BINS) * 3).to(dtype),
        points=points.to(dtype),
        angle=torch.rand(2, ANCHORS, 1).to(dtype),
        boxes=boxes,
        scores=scores,
        total=scores.sum(),
        foreground=torch.rand(2, ANCHORS) < foreground,
    )


def double(given):
    """The same numbers in float64."""
    return SimpleNamespace(
        **{k: v.double() if v.is_floating_point() else v for k, v in vars(given).items()}
    )


def criterion(kind=loss.v8DetectionLoss, proj=POSITIONS):
    """A criterion of a class, with what its decode and its box loss read."""
    made = object.__new__(kind)
    made.use_dfl, made.proj = True, proj.clone()
    made.bbox_loss = loss.BboxLoss(BINS)
    return made


def box_losses(bbox_loss, logits, decoded, given):
    """(IoU loss, DFL loss)."""
    image = [] if OLD else [torch.ones(2), torch.ones(ANCHORS, 1)]
    return bbox_loss(
        logits, decoded, given.points, given.boxes, given.scores, given.total, given.foreground,
        *image,
    )  # fmt: skip


def with_gradient(leaf, *results):
    """Values, and the gradient of a leaf for random upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.rand(r.shape, generator=generator).to(r.dtype) for r in results]
    return [r.detach() for r in results], torch.autograd.grad(results, leaf, upstream)[0]


def rotate_at_inference(distances, points, angle):
    """`OBB.decode_bboxes` of (B, 4, A); Ultralytics 8.3 keeps the angle in the head."""
    if OLD:
        return head.OBB.decode_bboxes(SimpleNamespace(angle=angle), distances, points)
    return head.OBB.decode_bboxes(None, distances, points, angle)


def run(made, given):
    """Boxes, losses and the gradient of the logits, as the criterion's own loss calls them."""
    leaf = given.logits.clone().requires_grad_()
    logits = leaf * 1.0
    boxes = made.bbox_decode(given.points, logits)
    return with_gradient(leaf, boxes * 1.0, *box_losses(made.bbox_loss, logits, boxes, given))


def said(record):
    """The reasons of dflkern's warnings."""
    texts = [str(each.message) for each in record]
    return [text for text in texts if text.startswith("dflkern: Ultralytics ")]


def compare(call, *reasons, calls=2):
    """The same results patched as unpatched, and one warning for each of the reasons."""
    expected = [call() for _ in range(calls)]
    with patch(), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        actual = [call() for _ in range(calls)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(said(record)) == len(reasons), said(record)
    for text, reason in zip(said(record), reasons, strict=True):
        assert f"because {reason}. This is said once." in text
