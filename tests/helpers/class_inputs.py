"""Inputs of class_loss in many layouts, its value from an explicit target, and its budget."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflkern
from support import assert_within_budget

KINDS = ("bce", "varifocal", "quality")
LAYOUTS = (
    "rows", "columns", "wide columns", "head slice", "transposed", "row slice", "strided",
    "expanded", "one anchor", "one class", "no image", "no anchor",
)  # fmt: skip


def logits_of(layout, classes, dtype=torch.float32, scale=3.0):
    """Random logits of a named layout, and the axis of their classes."""

    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * scale - 2).to(dtype)

    if layout == "rows":
        return random(3, 301, classes), 2
    if layout == "columns":
        return random(3, classes, 301), 1
    if layout == "wide columns":  # more anchors than the kernels take at once
        return random(2, classes, 2300), 1
    if layout == "head slice":  # the classes behind the box channels, some of the anchors
        return random(2, 7 + classes, 90)[:, 7:, 3:80], -2
    if layout == "transposed":
        return random(2, classes, 77).transpose(1, 2), -1
    if layout == "row slice":
        return random(2, 77, classes + 5)[:, ::2, 2 : 2 + classes], -1
    if layout == "strided":
        return random(2, 2 * classes, 66)[:, ::2, ::3], 1
    if layout == "expanded":
        return random(1, classes, 70).expand(3, -1, -1), 1
    if layout == "one anchor":
        return random(5, 1, classes), 2
    if layout == "one class":
        return random(2, 99, 1), 2
    return random(*((0, 9, classes) if layout == "no image" else (2, 0, classes))), 2


def targets_for(logits, dim, objects=9, score=torch.float32, integer=torch.int32):
    """An assignment with numbers out of range, and the labels of its objects, also out of range."""
    dim %= 3
    batch, anchors, classes = logits.shape[0], logits.shape[3 - dim], logits.shape[dim]
    matched = torch.randint(-objects, objects, (batch, anchors), dtype=integer)
    outside = torch.rand(batch, anchors) < 0.05
    matched[outside] = objects + matched[outside].abs()
    labels = torch.randint(0, classes, (objects,), dtype=integer)
    if objects > 2:
        labels[0], labels[1] = -1, classes
    return SimpleNamespace(
        matched=matched,
        score=torch.rand(batch, anchors).to(score),
        gt_labels=labels,
        normalizer=torch.tensor(max(batch * anchors / 4.0, 1.0)),
    )


def dense(logits, dim, given):
    """(whether a class is that of the anchor's object, the target), with explicit loops."""
    dim %= 3
    like = logits if dim == 2 else logits.transpose(1, 2)
    positive = torch.zeros(like.shape, dtype=torch.bool)
    for image, row in enumerate(given.matched.tolist()):
        for anchor, index in enumerate(row):
            if 0 <= index < len(given.gt_labels):
                label = given.gt_labels[index].item()
                if 0 <= label < like.shape[2]:
                    positive[image, anchor, label] = True
    target = torch.where(positive, given.score.double().unsqueeze(-1), 0)
    if dim == 2:
        return positive, target
    return positive.transpose(1, 2), target.transpose(1, 2)


def from_dense_target(logits, dim, given, kind, alpha=0.75, gamma=2.0, detach=False, weight=None):
    """The loss by PyTorch's binary_cross_entropy_with_logits, in float64, for autograd."""
    dim %= 3
    z = logits.double()
    positive, y = dense(logits, dim, given)
    p = z.sigmoid().detach() if detach else z.sigmoid()
    factor = {
        "bce": torch.ones_like(z),
        "varifocal": torch.where(positive, y, alpha * p**gamma),
        "quality": (p - y).abs() ** gamma,
    }[kind]
    if weight is not None:
        factor = factor * weight.double().reshape((-1, 1) if dim == 1 else (-1,))
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none") * factor
    return loss.sum() / given.normalizer.double()


def run(logits, dim, given, grad=None, **options):
    """The loss and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    loss = dflkern.class_loss(leaf, **vars(given), dim=dim, **options)
    grad = torch.tensor(0.75 if grad is None else grad, dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, grad)
    return [loss.detach()], gradient


def check(logits, dim, given, **options):
    """A call against the same in float64 and in the reference's own dtype, by the error budget."""
    actual = run(logits, dim, given, **options)
    with dflkern.use_backend("reference"):
        peer = run(logits, dim, given, **options)
        exact = run(logits.double(), dim, given, **options)
    assert_within_budget(actual, peer, exact)
    assert actual[1].stride() == torch.empty_like(logits).stride()
    assert actual[1].dtype == logits.dtype
