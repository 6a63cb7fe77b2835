"""Known values: closed forms and worked examples from the detectors' own formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import dflkern
from support import run


def weighting_function(up=0.5, scale=4.0, last=32):
    """D-FINE's non-uniform positions: ends ±2·up·scale, geometric steps, 0 in the middle."""
    bound = up * scale
    step = (bound + 1) ** (2 / (last - 2))
    right = [step**k - 1 for k in range(1, last // 2)]
    return [-2 * bound, *(-x for x in reversed(right)), 0.0, *right, 2 * bound]


def ramp(num_bins, slope=0.1, count=1, dtype=torch.float64):
    return (torch.arange(num_bins, dtype=dtype) * slope).expand(count, num_bins).contiguous()


def test_uniform_logits(backend, device):
    target = torch.tensor([0, 3.5, 14, 14.99], device=device)
    loss, position = dflkern.dfl_loss_and_decode(torch.full((4, 16), 0.3, device=device), target)
    assert loss.tolist() == pytest.approx([2.77258872] * 4, abs=1e-6)
    assert position.tolist() == pytest.approx([7.5] * 4, abs=1e-5)
    for num_bins, entropy, middle in ((8, 2.07944, 3.5), (17, 2.83321, 8), (33, 3.49651, 16)):
        logits = torch.zeros(1, num_bins, device=device)
        loss, position = dflkern.dfl_loss_and_decode(logits, torch.ones(1, device=device))
        assert loss.item() == pytest.approx(entropy, abs=1e-5)
        assert position.item() == pytest.approx(middle, abs=1e-5)


def test_ramp(backend, device):
    logits = ramp(16, count=4).to(device).requires_grad_()
    target = torch.tensor([2.25, 0, 7, 14.99], dtype=torch.float64, device=device)
    loss, position = dflkern.dfl_loss_and_decode(logits, target)
    expected = [3.40165145, 3.62665145, 2.92665145, 2.12765145]
    assert loss.tolist() == pytest.approx(expected, abs=1e-8)
    assert loss.mean().item() == pytest.approx(3.02065145, abs=1e-8)
    assert position.tolist() == pytest.approx([9.53919367] * 4, abs=1e-8)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    y = torch.zeros(4, 16, dtype=torch.float64)
    for row, (left, right_weight) in enumerate([(2, 0.25), (0, 0.0), (7, 0.0), (14, 0.99)]):
        y[row, left], y[row, left + 1] = 1 - right_weight, right_weight
    torch.testing.assert_close(gradient.cpu(), logits.detach().cpu().softmax(1) - y)


def test_clamp(backend, device):
    """Targets −3, 100, 15 and 14.995 with 16 bins: bins 0 and 14, left weight 0.010000229."""
    logits = torch.randn(1, 16, device=device).expand(4, 16)
    loss = dflkern.dfl_loss(logits, torch.tensor([-3, 100, 15, 14.995], device=device))
    log_p = logits[0].double().log_softmax(0)
    left_weight = 0.010000229
    clamped = -left_weight * log_p[14] - (1 - left_weight) * log_p[15]
    expected = [-log_p[0].item(), *[clamped.item()] * 3]
    assert loss.tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("num_bins", "given", "dtype"), [(16, 100.0, torch.bfloat16), (65, 63.99, torch.float16)]
)
def test_low_precision_targets_stay_in_range(backend, device, num_bins, given, dtype):
    """A bf16 clamp at 14.99 rounds up to 15, whose right bin would be the 17th of 16."""
    logits = torch.randn(1, num_bins, device=device)
    target = torch.tensor([given], dtype=dtype, device=device)
    expected = dflkern.dfl_loss(logits, torch.tensor([num_bins - 1.01], device=device))
    if num_bins == 65:
        assert target.item() == 64.0
    assert dflkern.dfl_loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-5)


def test_negative_range(backend, device):
    """PP-YOLOE-SOD: 19 bins from −2."""
    project = [float(k - 2) for k in range(19)]
    logits = ramp(19, count=4).to(device)
    target = torch.tensor([-1.5, 3.25, 15.99, -5], dtype=torch.float64, device=device)
    loss, position = dflkern.dfl_loss_and_decode(logits, target, project=project)
    assert loss[:3].tolist() == pytest.approx([3.94015691, 3.46515691, 2.19115691], abs=1e-8)
    assert position[0].item() == pytest.approx(9.83327072, abs=1e-8)
    first_bin = F.cross_entropy(logits[3:], torch.tensor([0], device=device))
    assert loss[3].item() == pytest.approx(first_bin.item(), abs=1e-12)


def test_dfine(backend, device):
    project = weighting_function()
    assert len(project) == 33
    assert project[0] == -4
    assert project[16] == 0
    logits = ramp(33, 0.05, count=5).to(device)
    target = torch.tensor([0.3, -5, -4, 4, 7], dtype=torch.float64, device=device)
    loss, position = dflkern.dfl_loss_and_decode(logits, target, project=project, margin=0)
    assert loss[0].item() == pytest.approx(3.42870866, abs=2e-6)
    assert position[0].item() == pytest.approx(0.60988856, abs=2e-6)
    ends = F.cross_entropy(
        logits[1:], torch.tensor([0, 0, 32, 32], device=device), reduction="none"
    )
    assert loss[1:].tolist() == pytest.approx(ends.tolist(), abs=1e-12)


def test_dfine_loss_at_nan_target_is_nan(backend, device):
    logits = torch.randn(2, 33, device=device)
    target = torch.tensor([float("nan"), 0.3], device=device)
    loss = dflkern.dfl_loss(logits, target, project=weighting_function(), margin=0)
    assert loss.isnan().tolist() == [True, False]


def test_side_major_layout():
    """One-hot distances 1, 2, 3, 4 around (10.5, 20.5) at stride 8, stored in four ways."""
    hot = torch.full((1, 4, 16), -50.0)
    for side in range(4):
        hot[0, side, side + 1] = 50.0
    anchor = torch.tensor([[10.5, 20.5]])
    stride = torch.tensor([8.0])
    head = hot.reshape(1, 64, 1)  # (B, 4K, A)
    strided = torch.cat([torch.zeros(1, 3, 1), head], 1).transpose(1, 2)[..., 3:]
    rows = head.transpose(1, 2)
    for box_format, expected in (("xyxy", [76, 148, 108, 196]), ("cxcywh", [92, 172, 32, 48])):
        options = {"box_format": box_format}
        boxes = [
            dflkern.decode_boxes(rows.reshape(1, 1, 4, 16), anchor, stride, **options),
            dflkern.decode_boxes(strided.unflatten(2, (4, 16)), anchor, stride, **options),
            dflkern.decode_boxes(head.view(1, 4, 16, 1), anchor, stride, dim=2, **options).mT,
        ]
        for box in boxes:
            assert box.flatten().tolist() == pytest.approx(expected, abs=1e-4)
        bin_major = head.view(1, 16, 4, 1).transpose(1, 2)
        wrong = dflkern.decode_boxes(bin_major, anchor, stride, dim=2, **options)
        assert wrong.flatten().tolist() != pytest.approx(expected, abs=1)


def test_empty_foreground(backend, device):
    """20 000 fp16 logits of 5.0, whose sum times 0 is NaN, and no distribution selected."""
    logits = torch.full((20_000 // 16, 16), 5.0, dtype=torch.float16, device=device)
    assert (logits.sum() * 0).isnan()
    logits.requires_grad_()
    none = logits[:0]
    for reduction in ("sum", "mean"):
        loss = dflkern.dfl_loss(none, torch.zeros(0, device=device), reduction=reduction)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


def test_minus_inf_logits(backend, device):
    logits = torch.zeros(3, 8, device=device)
    logits[0, 4] = -math.inf  # right of an integer target: weight 0, so it costs nothing
    logits[1, 4] = -math.inf  # inside the pair
    logits[2, :] = -math.inf
    target = torch.tensor([3.0, 3.5, 3.0], device=device)
    loss, position = dflkern.dfl_loss_and_decode(logits, target)
    assert loss[0].item() == pytest.approx(math.log(7), abs=1e-6)
    assert loss[1].item() == math.inf
    assert loss[2].isnan()
    assert position[:2].tolist() == pytest.approx([24 / 7] * 2, abs=1e-5)
    assert position[2].isnan()
    _, gradient = run("loss", logits[:2], target[:2], 1)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("num_bins", [16, 17, 91])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_special_values_stay_in_their_distribution(backend, device, layout, num_bins):
    logits = torch.randn(8, num_bins, device=device)
    target = torch.rand(8, device=device) * (num_bins - 1)
    target[1], target[2], target[3] = math.nan, math.inf, -math.inf
    logits[4, 2], logits[5, 0], logits[6, :] = math.inf, math.nan, -math.inf
    dim = 1
    if layout == "columns":
        logits, dim = logits.t().contiguous(), 0
    (loss, position), gradient = run("both", logits, target, dim)
    assert loss.isnan().tolist() == [False, True, False, False, True, True, True, False]
    assert position.isnan().tolist() == [False, False, False, False, True, True, True, False]
    ends = run("loss", logits, target.clamp(0, num_bins - 1), dim)[0][0]
    assert torch.equal(loss[2:4], ends[2:4])
    bad = gradient.isnan().any(dim)
    assert bad.tolist() == [False, True, False, False, True, True, True, False]
    assert gradient.isnan().all(dim).tolist() == bad.tolist()


def test_amp_vector(backend, device):
    """fp16 logits and an fp32 target give fp32, exact for the rounded logits."""
    logits = torch.randn(64, 16, device=device).half()
    target = torch.rand(64, device=device) * 15
    loss, position = dflkern.dfl_loss_and_decode(logits, target)
    exact, exact_position = dflkern.dfl_loss_and_decode(logits.double(), target.double())
    assert loss.dtype == position.dtype == torch.float32
    assert (loss - exact).abs().max() <= 4e-6
    assert (loss - exact).abs().mean() <= 1e-6
    assert (position - exact_position).abs().max() <= 1e-5
