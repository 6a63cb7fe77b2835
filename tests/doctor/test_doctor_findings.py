"""What single findings of the doctor say: which of several readings, and with which numbers."""

import math

import pytest
import torch

import dflkern
from dflkern import doctor
from dflkern.doctor import Severity


def only(report, code):
    return next(finding for finding in report if finding.code == code)


def codes(report):
    return [finding.code for finding in report]


# --- what lies beyond the last bin --------------------------------------------------------------


def objects(sizes, off_centre, stride):
    """Square objects in pixels, and anchor points that far right of their centres, in cells."""
    size = torch.tensor(sizes, dtype=torch.float32)[:, None]
    centre = torch.full((len(size), 2), 640.0)
    point = centre + torch.tensor(off_centre, dtype=torch.float32)[:, None] * torch.tensor([1, 0])
    steps = torch.tensor(stride, dtype=torch.float32)[:, None]
    boxes = torch.cat((centre - size / 2, centre + size / 2), -1)
    return {"boxes": boxes, "anchor_points": point / steps, "stride": steps, "num_bins": 16}


def test_objects_that_no_anchor_can_express():
    """1 200 px from the centre are 600 px a side, 18.75 cells of 32 px; 15 are in reach."""
    case = objects([200] * 60 + [1200] * 40, [0] * 100, [32] * 100)
    finding = only(doctor.examine(**case), "above-range")
    assert "no side longer than 480 px from its anchor" in finding.title
    assert finding.cause.startswith("100 % of these anchors belong to objects longer than 960 px")
    assert finding.fix == "num_bins = 20; or add a level of stride 64"


def test_anchors_that_cannot_express_an_object_that_others_can():
    """620 px, of which 510 are left of the anchor; 310 from the centre would be in reach."""
    case = objects([620] * 100, [0] * 60 + [200] * 40, [32] * 100)
    finding = only(doctor.examine(**case), "above-range")
    assert finding.share == pytest.approx(0.1)
    assert finding.cause.startswith("All these objects are within 960 px: an anchor nearer")
    assert "960 px" not in finding.title
    assert finding.fix == "foreground &= (distances <= 15).all(-1)  # or num_bins = 17"


def test_both_kinds_are_counted_apart():
    case = objects([620] * 80 + [1200] * 20, [0] * 20 + [200] * 60 + [0] * 20, [32] * 100)
    finding = only(doctor.examine(**case), "above-range")
    assert finding.cause.startswith("25 % of these anchors belong to objects longer than 960 px")


def test_the_proposed_number_of_bins_is_the_one_in_the_table():
    """Pooled over the levels, 99.5 % of the sides would need fewer bins than stride 8 does."""
    g = torch.Generator().manual_seed(0)
    many, few = 5 + 5 * torch.rand(4000, 4, generator=g), 20 + 14 * torch.rand(90, 4, generator=g)
    stride = torch.tensor([16.0] * 4000 + [8.0] * 90)
    report = doctor.examine(targets=torch.cat((many, few)), stride=stride, num_bins=16)
    wanted = max(level.wanted_bins for level in report.levels)
    assert report.levels[0].wanted_bins == wanted > report.levels[1].wanted_bins
    finding = only(report, "above-range")
    assert f"{wanted} bins would cover 99.5 % of each level's sides." in finding.title
    assert f"num_bins = {wanted}" in finding.fix
    table = str(report).rsplit("K for 99.5 %", 1)[1]
    assert table.splitlines()[1].endswith(f" {wanted}")


def test_no_number_of_bins_is_proposed_for_targets_in_a_wrong_unit():
    given = case()
    given["targets"] = given["boxes"] / 640 * 17
    report = doctor.examine(**given)
    assert report.findings[0].code == "coordinates"
    assert only(report, "above-range").because == "coordinates"
    assert not any(level.wanted_bins for level in report.levels)
    assert "bins would cover" not in str(report)
    assert "99.5 %" not in str(report)


def test_large_objects_in_cells_and_pixels_are_two_readings():
    """Up to 23.4 cells of 32 pixels, or 23.4 pixels: targets and stride cannot tell."""
    targets = torch.linspace(9, 23.4, 400).reshape(100, 4)[:, [0, 2, 1, 3]].flip(-1)
    report = doctor.examine(targets=targets, stride=32.0, num_bins=16)
    assert codes(report)[:2] == ["pixels", "above-range"]
    pixels, above = report.findings[:2]
    assert "they are in pixels, or in cells and the objects are too large" in pixels.title
    assert "25 bins would cover 99.5 %" in above.title
    assert str(report).splitlines()[-1].endswith(" 25")


def test_without_a_clamp_the_weights_of_the_bins_leave_0_to_1():
    targets = torch.full((100, 4), 7.3)
    targets[::9, 2] = 18.0
    finding = only(doctor.examine(targets=targets, num_bins=17), "above-range")
    assert "18 weighs the last bin with 3 and the one before with -2" in finding.example
    clamped = doctor.examine(targets=targets.clamp(max=15.99), num_bins=17)
    assert "above-range" not in codes(clamped)


# --- losses that cannot be ----------------------------------------------------------------------


def test_negative_losses_follow_from_targets_beyond_the_bins():
    targets = torch.full((100, 4), 7.3)
    targets[::9, 2] = 18.0
    report = doctor.examine(targets=targets, num_bins=17, losses=[0.4, -0.234])
    assert only(report, "negative-loss").because == "above-range"
    alone = doctor.examine(losses=[0.4, -0.234])
    assert codes(alone) == ["negative-loss"]
    assert alone.severity is Severity.ERROR
    assert alone.findings[0].example == "loss 1 is -0.234"


def test_a_rounding_error_is_no_negative_loss():
    assert doctor.examine(losses=[0.4, -1e-8, 0.2]).healthy


@pytest.mark.parametrize(
    "losses",
    [
        [math.log(16) * 1.5 * 8] * 3 + [20.0, 17.0],  # gain and batch size, from the start
        [math.log(16) * 1.5 * 64 * 0.99**i for i in range(50)],
        [2.8, 2.5, 2.4, 900.0, 2.2, 2.1],  # a single spike
    ],
)
def test_scaled_means_are_no_sums(losses):
    assert "summed-loss" not in codes(doctor.examine(losses=losses, num_bins=16))


def test_a_mean_of_diverged_logits_is_no_sum():
    logits = torch.zeros(60, 4, 16)
    logits[..., 15] = 4000.0
    targets = torch.full((60, 4), 3.4)
    given = {"logits": logits, "targets": targets, "losses": [3990.0, 4000.0, 3995.0]}
    assert "summed-loss" not in codes(doctor.examine(**given))
    summed = doctor.examine(**given | {"logits": torch.randn(60, 4, 16)})
    assert "a mean of" in only(summed, "summed-loss").example


# --- logits -------------------------------------------------------------------------------------


def test_raw_int8_outputs_are_named():
    g = torch.Generator().manual_seed(0)
    peak = -1.5 * (15 * torch.rand(300, 4, 1, generator=g) - torch.arange(16)).abs()
    raw = (peak / 0.05).round().clamp(-128, 127)
    finding = only(doctor.examine(logits=raw.to(torch.int8)), "saturated-logits")
    assert "all are whole numbers, as raw INT8 outputs are" in finding.example
    assert "dequantization scale" in finding.cause
    assert "saturated-logits" not in codes(doctor.examine(logits=0.05 * raw))
    scaled_up = only(doctor.examine(logits=256 * peak), "saturated-logits")
    assert "whole numbers" not in scaled_up.example


# --- boxes --------------------------------------------------------------------------------------


def case():
    g = torch.Generator().manual_seed(0)
    points, stride = dflkern.make_anchors([(80, 80), (40, 40)], (8, 16))
    points, stride = points[::16], stride[::16]
    boxes = dflkern.dist2bbox(0.2 + 9 * torch.rand(len(points), 4, generator=g), points) * stride
    targets = dflkern.dfl_targets(boxes, points, stride, 16)
    return {
        "targets": targets, "boxes": boxes, "anchor_points": points, "stride": stride,
        "num_bins": 16,
    }  # fmt: skip


def test_right_targets_beside_wrong_boxes_are_left_alone():
    """A warning about what was given to examine, and nothing drawn from it."""
    given = case()
    report = doctor.examine(**given | {"boxes": given["boxes"] / given["stride"]})
    assert codes(report) == ["box-units"]
    assert report.severity is Severity.WARNING
    assert report.levels[0].above == report.levels[0].below == 0
    without = {name: value for name, value in given.items() if name != "targets"}
    report = doctor.examine(**without | {"boxes": given["boxes"] / given["stride"]})
    assert report.severity is Severity.ERROR
    assert report.findings[0].code == "box-units"
    assert {found.because for found in report.findings[1:]} <= {"box-units"}


def test_the_fix_names_torchvisions_format():
    given = case()
    x1y1, x2y2 = given["boxes"].chunk(2, -1)
    for form, boxes in (
        ("xywh", torch.cat((x1y1, x2y2 - x1y1), -1)),
        ("cxcywh", torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), -1)),
    ):
        for targets in (given["targets"], None):
            finding = doctor.examine(**given | {"boxes": boxes, "targets": targets}).findings[0]
            assert finding.code == "box-format"
            assert f'box_convert(boxes, "{form}", "xyxy")' in finding.fix


@pytest.mark.parametrize("form", ["xywh", "cxcywh"])
def test_the_format_of_objects_within_a_cell(form):
    """Corner or centre, and pixels or cells, are then less than a cell apart."""
    points, stride = dflkern.make_anchors([(40, 40)], [8])
    centre, size = points * 8, 3 + 3 * torch.rand(1600, 2)
    boxes = torch.cat((centre if form == "cxcywh" else centre - size / 2, size), -1)
    given = {"boxes": boxes, "stride": stride, "num_bins": 16}
    for scale, expected in ((1, ["box-format"]), (8, ["box-format", "anchor-units"])):
        report = doctor.examine(**given, anchor_points=points * scale)
        assert [f.code for f in report if f.because is None] == expected
        assert f'"{form}", "xyxy"' in report.findings[0].fix


def test_a_slip_is_no_format():
    """Two boxes in four hundred with their corners swapped."""
    given = case()
    given["boxes"][5:7] = given["boxes"][5:7].roll(2, -1)
    assert "box-format" not in codes(doctor.examine(**given))
    assert "box-format" not in codes(doctor.examine(boxes=given["boxes"], num_bins=16))
