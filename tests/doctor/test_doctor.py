"""The doctor: what it finds in synthetic trainings, what it leaves alone, and how it says it."""

import collections
import json
import math

import pytest
import torch
from doctor_cases import FAULTS, FLOORLESS, IMPOSSIBLE
from doctor_healthy import HEADS, healthy

import dflkern
from dflkern import doctor
from dflkern.doctor import Severity
from dflkern.doctor.findings import CODES, EXPLAINS, Finding, arrange

CASES = [
    (head, fault)
    for head in HEADS
    for fault in FAULTS
    if not IMPOSSIBLE.get(fault.__name__, lambda head: False)(head)
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reports():
    """[(what is in it, its report)] of every case: (head, fault, code), fault None for healthy."""
    found = []
    for seed, head in enumerate(HEADS):
        case = healthy(head, seed)
        found.append(((head, None, None), doctor.examine(**case)))
        for other, fault in CASES:
            if other is head:
                found.append(((head, fault, FAULTS[fault]), doctor.examine(**fault(case, head))))
    return found


def roots(report):
    """The codes of findings that no other one explains."""
    return [finding.code for finding in report if finding.because is None]


# --- what it finds, and what it does not --------------------------------------------------------


def test_precision_and_recall_of_every_code(reports, capsys):
    """A case counts for a code if it was made for it; a finding that another explains is none."""
    seeded, hits, reported = (collections.Counter() for _ in range(3))
    for (_, _, code), report in reports:
        wanted = {code} if code else set()
        if report.levels and code not in FLOORLESS:
            wanted.add("entropy-floor")
        found = set(roots(report))
        seeded.update(wanted)
        hits.update(wanted & found)
        reported.update(found)
    lines = [f"{'code':20} {'cases':>6} {'recall':>7} {'precision':>10}"]
    codes = [code for code in CODES if code != "no-targets"]  # only a watch has it
    for code in codes:
        recall, precision = hits[code] / seeded[code], hits[code] / max(reported[code], 1)
        lines.append(f"{code:20} {seeded[code]:6} {recall:7.2f} {precision:10.2f}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(reports) > 200
    for code in codes:
        assert seeded[code] >= 5, code
        assert hits[code] == seeded[code], f"{code} was missed"
        assert hits[code] >= 0.95 * reported[code], f"{code} was a false alarm"


def test_the_fault_comes_first(reports):
    for (head, fault, code), report in reports:
        if fault is not None:
            assert report.findings[0].code == code, (head.name, fault.__name__)


def test_healthy_trainings_are_left_alone():
    for head in HEADS:
        for seed in range(100, 104):
            report = doctor.examine(**healthy(head, seed, count=150))
            assert report.healthy, (head.name, seed, report)
            assert {finding.code for finding in report} <= {"entropy-floor"}, (head.name, seed)


@pytest.mark.parametrize(
    "names",
    [
        ("targets",), ("targets", "stride"), ("targets", "anchor_points"),
        ("targets", "anchor_points", "stride"), ("boxes", "anchor_points", "stride"), ("logits",),
        ("targets", "logits"), ("losses",), ("gradients",), ("weight",), ("normalizer",),
        ("anchor_points",),
    ],
    ids="+".join,
)  # fmt: skip
def test_less_evidence_makes_no_false_alarm(names):
    for seed, head in enumerate(HEADS):
        case = healthy(head, seed)
        given = {name: case[name] for name in (*names, "num_bins", "project", "margin")}
        report = doctor.examine(**given)
        assert report.healthy, (head.name, report)


def large_objects():
    """One level, objects too large for it: pixels would look alike, but for their anchor points."""
    targets = 4 + 18 * torch.rand(500, 4)
    return {"targets": targets, "num_bins": 16, "stride": 8}


def tiny_objects():
    points, stride = dflkern.make_anchors([(80, 80)], [8])
    boxes = dflkern.dist2bbox(0.1 + 0.8 * torch.rand(6400, 4), points) * 8
    targets = dflkern.dfl_targets(boxes, points, stride, 16)
    given = {"boxes": boxes, "anchor_points": points, "stride": stride}
    return {"targets": targets, "num_bins": 16, **given}


def corner_points():
    """One anchor a box, on the corner of its centre's cell: right > left, and yet distances."""
    points, stride = dflkern.make_anchors([(80, 80)], [8], offset=0.0)
    half = 2 + 4 * torch.rand(6400, 2)
    targets = torch.cat((half - torch.rand(6400, 2), half + torch.rand(6400, 2)), -1)
    return {"targets": targets, "num_bins": 16, "anchor_points": points, "stride": stride}


def first_step():
    """Uniform distributions, whose losses are all the same."""
    logits, targets = torch.zeros(300, 4, 16), 7 * torch.rand(300, 4)
    return {"logits": logits, "losses": dflkern.dfl_loss(logits, targets).sum(-1)}


def rounded_losses():
    return {"losses": [round(2.77 * 0.97**i + 0.6, 2) for i in range(300)]}


def plateau():
    return {"losses": [3.0 - 0.02 * i for i in range(100)] + [1.0] * 40}


def spiky_gradients():
    return {"gradients": [2.0 + 30 * (i % 50 == 49) for i in range(400)]}


def deep_heads():
    """A branch of the head with next to no foreground, and a healthy backbone below it."""
    norms = {"head.p5": 1e-3, "head.p3": 2.0, **{f"backbone{i}": 5.0 for i in range(20)}}
    return {"gradients": norms}


def masked_logits():
    logits = torch.randn(64, 4, 16)
    logits[:, :, 12:] = -math.inf
    return {"logits": logits}


@pytest.mark.parametrize(
    ("case", "worst", "never"),
    [
        (large_objects, Severity.ERROR, "pixels"),
        (tiny_objects, Severity.NOTE, "normalized"),
        (corner_points, Severity.NOTE, "coordinates"),
        (first_step, Severity.NOTE, "loss-clamp"),
        (rounded_losses, Severity.NOTE, "loss-clamp"),
        (plateau, Severity.NOTE, "loss-clamp"),
        (spiky_gradients, Severity.NOTE, "exploding-gradient"),
        (deep_heads, Severity.NOTE, "exploding-gradient"),
        (masked_logits, Severity.NOTE, "non-finite"),
    ],
)
def test_what_only_looks_like_a_fault(case, worst, never):
    report = doctor.examine(**case())
    assert report.severity == worst, report
    assert never not in {finding.code for finding in report}


# --- numbers ------------------------------------------------------------------------------------


def only(report, code):
    return next(finding for finding in report if finding.code == code)


def test_above_range_by_level():
    targets = torch.full((200, 4), 3.3)
    targets[:2, 0] = 20.7  # 2 of 400 sides on stride 8
    stride = torch.tensor([8.0, 16.0]).repeat_interleave(100)
    report = doctor.examine(targets=targets, num_bins=16, stride=stride)
    finding = only(report, "above-range")
    assert finding.share == pytest.approx(2 / 800)
    assert "stride 8: 0.5 %, no side longer than 120 px from its anchor" in finding.title
    assert "stride 16: 0 %, no side longer than 240 px from its anchor" in finding.title
    first, second = report.levels
    assert (first.stride, first.count, first.above) == (8, 400, 2 / 400)
    assert first.largest == pytest.approx(20.7)
    assert first.wanted_bins == 22  # 20.7 < 21, less the margin
    assert second.wanted_bins == 5
    assert (first.reach, second.reach) == (120, 240)
    assert first.counts == (0, 0, 0, 0, 398, *[0] * 11, 2)  # below, 16 bins, above
    assert sum(second.counts) == second.count == 400


def test_entropy_floor():
    half = doctor.examine(targets=torch.full((50, 4), 2.5), num_bins=16)
    assert f"{math.log(2):.3f} nats" in only(half, "entropy-floor").title
    whole = doctor.examine(targets=torch.full((50, 4), 3.0), num_bins=16)
    assert "entropy-floor" not in {finding.code for finding in whole}


def test_half_decode_measures_what_half_precision_does():
    logits = (6 * torch.randn(500, 4, 16)).bfloat16()
    exact = dflkern.dfl_decode(logits)
    half = logits.float().softmax(-1).bfloat16() @ torch.arange(16).bfloat16()
    error = float((half.float() - exact).abs().max())
    finding = only(doctor.examine(logits=logits), "half-decode")
    said = float(finding.title.split("up to ")[1].split()[0])
    assert said == pytest.approx(error, rel=0.3)
    scaled = only(doctor.examine(logits=logits, targets=exact, stride=32.0), "half-decode")
    assert float(scaled.title.split("up to ")[1].split()[0]) == pytest.approx(32 * said, rel=1e-3)
    assert scaled.severity is Severity.WARNING


def test_the_order_of_trained_logits():
    """Not made to look like logits, but trained by DFL from random ones."""
    targets = 0.3 + 9 * torch.rand(80, 4)
    logits = torch.randn(80, 4, 16, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        dflkern.dfl_loss(logits, targets, reduction="mean").backward()
        optimizer.step()
    trained = logits.detach()
    turned = trained.transpose(1, 2).reshape(trained.shape)
    assert doctor.examine(logits=trained, targets=targets).healthy
    assert doctor.examine(logits=turned, targets=targets).findings[0].code == "bin-major"


def test_the_loss_behind_a_clamp_is_told():
    logits, targets = torch.zeros(40, 4, 16), 7.5 * torch.rand(40, 4)
    report = doctor.examine(logits=logits, targets=targets, losses=[1.0] * 9)
    assert f"{math.log(16):.4g} a side" in only(report, "loss-clamp").title


def test_a_loss_stuck_at_ln_k_is_a_flat_head():
    case = {"logits": torch.zeros(40, 4, 16), "losses": [math.log(16)] * 80}
    finding = doctor.examine(**case).findings[0]
    assert (finding.code, finding.severity) == ("flat-logits", Severity.WARNING)
    before_training = doctor.examine(logits=case["logits"], losses=[math.log(16)] * 2)
    assert before_training.healthy


def test_the_foreground_selects():
    targets = torch.zeros(2, 50, 4)
    foreground = torch.zeros(2, 50, dtype=torch.bool)
    foreground[:, ::2] = True
    targets[foreground] = 1 + 5 * torch.rand(50, 4)
    assert not doctor.examine(targets=targets, num_bins=16).healthy
    report = doctor.examine(targets=targets, num_bins=16, foreground=foreground)
    assert report.healthy
    assert report.levels[0].count == 200


def test_no_foreground():
    for given in (
        {"targets": torch.zeros(0, 4), "num_bins": 16, "stride": 8.0},
        {"targets": torch.zeros(9, 4), "num_bins": 16, "foreground": torch.zeros(9).bool()},
        {"boxes": torch.zeros(0, 4), "anchor_points": torch.zeros(0, 2), "stride": 8.0},
    ):
        report = doctor.examine(**{"logits": torch.zeros(0, 4, 16), **given})
        assert [finding.code for finding in report] == ["zero-weight"], report
        assert "no anchor is foreground" in report.findings[0].title


def test_nan_and_infinity_in_the_targets():
    targets = 0.3 + 9 * torch.rand(50, 4)
    targets[3, 1], targets[4, 2], targets[5, 0] = math.nan, math.inf, -math.inf
    report = doctor.examine(targets=targets, num_bins=16, stride=8.0)
    assert [finding.code for finding in report] == ["non-finite", "entropy-floor"]
    assert report.findings[0].title == "NaN or infinity in targets: 3 of 200."
    assert report.findings[0].example == "targets at [3, 1]"
    assert report.levels[0].largest == pytest.approx(float(targets[targets.isfinite()].max()))


def test_a_head_as_it_is():
    """(B, 4K, A) by its channels, (B, 4, K, A) by dim=2; 68 channels are 17 bins."""
    head = torch.randn(2, 68, 30)
    for logits, dim in ((head, 1), (head.view(2, 4, 17, 30), 2)):
        finding = doctor.examine(logits=logits, dim=dim, num_bins=16).findings[0]
        assert finding.code == "extra-bin"
        assert "17, where num_bins is 16" in finding.title


def test_nothing_is_changed():
    case = healthy(HEADS[0], 0)
    before = {name: value.clone() for name, value in case.items() if torch.is_tensor(value)}
    state = torch.random.get_rng_state()
    doctor.examine(**case)
    assert all(torch.equal(case[name], value) for name, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the report ---------------------------------------------------------------------------------


def finding(code, severity):
    return Finding(code, severity, "seen", "example", "why", "repair")


def test_causes_before_consequences_and_graver_first():
    given = [
        finding("entropy-floor", Severity.NOTE),
        finding("at-clamp", Severity.WARNING),
        finding("extra-bin", Severity.ERROR),
        finding("above-range", Severity.ERROR),
        finding("half-decode", Severity.WARNING),
        finding("pixels", Severity.ERROR),
    ]
    ordered = arrange(given)
    assert [(f.code, f.because) for f in ordered] == [
        ("pixels", None),
        ("above-range", "pixels"),
        ("at-clamp", "pixels"),
        ("extra-bin", None),
        ("half-decode", None),
    ]  # the floor of wrong targets is not worth a word
    assert ordered[1].fix == "repair pixels first"


def test_causes_stand_before_what_they_explain():
    for cause, below in EXPLAINS.items():
        assert all(CODES.index(cause) < CODES.index(code) for code in below), cause


def test_every_text_is_complete(reports):
    for _, report in reports:
        for found in report:
            texts = (found.title, found.example, found.cause, found.fix)
            assert all(texts), found
            assert not any("{" in text or "  " in text.split("  #")[0] for text in texts), found
            assert "\n" not in "".join(texts)
            assert found.share is None or 0 <= found.share <= 1
            assert found.title[0].isupper() or found.title[0].isdigit()
            assert found.title[-1] == "."
            assert found.because or len(found.cause) < 330


def test_report_reads_and_serializes(reports):
    for (_, fault, code), report in reports:
        text = str(report)
        assert len(report) == len(list(report))
        for line in text.splitlines():
            assert len(line) <= 100 or line.startswith("  fix"), line
        if fault is None:
            assert text.startswith("Healthy: 1 note")
        elif not report.healthy:
            assert f"Start with {code}." in text
        plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert plain["healthy"] is report.healthy
        assert [f["code"] for f in plain["findings"]] == [f.code for f in report]
        keys = {"code", "severity", "title", "example", "cause", "fix", "share", "because"}
        assert all(f.keys() == keys for f in plain["findings"])


def test_public_names():
    assert dflkern.doctor is doctor
    assert set(doctor.__all__) <= set(dir(doctor))


# --- errors -------------------------------------------------------------------------------------

T = torch.rand(10, 4)


@pytest.mark.parametrize(
    ("given", "kind", "parts"),
    [
        ({}, ValueError, ["nothing was given", "at least one of targets"]),
        ({"num_bins": 16}, ValueError, ["nothing was given"]),
        ({"targets": T}, ValueError, ["need num_bins", "reg_max"]),
        ({"targets": [1.0], "num_bins": 16}, TypeError, ["targets is a list", "as_tensor"]),
        ({"targets": T[0, 0], "num_bins": 16}, ValueError, ["no dimension", "(N, 4)"]),
        ({"targets": T, "num_bins": 1}, ValueError, ["num_bins=1", "at least 2"]),
        ({"targets": T, "num_bins": 16, "margin": 1.5}, ValueError, ["margin=1.5"]),
        ({"targets": T, "num_bins": 16, "boxes": T[:, :3]}, ValueError, ["(10, 3)", "x1, y1"]),
        (
            {"targets": T, "num_bins": 16, "anchor_points": torch.rand(7, 2)},
            ValueError,
            ["(7, 2)", "anchor_points[anchor]"],
        ),
        ({"anchor_points": torch.rand(7, 3)}, ValueError, ["(7, 3)", "x and y, in cells"]),
        (
            {"targets": T, "num_bins": 16, "stride": torch.ones(3, 1)},
            ValueError,
            ["(3,)", "stride[anchor]"],
        ),
        ({"targets": T, "num_bins": 16, "stride": 0.0}, ValueError, ["above 0"]),
        (
            {"targets": T, "num_bins": 16, "foreground": torch.ones(9, dtype=torch.bool)},
            ValueError,
            ["foreground has shape (9,)", "(10,) is needed"],
        ),
        ({"logits": torch.rand(8, 16), "dim": 5}, ValueError, ["dim=5", "(8, 16)"]),
        ({"logits": torch.rand(8, 1)}, ValueError, ["1 bins", "no DFL"]),
        (
            {"targets": T, "num_bins": 16, "project": [0.0, 1.0]},
            ValueError,
            ["2 positions for 16 bins"],
        ),
        ({"targets": T, "project": [1.0, 0.0]}, ValueError, ["increase strictly"]),
        ({"losses": "10.0"}, TypeError, ["losses is a str", "sequence of numbers"]),
        ({"gradients": {"a": "b"}}, TypeError, ["gradients['a']"]),
    ],
)
def test_errors_are_sentences(given, kind, parts):
    with pytest.raises(kind) as caught:
        doctor.examine(**given)
    message = str(caught.value)
    assert message.startswith("examine: ")
    assert message.endswith(".")
    for part in parts:
        assert part in message
