"""The seed of this library: targets in the wrong units, and the one right way to make them."""

import pytest
import torch

import dflkern


def test_anchor_inside_a_box():
    """Anchor (5, 5), box (2, 2, 8, 8): 3 to every side."""
    anchor, box = torch.tensor([[5.0, 5.0]]), torch.tensor([[2.0, 2.0, 8.0, 8.0]])
    expected = torch.full((1, 4), 3.0)
    assert torch.equal(dflkern.dfl_targets(box, anchor, 1, 16), expected)
    assert torch.equal(dflkern.bbox2dist(anchor, box, 15), expected)
    assert torch.equal(dflkern.bbox2dist(anchor, box), expected)
    assert torch.equal(dflkern.dfl_targets(box * 8, anchor, 8, 16), expected)


def test_200_pixels_at_stride_8():
    """A 200 × 200 box around the anchor at (25, 25): 100 pixels, 12.5 cells, to every side."""
    box, anchor = torch.tensor([[100.0, 100.0, 300.0, 300.0]]), torch.tensor([[25.0, 25.0]])
    expected = torch.full((1, 4), 12.5)
    for stride in (8, 8.0, torch.tensor(8.0), torch.tensor([8.0]), torch.tensor([[8.0]])):
        assert torch.equal(dflkern.dfl_targets(box, anchor, stride, 16), expected)


def test_the_mistakes_give_other_numbers():
    """Normalised coordinates, and distances without the stride, as in the failed training."""
    box, anchor = torch.tensor([[100.0, 100.0, 300.0, 300.0]]), torch.tensor([[200.0, 200.0]])
    coordinates = (box / 640 * 16).clamp(0, 16)
    right = dflkern.dfl_targets(box, anchor / 8, 8, 16)
    assert coordinates[0].tolist() == pytest.approx([2.5, 2.5, 7.5, 7.5])
    assert not torch.isclose(coordinates, right).any()
    no_stride = dflkern.bbox2dist(anchor, box, 15)
    assert no_stride[0].tolist() == pytest.approx([14.99] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [15.99, 15.0, 16.0, 6e4, float("inf")])
def test_sixteen_bins_are_never_read_at_the_seventeenth(backend, device, dtype, given):
    """The seed clamps to 15.99 for 16 bins, whose right neighbour would be bin 16."""
    logits = torch.randn(3, 17, device=device)
    logits[:, 16] = float("nan")  # what lies behind the 16 bins
    target = torch.full((3,), given, dtype=dtype, device=device)
    for rows in (logits[:, :16], logits[:, :16].contiguous()):
        loss = dflkern.dfl_loss(rows, target)
        at_bound = dflkern.dfl_loss(rows, torch.full((3,), 14.99, device=device))
        torch.testing.assert_close(loss, at_bound)
        assert loss.isfinite().all()


def test_clamp_is_below_the_last_bin():
    box = torch.tensor([[-1000.0, 300.0, 5000.0, 5000.0]])
    anchor = torch.tensor([[25.5, 25.5]])
    targets = dflkern.dfl_targets(box, anchor, 8, 16)
    assert targets.dtype == torch.float32
    assert targets[0].tolist() == pytest.approx([14.99, 0, 14.99, 14.99])
    assert dflkern.dfl_targets(box, anchor, 8, 16, margin=0)[0, 0] == 15
    assert dflkern.dfl_targets(box.bfloat16(), anchor.bfloat16(), 8, 16).max() < 15
    assert dflkern.dfl_targets(box * float("nan"), anchor, 8, 16).isnan().all()


def test_anchors_of_all_levels():
    """Anchor points and stride as make_anchors gives them."""
    anchors, stride = dflkern.make_anchors([(8, 8), (4, 4), (2, 2)], [8, 16, 32])
    box = torch.tensor([10.0, 12.0, 50.0, 44.0])
    targets = dflkern.dfl_targets(box, anchors, stride, 16)
    assert targets.shape == (84, 4)
    inside = (targets > 0).all(-1)
    decoded = dflkern.dist2bbox(targets[inside], anchors[inside]) * stride[inside]
    assert inside.sum() > 10
    torch.testing.assert_close(decoded, box.expand_as(decoded))
    batched = dflkern.dfl_targets(box.expand(2, 84, 4), anchors, stride[:, 0], 16)
    assert torch.equal(batched, targets.expand(2, 84, 4))


def test_inputs_are_not_changed():
    box, anchor = torch.tensor([[100.0, 100.0, 900.0, 300.0]]), torch.tensor([[200.0, 200.0]])
    before = box.clone(), anchor.clone()
    dflkern.dfl_targets(box, anchor, 8, 16)
    assert torch.equal(box, before[0])
    assert torch.equal(anchor, before[1])
