"""Every error a user can cause: its type, what was given, what is accepted, the way out."""

import math

import pytest
import torch

import dflkern

Z = torch.zeros(8, 4, 16)
T = torch.zeros(8, 4)
HEAD = torch.zeros(2, 4, 16, 5)
ANCHORS, STRIDE = dflkern.make_anchors([(2, 2), (1, 1)], [8, 16])
BOXES, WEIGHT = torch.zeros(2, 5, 4), torch.zeros(2, 5)


def loss(logits=Z, target=T, **options):
    return dflkern.dfl_loss(logits, target, **options)


def boxes(logits=HEAD, anchor_points=ANCHORS, stride=STRIDE, dim=2, **options):
    return dflkern.decode_boxes(logits, anchor_points, stride, dim=dim, **options)


def box_loss(
    logits=HEAD, anchor_points=ANCHORS, target_boxes=BOXES, weight=WEIGHT, normalizer=1.0, **options
):
    return dflkern.box_loss(
        logits, anchor_points, target_boxes, weight, normalizer, **{"dim": 2, **options}
    )


SCORES, FOUND = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)
OBJECTS, INDEX = torch.zeros(7, 4), torch.zeros(7, dtype=torch.int64)


def assign(
    class_logits=SCORES, boxes=FOUND, anchor_points=ANCHORS, stride=STRIDE, gt_boxes=OBJECTS,
    gt_labels=INDEX, gt_image=INDEX, **options,
):  # fmt: skip
    return dflkern.task_aligned_assign(
        class_logits, boxes, anchor_points, stride, gt_boxes, gt_labels, gt_image, **options
    )


def with_grad(tensor):
    return tensor.clone().requires_grad_()


CASES = [
    # given, accepted, way out
    (loss, {"logits": [[1.0]]}, TypeError, "logits is a list; a floating-point torch.Tensor", "as_tensor"),
    (loss, {"logits": Z.long()}, TypeError, "logits has dtype torch.int64; float16, bfloat16", ".float()"),
    (loss, {"logits": Z.to(torch.float8_e5m2)}, TypeError, "float8_e5m2; float16, bfloat16", "logits.float()"),
    (loss, {"logits": torch.zeros(())}, ValueError, "no dimension; at least one", "shape (num_bins,)"),
    (loss, {"dim": 3}, ValueError, "dim=3 is out of range for logits of shape (8, 4, 16); -3 to 2", "axis of the bins"),
    (loss, {"dim": 1.0}, TypeError, "dim is 1.0; an integer", "torch.softmax"),
    (loss, {"logits": Z[..., :1]}, ValueError, "1 bins along dim=2; 2 to 256", "reg_max: 1"),
    (loss, {"logits": torch.zeros(8, 4, 257)}, ValueError, "257 bins", "logits.view(B, 4, K, A)"),
    (loss, {"target": T.long()}, TypeError, "target has dtype torch.int64; float16", "target.float()"),
    (loss, {"target": T[:, :3]}, ValueError, "target has shape (8, 3), but", "shape (8, 4): one value per"),
    (loss, {"target": T.reshape(-1)}, ValueError, "target has shape (32,)", "Reshape the target"),
    (loss, {"target": with_grad(T)}, ValueError, "target requires grad", "target.detach()"),
    (loss, {"target": T.to("meta")}, ValueError, "target is on meta and the first tensor is on cpu", ".to('cpu')"),
    (loss, {"weight": torch.zeros(8, 4, 1)}, ValueError, "weight has shape (8, 4, 1), which does not", "(N, 1)"),
    (loss, {"weight": torch.zeros(3, 4)}, ValueError, "weight has shape (3, 4)", "target's shape (8, 4)"),
    (loss, {"weight": with_grad(T)}, ValueError, "weight requires grad", "weight.detach()"),
    (loss, {"weight": T.int()}, TypeError, "weight has dtype torch.int32", "weight.float()"),
    (loss, {"margin": 1.0}, ValueError, "margin=1.0; it must be at least 0 and", "0.01 is Ultralytics'"),
    (loss, {"margin": -0.1}, ValueError, "margin=-0.1", "below 1"),
    (loss, {"margin": math.nan}, ValueError, "margin=nan", "at least 0"),
    (loss, {"margin": "0"}, TypeError, "margin is '0'; a float", "0.01"),
    (loss, {"reduction": "avg"}, ValueError, "reduction='avg' is not known; accepted", "'none', 'sum', 'mean', 'side_mean'"),
    (loss, {"reduction": "mean", "normalizer": 2.0}, ValueError, 'given with reduction="mean"', 'Pass reduction="sum" with it'),
    (loss, {"reduction": "sum", "normalizer": torch.ones(1)}, ValueError, "normalizer has shape (1,)", "() is needed"),
    (loss, {"reduction": "sum", "normalizer": True}, TypeError, "normalizer is True", "a number is needed"),
    (loss, {"logits": Z[0, 0], "target": T[0, 0], "reduction": "side_mean"}, ValueError, "shape (16,) have none there", "(N, 4, num_bins)"),
    (loss, {"project": range(15)}, ValueError, "15 positions for 16 bins", "one position for each"),
    (loss, {"project": [0, *range(15)]}, ValueError, "project[1]=0.0 does not lie above project[0]=0.0", "Sort them"),
    (loss, {"project": [*range(15), math.inf]}, ValueError, "project[15] is inf", "finite positions"),
    (loss, {"project": [k / 100 for k in range(16)], "margin": 0.2}, ValueError, "margin=0.2 is not below the width", "units of project"),
    (loss, {"project": torch.zeros(2, 8)}, ValueError, "project has shape (2, 8); (16,)", "each bin"),
    (loss, {"project": torch.arange(16)}, TypeError, "project has dtype torch.int64", "project.float()"),
    (loss, {"project": with_grad(torch.arange(16.0))}, ValueError, "project requires grad", "project.detach()"),
    (boxes, {"logits": Z}, ValueError, "logits have shape (8, 4, 16) with dim=2; boxes need 4-D", "logits.view(B, 4, K, A)"),
    (boxes, {"dim": 1}, ValueError, "dim=1; boxes need", "dim=-1"),
    (boxes, {"logits": torch.zeros(2, 5, 16, 5)}, ValueError, "5 sides along axis 1; 4 are needed", "before the bins"),
    (boxes, {"anchor_points": ANCHORS[:3]}, ValueError, "anchor_points have shape (3, 2); (5, 2)", "make_anchors"),
    (boxes, {"stride": STRIDE[:2]}, ValueError, "stride has shape (2, 1); (5, 1) or (5,)", "needed"),
    (boxes, {"stride": STRIDE.long()}, TypeError, "stride has dtype torch.int64", "stride.float()"),
    (boxes, {"box_format": "yxyx"}, ValueError, "box_format='yxyx' is not known", "'xyxy', 'cxcywh'"),
    (boxes, {"box_format": "xywh"}, ValueError, 'box_format="xywh" means corner and size in some', "box_convert"),
    (box_loss, {"target_boxes": BOXES[:1]}, ValueError, "target_boxes has shape (1, 5, 4); (2, 5, 4)", "needed"),
    (box_loss, {"weight": WEIGHT[:, :2]}, ValueError, "weight has shape (2, 2); (2, 5)", "needed"),
    (box_loss, {"weight": torch.zeros(2, 4, 3)}, ValueError, "weight has shape (2, 4, 3); (2, 5, 3)", "needed"),
    (box_loss, {"normalizer": torch.ones(1)}, ValueError, "normalizer has shape (1,); ()", "needed"),
    (box_loss, {"normalizer": None}, TypeError, "normalizer is None; a number", "needed"),
    (box_loss, {"foreground": WEIGHT}, TypeError, "foreground is torch.float32; a bool", "foreground.bool()"),
    (box_loss, {"foreground": WEIGHT[:1].bool()}, ValueError, "foreground has shape (1, 5); (2, 5)", "needed"),
    (box_loss, {"iou": "siou"}, ValueError, "iou='siou' is not known", "'iou', 'giou', 'diou', 'ciou'"),
    (loss, {"logits": Z.to_sparse()}, TypeError, "logits is of layout torch.sparse_coo; a dense", "logits.to_dense()"),
    (loss, {"target": T.to_sparse()}, TypeError, "target is of layout torch.sparse_coo; a dense", "target.to_dense()"),
    (loss, {"logits": torch.nested.nested_tensor([Z[0], Z[1]])}, TypeError, "logits is a nested tensor", "to_padded_tensor"),
    (loss, {"logits": torch.quantize_per_tensor(Z, 1, 0, torch.qint8)}, TypeError, "dtype torch.qint8", "logits.dequantize()"),
    (loss, {"target": T.to(torch.float8_e5m2)}, TypeError, "target has dtype torch.float8_e5m2", "target.float()"),
    (loss, {"project": 3}, TypeError, "project is 3; increasing floats", "for each bin"),
    (loss, {"project": "abc"}, TypeError, "project is 'abc'; increasing floats", "for each bin"),
    (loss, {"project": []}, ValueError, "project has 0 positions; one for each bin", "2 at least"),
    (loss, {"project": [1e300 * k for k in range(16)]}, ValueError, "equal or infinite in float32", "fp64 logits"),
    (loss, {"project": [1e9 + k for k in range(16)]}, ValueError, "equal or infinite in float32", "Shift or scale"),
    (boxes, {"stride": "8"}, TypeError, "stride is '8'; a number", "needed"),
    (boxes, {"stride": 1e300}, ValueError, "stride is too large a number for torch.float32", "fp64 logits"),
    (box_loss, {"normalizer": 1e300}, ValueError, "normalizer is too large a number for torch.float32", "fp64"),
    (box_loss, {"normalizer": 10**400}, ValueError, "normalizer is too large a number", "Scale it"),
    (box_loss, {"normalizer": True}, TypeError, "normalizer is True; a number", "needed"),
    (box_loss, {"weight": WEIGHT.to(torch.float8_e4m3fn)}, TypeError, "weight has dtype torch.float8_e4m3fn", "weight.float()"),
    (box_loss, {"weight": with_grad(WEIGHT)}, ValueError, "weight requires grad", "weight.detach()"),
    (assign, {"class_logits": SCORES.long()}, TypeError, "class_logits has dtype torch.int64; float16", "class_logits.float()"),
    (assign, {"class_logits": SCORES[0]}, ValueError, "class_logits have shape (5, 3); three axes", "torch.cat("),
    (assign, {"dim": 0}, ValueError, "dim=0 is not an axis of classes; -1", "1 for (B, C, A)"),
    (assign, {"dim": 1.0}, TypeError, "dim is 1.0; an integer", "torch.softmax"),
    (assign, {"boxes": FOUND.mT}, ValueError, "boxes has shape (2, 4, 5); (2, 5, 4)", "is needed"),
    (assign, {"boxes": FOUND.to("meta")}, ValueError, "boxes is on meta and the first tensor is on cpu", ".to('cpu')"),
    (assign, {"dim": 1}, ValueError, "boxes has shape (2, 5, 4); (2, 4, 3)", "is needed"),
    (assign, {"anchor_points": ANCHORS[1:]}, ValueError, "anchor_points have shape (4, 2); (5, 2)", "make_anchors"),
    (assign, {"stride": STRIDE[1:]}, ValueError, "stride has shape (4, 1); (5, 1) or (5,)", "is needed"),
    (assign, {"stride": None}, TypeError, "stride is None; a number", "is needed"),
    (assign, {"gt_boxes": OBJECTS[None]}, ValueError, "gt_boxes have shape (1, 7, 4); (N, 4)", "gt_image says"),
    (assign, {"gt_boxes": OBJECTS.int()}, TypeError, "gt_boxes has dtype torch.int32", "gt_boxes.float()"),
    (assign, {"gt_labels": INDEX.float()}, TypeError, "gt_labels is torch.float32; a tensor of int32 or int64", "gt_labels.long()"),
    (assign, {"gt_image": [0] * 7}, TypeError, "gt_image is a list; a tensor of int32", "gt_image.long()"),
    (assign, {"gt_image": INDEX[1:]}, ValueError, "gt_image has shape (6,); (7,)", "one number for each object"),
    (assign, {"gt_image": INDEX.to("meta")}, ValueError, "gt_image is on meta", ".to('cpu')"),
    (assign, {"topk": 0}, ValueError, "topk=0; a whole number of at least 1", "is needed"),
    (assign, {"topk": 2.0}, TypeError, "topk is 2.0; a whole number", "is needed"),
    (assign, {"topk2": 11}, ValueError, "topk2=11; 1 to 10", "is needed"),
    (assign, {"alpha": -1}, ValueError, "alpha=-1; a finite number of at least 0", "is needed"),
    (assign, {"beta": math.inf}, ValueError, "beta=inf; a finite number", "is needed"),
    (assign, {"min_side": math.nan}, ValueError, "min_side=nan; a finite number", "is needed"),
    (assign, {"eps": "1e-9"}, TypeError, "eps is '1e-9'; a number", "is needed"),
    (assign, {"iou": "x"}, ValueError, "iou='x' is not known; accepted", "'ciou'"),
    (assign, {"conflicts": "none"}, ValueError, "conflicts='none' is not known; accepted", "'inside', 'claimed', 'all'"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "kind", "first", "second"), CASES)
def test_words(function, given, kind, first, second):
    with pytest.raises(kind) as error:
        function(**given)
    words = str(error.value)
    assert first in words
    assert second in words
    names = ("dfl_loss", "decode_boxes", "box_loss", "task_aligned_assign")
    assert words.partition(":")[0] in names
    assert words.endswith(".")


@pytest.mark.parametrize("function", [dflkern.dfl_loss_and_decode, dflkern.dfl_decode])
def test_the_other_functions_name_themselves(function):
    arguments = (Z.long(), T) if "loss" in function.__name__ else (Z.long(),)
    with pytest.raises(TypeError, match=f"^{function.__name__}: logits has dtype"):
        function(*arguments)


def test_target_may_require_grad_where_no_gradient_is_taken():
    with torch.no_grad():
        assert loss(target=with_grad(T)).shape == T.shape


def test_geometry():
    square = torch.zeros(1, 4)
    cases = [
        (lambda: dflkern.bbox2dist(torch.zeros(1, 3), square), ValueError, "anchor_points have shape (1, 3)"),
        (lambda: dflkern.bbox2dist(torch.zeros(1, 2), torch.zeros(1, 5)), ValueError, "boxes has shape (1, 5)"),
        (lambda: dflkern.bbox2dist(torch.zeros(1, 2), square, 0), ValueError, "max_dist=0"),
        (lambda: dflkern.bbox2dist(torch.zeros(1, 2).long(), square), TypeError, "anchor_points has dtype"),
        (lambda: dflkern.dist2bbox(square, torch.zeros(1, 2), box_format="x"), ValueError, "box_format='x'"),
        (lambda: dflkern.dfl_targets(square, torch.zeros(1, 2), 8, 1), ValueError, "num_bins=1"),
        (lambda: dflkern.dfl_targets(square, torch.zeros(1, 2), 8, 16, margin=1), ValueError, "margin=1"),
        (lambda: dflkern.dfl_targets(square.int(), torch.zeros(1, 2), 8, 16), TypeError, "boxes has dtype torch.int32"),
        (lambda: dflkern.paired_box_iou(square, square, "x"), ValueError, "kind='x'"),
        (lambda: dflkern.make_anchors([(1, 1)], [8, 16]), ValueError, "1 sizes and 2 strides"),
        (lambda: dflkern.make_anchors([(1, -1)], [8]), ValueError, "size of a level is (1, -1); (height, width)"),
        (lambda: dflkern.make_anchors([(1, 1.5)], [8]), ValueError, "size of a level is (1, 1.5)"),
        (lambda: dflkern.make_anchors([4], [8]), ValueError, "size of a level is 4"),
        (lambda: dflkern.make_anchors([(1, 1)], ["8 px"]), ValueError, "stride='8 px'; pixels per cell"),
        (lambda: dflkern.make_anchors([(1, 1)], [0]), ValueError, "stride=0; pixels per cell"),
        (lambda: dflkern.dfl_targets(square, torch.zeros(1, 2), -8, 16), ValueError, "stride=-8; pixels per cell"),
        (lambda: dflkern.dfl_targets(square, torch.zeros(1, 2), torch.ones(3), 16), ValueError, "stride has shape (3,)"),
        (lambda: dflkern.dfl_targets(square, torch.zeros(1, 2), 8, 16.5), ValueError, "num_bins=16.5"),
        (lambda: dflkern.bbox2dist(torch.zeros(1, 2), square, "x"), TypeError, "max_dist is 'x'"),
        (lambda: dflkern.bbox2dist(torch.zeros(2, 2), torch.zeros(3, 4)), ValueError, "do not broadcast"),
        (lambda: dflkern.dist2bbox(torch.zeros(3, 4), torch.zeros(2, 2)), ValueError, "do not broadcast"),
        (lambda: dflkern.paired_box_iou(torch.zeros(3, 4), torch.zeros(2, 4)), ValueError, "do not broadcast"),
        (lambda: dflkern.paired_box_iou(square.to(torch.float8_e5m2), square), TypeError, "float8_e5m2"),
    ]  # fmt: skip
    for call, kind, words in cases:
        with pytest.raises(kind) as error:
            call()
        assert words in str(error.value)


def test_modules():
    with pytest.raises(ValueError, match="does not lie above"):
        dflkern.DFLoss(project=[0, 2, 1])
    with pytest.raises(ValueError, match="reduction='x'"):
        dflkern.DFLoss(reduction="x")
    with pytest.raises(ValueError, match="margin=2"):
        dflkern.BoxLoss(margin=2)
    with pytest.raises(ValueError, match="iou='x'"):
        dflkern.BoxLoss(iou="x")
    for module in (dflkern.DFLoss, dflkern.DFLDecode, dflkern.BoxLoss):
        with pytest.raises(ValueError, match="project has 0 positions"):
            module(project=[])
        with pytest.raises(TypeError, match="increasing floats"):
            module(project=torch.zeros(2, 3))
        with pytest.raises(TypeError, match="dim is 'x'; an integer"):
            module(dim="x")
    with pytest.raises(ValueError, match="dim=7 names no axis of bins; -1 or 2"):
        dflkern.BoxLoss(dim=7)


def test_stride_may_be_a_number():
    """A fp64 call keeps its digits; a compiled one takes a new number."""
    head = torch.randn(2, 4, 16, 5, dtype=torch.float64)
    expected = boxes(head, stride=torch.full((5,), 8.1, dtype=torch.float64))
    assert torch.equal(boxes(head, stride=8.1), expected)
    anchors, stride = dflkern.make_anchors([(2, 2), (1, 1)], torch.tensor([8.0, 16.0]))
    assert torch.equal(anchors, ANCHORS)
    assert torch.equal(stride, STRIDE)


def test_a_named_backend_that_cannot_serve_gives_its_reasons():
    with (
        dflkern.use_backend("cuda"),
        pytest.raises(RuntimeError, match='"cuda" was asked for and cannot serve') as error,
    ):
        loss()
    assert "not built" in str(error.value) or "on cpu" in str(error.value)
    assert "32 distributions of 16 bins, float32 on cpu" in str(error.value)
    assert 'use_backend("auto")' in str(error.value)


def test_explain():
    text = dflkern.explain("dfl_loss", Z, T)
    assert "dfl_loss: 32 distributions of 16 bins, float32 on cpu, rows layout" in text
    assert "serves it" in text
    with dflkern.use_backend("reference"):
        text = dflkern.explain("dfl_loss", Z, T)
    assert "reference: serves it (plain PyTorch operations" in text
    with dflkern.use_backend("triton"):
        text = dflkern.explain("dfl_loss", Z, T, reduction="sum")
    assert "rows_chunk_forward_kernel, grid (1, 1, 1), block 128" in text
    assert "rows_tile_backward_kernel" in text
    assert "box_loss" in dflkern.explain(
        "box_loss", HEAD, ANCHORS, BOXES, WEIGHT, 1.0, dim=2, foreground=WEIGHT.bool()
    )
    with pytest.raises(ValueError, match="op='loss' is not known"):
        dflkern.explain("loss", Z, T)
    with pytest.raises(ValueError, match="target has shape"):
        dflkern.explain("dfl_loss", Z, T[:1])


def test_triton_off_the_interpreter_is_refused_on_the_cpu(monkeypatch):
    from dflkern.gpu import launch
    from dflkern.operators import backends

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    backends.forget()
    with dflkern.use_backend("triton"), pytest.raises(RuntimeError, match="on the CPU, where"):
        loss()
    backends.forget()
