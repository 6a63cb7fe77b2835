"""The demo: its scenes, its assigner, its numbers, and the whole command on a small scale."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import dflkern
from dflkern import __main__, demo
from dflkern.demo import evaluate, glyphs, report, scenes
from dflkern.demo.assign import assign
from dflkern.demo.config import NUM_CLASSES, Config
from dflkern.demo.losses import losses, two_bin_entropy
from dflkern.demo.model import Detector, anchors
from dflkern.demo.train import train


@dataclasses.dataclass(frozen=True)
class Tiny(Config):
    """A configuration that trains in seconds."""

    image_size: int = 64
    min_height: float = 8.0
    max_height: float = 40.0
    max_digits: int = 4
    clutter: int = 2
    width: int = 24
    validation_scenes: int = 6
    steps_per_epoch: int = 40
    batch_size: int = 2
    warmup_steps: int = 10
    static_steps: int = 20


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return glyphs.load_digits(0)


@pytest.fixture(scope="module")
def run():
    return train(Tiny(epochs=1))


# --- digits and scenes --------------------------------------------------------------------------


def test_train_and_validation_digits_are_disjoint(digits):
    train_set, validation_set = ({d.numpy().tobytes() for d in part.images} for part in digits)
    assert len(train_set) + len(validation_set) == 1797
    assert not train_set & validation_set
    assert len(validation_set) > 400
    assert validation_set != {d.numpy().tobytes() for d in glyphs.load_digits(1)[1].images}


def test_rendered_ink_fills_its_box(digits):
    count, size = 200, 128
    drawn = glyphs.warp(
        digits[0].images[:count],
        glyphs.uniform((count,), -0.2, 0.2, generator()),
        glyphs.uniform((count,), -0.2, 0.2, generator(1)),
    )
    corner = glyphs.uniform((count, 2), 1, 30, generator(2))
    boxes = torch.cat((corner, corner + glyphs.uniform((count, 2), 20, 90, generator(3))), -1)
    ink = scenes.render(drawn, glyphs.extent(drawn), boxes, size) > 0.5
    for axis, low, high in ((1, 0, 2), (2, 1, 3)):
        profile = ink.any(axis).long()
        first, last = profile.argmax(-1), size - profile.flip(-1).argmax(-1)
        # A pixel is inked or not, which alone leaves half a pixel of doubt at each side.
        assert (first - boxes[:, low]).abs().max() < 1
        assert (last - boxes[:, high]).abs().max() < 1


def test_extent_finds_sub_pixel_edges():
    ink = torch.zeros(1, 6, 9)
    ink[0, 2:4, 3:6] = 1
    ink[0, 2:4, 6] = 0.25
    # Centres are at .5: ink rises from 0 to 1 between 2.5 and 3.5, and falls through 0.5 a third of
    # the way from the 1 at 5.5 to the 0.25 at 6.5... that is 5.5 + 0.5 / 0.75.
    assert glyphs.extent(ink)[0].tolist() == pytest.approx([3, 2, 5.5 + 0.5 / 0.75, 4])


def test_scenes_hold_what_they_should(digits):
    config = Config()
    drawn = scenes.compose(digits[0], 64, config, generator())
    boxes, sides = drawn.boxes, drawn.boxes[..., 2:] - drawn.boxes[..., :2]
    assert drawn.images.shape == (64, 1, 128, 128)
    assert drawn.images.min() >= 0
    assert drawn.images.max() <= 1
    counts = drawn.valid.sum(1)
    assert (counts.min(), counts.max()) == (config.min_digits, config.max_digits)
    assert boxes.min() >= 0
    assert boxes.max() <= 128
    heights = sides[..., 1][drawn.valid]
    assert 9.999 < heights.min() < 12
    assert 80 < heights.max() < 90.001
    assert (boxes[drawn.valid] % 1).std() > 0.2  # sub-pixel positions
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    area = sides.prod(-1)
    overlap = (high - low).clamp(min=0).prod(-1) / torch.minimum(area[:, :, None], area[:, None])
    pairs = drawn.valid[:, :, None] & drawn.valid[:, None] & ~torch.eye(8, dtype=torch.bool)
    assert overlap[pairs].max() <= scenes.MAX_OVERLAP + 1e-5


def test_a_scene_shows_its_digit_at_its_box(digits):
    config = Config(min_digits=1, max_digits=1, clutter=0, min_height=30)
    drawn = scenes.compose(digits[0], 32, config, generator())
    image = drawn.images[:, 0] - drawn.images.flatten(1).median(1).values[:, None, None]
    x = torch.arange(128) + 0.5
    for deviation, box in zip(image.abs(), drawn.boxes[:, 0], strict=True):
        columns, rows = (x > box[0]) & (x < box[2]), (x > box[1]) & (x < box[3])
        inside = rows[:, None] & columns
        assert deviation[inside].mean() > 1.5 * deviation[~inside].mean()


# --- assigner -----------------------------------------------------------------------------------


def test_assignment_by_hand():
    # All boxes span 0 to 10 vertically, so that an IoU is one of intervals.
    points = torch.tensor([[1.0, 5], [3, 5], [5, 5], [7, 5], [20, 5]])
    spans = torch.tensor([[0.0, 8], [0, 4], [2, 12], [0, 8], [4, 12]])
    boxes = torch.stack((spans[:, 0], torch.zeros(5), spans[:, 1], torch.full((5,), 10.0)), -1)
    scores = torch.tensor([[0.25, 0], [0.9, 0], [0.8, 0.5], [0.5, 0.9], [0.9, 0.9]])
    true_boxes = torch.tensor([[0.0, 0, 8, 10], [4, 0, 12, 10], [0, 0, 30, 10]])
    labels, valid = torch.tensor([0, 1, 0]), torch.tensor([True, True, False])
    # Object 0, s·u²: 0.25·1, 0.9·0.25, 0.8·0.25, 0.5·1: anchors 3 and 0.
    # Object 1: anchor 2 with 0.5·0.8² and anchor 3 with 0.9/9; 3 overlaps object 0 more.
    # Anchor 4 is in no box that counts.
    result = assign(
        scores[None], boxes[None], points, true_boxes[None], labels[None], valid[None],
        top_k=2, alpha=1, beta=2,
    )  # fmt: skip
    assert result.foreground.tolist() == [[True, False, True, True, False]]
    expected = torch.tensor([[0.5, 0], [0, 0], [0, 0.8], [1, 0], [0, 0]])
    torch.testing.assert_close(result.scores[0], expected, atol=1e-5, rtol=0)
    assert result.boxes[0, [0, 2, 3]].tolist() == true_boxes[[0, 1, 0]].tolist()


def test_assignment_without_objects():
    none = torch.zeros(2, 3, dtype=torch.bool)
    result = assign(
        torch.rand(2, 7, 4), torch.rand(2, 7, 4), torch.rand(7, 2),
        torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), none,
    )  # fmt: skip
    assert not result.foreground.any()
    assert not result.scores.any()


# --- losses -------------------------------------------------------------------------------------


def test_entropy_floor_closed_form():
    values = two_bin_entropy(torch.tensor([2.5, 3.0, 0.0, 7.25], dtype=torch.float64))
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert values.tolist() == pytest.approx([math.log(2), 0, 0, quarter])


def test_perfect_predictions_reach_the_floor():
    config = Config()
    points, strides = anchors(128, "cpu")
    box = torch.tensor([20.3, 30.7, 61.2, 88.9])
    target = dflkern.dfl_targets(box.expand(len(points), 4), points, strides, 16)
    y = (1 - (target[..., None] - torch.arange(16)).abs()).clamp(min=1e-12)  # (A, 4, K)
    scene = scenes.Scenes(
        torch.zeros(1, 1, 128, 128), box.view(1, 1, 4), torch.tensor([[3]]), torch.tensor([[True]])
    )
    class_logits = torch.zeros(1, len(points), NUM_CLASSES)
    logits = y.log().permute(1, 2, 0)[None]
    result = losses(logits, class_logits, points, strides, scene, config)
    assert result.floor > 0.1
    assert result.dfl.item() == pytest.approx(result.floor.item(), abs=1e-5)
    assert result.box.item() == pytest.approx(0, abs=1e-4)
    # A uniform distribution knows nothing: ln K, whatever the target.
    result = losses(logits * 0, class_logits, points, strides, scene, config)
    assert result.dfl.item() == pytest.approx(math.log(16), abs=1e-5)
    assert result.levels.sum().item() == pytest.approx(1)


def test_detector_has_k_channels_per_side_on_four_levels():
    model = Detector(16, 12)
    heads = [(h.kernel_size, h.out_channels) for h in (*model.box_heads, *model.class_heads)]
    assert heads == [((1, 1), 4 * 16)] * 4 + [((1, 1), NUM_CLASSES)] * 4
    points, strides = anchors(64, "cpu")
    box_logits, class_logits = model(torch.rand(2, 1, 64, 64))
    assert strides.unique().tolist() == [4, 8, 16, 32]
    assert box_logits.shape == (2, 4, 16, len(points))
    assert class_logits.shape == (2, len(points), NUM_CLASSES)


# --- evaluation and report ----------------------------------------------------------------------


def test_map_of_the_truth_is_one(digits):
    drawn = scenes.compose(digits[1], 4, Config(), generator())
    image, box, label = (
        drawn.valid.nonzero()[:, 0],
        drawn.boxes[drawn.valid],
        drawn.labels[drawn.valid],
    )
    right = evaluate.Detections(image, box, torch.ones(len(box)), label)
    assert evaluate.mean_average_precision(right, drawn)["map"] == pytest.approx(1)
    wrong = right._replace(label=(label + 1) % 10)
    assert evaluate.mean_average_precision(wrong, drawn)["map_50"] < 0.2


def test_ranks_count_within_an_image():
    assert evaluate._rank_within(torch.tensor([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]
    assert evaluate._rank_within(torch.zeros(0, dtype=torch.long)).tolist() == []


SOUND = {
    "dfl_first": 2.77, "dfl_last": 0.6, "dfl_entropy_floor": 0.5, "box_first": 0.9, "box_last": 0.1,
    "box_spike": 1.2, "grad_norm_max": 8.0, "grad_norm_median": 2.0, "map50": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "unmet"),
    [
        ({}, []),
        ({"dfl_last": 2.1}, ["DFL loss"]),
        ({"dfl_last": 0.4}, ["DFL loss"]),
        ({"dfl_last": math.nan}, ["DFL loss"]),
        ({"box_spike": 3.0}, ["box loss"]),
        ({"box_spike": math.nan}, ["box loss"]),
        ({"box_last": 0.95}, ["box loss"]),
        ({"grad_norm_max": math.inf}, ["gradient norm"]),
        ({"grad_norm_max": math.nan}, ["gradient norm"]),
        ({"map50": 0.3}, ["mAP@0.5"]),
    ],
)
def test_expectations(change, unmet):
    rows = report.expectations(SOUND | change)
    assert [row["name"] for row in rows if not row["met"]] == unmet


def test_spikes():
    smooth = [1 / (i + 1) for i in range(40)]
    assert report.spike(smooth) < 1
    assert report.spike([*smooth, 1.0]) > 10
    assert math.isnan(report.spike([*smooth, math.nan]))
    assert math.isnan(report.spike(smooth[:5]))
    assert math.isnan(report.largest([1.0, math.nan, 2.0]))
    assert report.largest([1.0, math.inf]) == math.inf


# --- the command --------------------------------------------------------------------------------


def test_same_seed_same_numbers(run):
    again, other = train(Tiny(epochs=1)), train(Tiny(epochs=1, seed=1))
    assert again.steps == run.steps
    assert other.steps != run.steps
    for mine, theirs in zip(again.detections, run.detections, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(other.scenes.images, run.scenes.images)


def test_training_learns(run):
    assert all(math.isfinite(step.total) and math.isfinite(step.grad_norm) for step in run.steps)
    assert run.steps[0].dfl == pytest.approx(math.log(16), abs=0.1)
    assert run.steps[-1].dfl < run.steps[0].dfl
    assert run.steps[-1].total < run.steps[0].total


def test_command_writes_all_it_promises(tmp_path, monkeypatch, capsys, run):
    monkeypatch.setattr("dflkern.demo.Config", Tiny)
    out = tmp_path / "runs" / "demo"
    arguments = ["demo", "--epochs", "2", "--out", str(out), "--backend", "reference"]
    code = __main__.main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 1  # a training this small does not reach the mAP
    assert "the expectations are for 5" in printed
    assert "NO" in printed
    assert [line[:9] for line in printed.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]

    for picture in ("curves.png", "detections.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for key in ("dfl_first", "dfl_last", "dfl_entropy_floor", "map50", "grad_norm_max", "seconds"):
        assert isinstance(metrics[key], float)
        assert key in metrics["definitions"]
    assert metrics["dfl_entropy_floor"] < metrics["dfl_last"] < metrics["dfl_first"]
    assert len(metrics["history"]) == metrics["epochs"] == metrics["config"]["epochs"] == 2
    assert metrics["config"]["backend"] == "reference"
    assert [row["met"] for row in metrics["expectations"]][-1] is False

    arrays = np.load(out / "predictions.npz")
    found = len(arrays["image"])
    assert found
    assert arrays["box"].shape == (found, 4)
    assert arrays["score"].shape == arrays["label"].shape == (found,)
    true = int(run.scenes.valid.sum())  # validation scenes do not depend on the number of epochs
    assert arrays["true_image"].shape == arrays["true_label"].shape == (true,)
    np.testing.assert_array_equal(arrays["true_box"], run.scenes.boxes[run.scenes.valid])
    assert set(arrays["image"]) <= set(range(6))


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_installed", lambda module: module != "sklearn")
    assert __main__.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "scikit-learn" in error
    assert 'pip install "dflkern[demo]"' in error


def test_what_cannot_run_here_says_so(tmp_path, capsys):
    out = ["--out", str(tmp_path / "none")]
    assert __main__.main(["demo", "--device", "cuda:99", *out]) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert __main__.main(["demo", "--backend", "cuda", "--device", "cpu", *out]) == 2
    assert '"cuda" was asked for' in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        __main__.main(["demo", "--epochs", "0"])


def test_importing_the_demo_imports_nothing_optional():
    heavy = sorted(demo.NEEDED.keys() - {"numpy"})  # torch brings numpy itself
    code = f"import dflkern.demo, sys; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
