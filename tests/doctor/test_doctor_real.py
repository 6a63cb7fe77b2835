"""The doctor on label files of public packages, and on what Ultralytics' own assigner gives."""

import functools

import pytest
import torch
from doctor_cases import FAULTS
from doctor_healthy import Head

import dflkern
from dflkern import doctor
from label_files import FILES, people, trees

STRIDES = (8, 16, 32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def roots(report):
    return [finding.code for finding in report if finding.because is None]


# --- label files --------------------------------------------------------------------------------


@functools.cache
def assigned(source, name):
    """(what `examine` takes, image size) of a file.

    Every object is on the finest level that reaches its sides, at the anchors nearest its centre.
    """
    boxes, image = source(name)
    boxes = boxes[:: max(1, len(boxes) // 60)]
    sizes = [(-(-image // s),) * 2 for s in STRIDES]
    points, stride = dflkern.make_anchors(sizes, STRIDES)
    rows, anchors = [], []
    for number, box in enumerate(boxes):
        sides = dflkern.bbox2dist(points, box / stride)
        fits = (sides > 0).all(-1) & (sides < 14).all(-1)
        if not bool(fits.any()):
            continue
        level = stride[fits].min()
        centre = (sides[:, :2] - sides[:, 2:]).abs().amax(-1)
        centre[~fits | (stride[:, 0] != level)] = torch.inf
        near = centre.argsort()[: min(9, int(centre.isfinite().sum()))]
        rows += [number] * len(near)
        anchors += near.tolist()
    points, stride, boxes = points[anchors], stride[anchors], boxes[rows]
    targets = dflkern.dfl_targets(boxes, points, stride, 16)
    case = {"boxes": boxes, "anchor_points": points, "stride": stride}
    return case | {"targets": targets, "num_bins": 16}, image


@pytest.mark.parametrize(("source", "name"), FILES)
def test_label_files_used_rightly_are_healthy(source, name):
    case, _ = assigned(source, name)
    assert len(case["boxes"]) > 100
    without = {key: value for key, value in case.items() if key != "targets"}
    for given in (case, without):
        assert roots(doctor.examine(**given)) == ["entropy-floor"]


@pytest.mark.parametrize("fault", [f for f, code in FAULTS.items() if code in (
    "box-format", "anchor-units", "box-units", "coordinates", "pixels", "normalized",
)], ids=lambda fault: fault.__name__)  # fmt: skip
@pytest.mark.parametrize(("source", "name"), FILES)
def test_label_files_used_wrongly(source, name, fault):
    case, image = assigned(source, name)
    case = fault(case, Head(name, 16, STRIDES, image=image))
    report = doctor.examine(**case)
    assert set(roots(report)) - {"entropy-floor"} == {FAULTS[fault]}, report


@pytest.mark.parametrize("name", ["TUD-Campus", "TUD-Stadtmitte"])
def test_rows_of_a_mot_file_are_named(name):
    boxes, _ = people(name)
    rows = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), -1)
    report = doctor.examine(boxes=rows, num_bins=16)
    assert roots(report) == ["box-format"]
    assert "the first corner and the size (xywh)" in report.findings[0].title
    assert doctor.examine(boxes=boxes, num_bins=16).healthy


@pytest.mark.parametrize("name", ["OSBS_029.csv", "example.csv", "testfile_multi.csv"])
def test_rows_of_a_yolo_label_file_are_named(name):
    boxes, image = trees(name)
    rows = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), -1) / image
    report = doctor.examine(boxes=rows, num_bins=16)
    assert roots(report) == ["box-format", "normalized"]
    assert "the centre and the size (cxcywh)" in report.findings[0].title


# --- Ultralytics' assigner ----------------------------------------------------------------------


def stock_assignment(image, sides, objects=574):
    """Boxes, anchor points and stride of the foreground, for objects with sides from a range."""
    tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
    g = torch.Generator().manual_seed(0)
    least, most = sides
    size = least + (most - least) * torch.rand(objects // 14, 14, 2, generator=g)
    centre = size / 2 + (image - size) * torch.rand(size.shape, generator=g)
    boxes = torch.cat((centre - size / 2, centre + size / 2), -1)
    points, stride = dflkern.make_anchors([(-(-image // s),) * 2 for s in STRIDES], STRIDES)
    shape = (len(boxes), len(points))
    reach = 1 + 2 * torch.rand(*shape, 4, generator=g)
    assigner = tal.TaskAlignedAssigner(
        topk=10, num_classes=1, alpha=0.5, beta=6.0, stride=list(STRIDES)
    )
    _, assigned, _, foreground, _ = assigner(
        torch.rand(*shape, 1, generator=g), dflkern.dist2bbox(reach, points) * stride,
        points * stride, torch.zeros(len(boxes), 14, 1), boxes, torch.ones(len(boxes), 14, 1),
    )  # fmt: skip
    anchor = foreground.nonzero()[:, 1]
    return {
        "boxes": assigned[foreground], "anchor_points": points[anchor], "stride": stride[anchor],
        "num_bins": 16,
    }  # fmt: skip


@pytest.mark.parametrize(("image", "share"), [(640, 0.1), (400, 0.15)])
def test_stock_training_on_tiny_objects_is_healthy(image, share):
    case = stock_assignment(image, (2 * image / 640, 20 * image / 640))
    points, stride = case["anchor_points"], case["stride"]
    distances = dflkern.bbox2dist(points, case["boxes"] / stride)
    targets = dflkern.dfl_targets(case["boxes"], points, stride, 16)
    for given in (case, case | {"targets": distances}, case | {"targets": targets}):
        report = doctor.examine(**given)
        assert report.healthy, report
        assert roots(report) == ["tiny-objects", "entropy-floor"]
        finding = report.findings[0]
        assert finding.share == pytest.approx(float((distances < -1e-6).double().mean()))
        assert finding.share > share
        assert "under 16 px" in finding.title
    without_boxes = {"targets": distances, "stride": stride, "num_bins": 16}
    assert roots(doctor.examine(**without_boxes)) == ["tiny-objects", "entropy-floor"]


def test_an_anchor_farther_outside_than_the_assigner_allows_is_a_fault():
    case = stock_assignment(640, (2, 20))
    case["anchor_points"][::4, 0] += 2
    report = doctor.examine(**case)
    assert roots(report)[0] == "negative"
    assert report.severity is doctor.Severity.WARNING


def test_stock_training_on_larger_objects_has_no_anchor_outside():
    report = doctor.examine(**stock_assignment(640, (20, 120)))
    assert roots(report) == ["entropy-floor"]
