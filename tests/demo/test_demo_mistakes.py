"""The seed's mistakes, made on purpose, and the doctor that names each."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_demo import Tiny

import dflkern
from dflkern import __main__
from dflkern.demo import compare, report
from dflkern.demo.config import Config
from dflkern.demo.mistakes import ALL, MISTAKES, box_targets, broken, over_sides
from dflkern.demo.train import train

README = Path(__file__).parents[2] / "benchmarks" / "readme.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs():
    config = Tiny(epochs=1)
    configs = {name: broken(config, name) for name in (*MISTAKES, ALL)}
    return {
        name: train(chosen, watched=True)
        for name, chosen in {"corrected": config, **configs}.items()
    }


def test_the_post_mortems_example():
    """Its box [100, 100, 300, 300] in an image of 640, its anchor point [200, 200] of stride 8."""
    box = torch.tensor([[100.0, 100, 300, 300]])
    point, stride = torch.tensor([[200.0, 200]]), torch.tensor([[8.0]])

    def targets(*mistakes):
        config = Config(image_size=640, mistakes=mistakes)
        return box_targets(box, point, stride, config)[0].tolist()

    assert targets() == [12.5] * 4
    assert targets("coordinates") == [2.5, 2.5, 7.5, 7.5]
    assert targets("pixels") == pytest.approx([14.99] * 4)
    assert targets("coordinates", "pixels") == pytest.approx([16] * 4)


def test_the_clamp_takes_the_gradient_away():
    config = broken(Config(), "loss-clamp")
    logits = torch.zeros(7, 4, 16, requires_grad=True)
    targets = 14 * torch.rand(7, 4)
    assert over_sides(dflkern.dfl_loss(logits, targets), Config()).tolist() == pytest.approx(
        [math.log(16)] * 7
    )
    clamped = over_sides(dflkern.dfl_loss(logits, targets), config)
    assert clamped.tolist() == [10] * 7  # 4 ln 16 = 11.1 lies above it
    clamped.sum().backward()
    assert not logits.grad.any()


def test_a_broken_config_differs_in_its_mistakes_only():
    config = Config()
    assert config.head_bins == 16
    assert broken(config, "extra-bin").head_bins == 17
    assert broken(config, "pixels").dfl_gain == config.dfl_gain
    assert broken(config, "loss-clamp").dfl_gain == config.dfl_gain / 4
    assert broken(config, ALL).mistakes == MISTAKES


def test_watching_changes_no_number(runs):
    assert train(Tiny(epochs=1)).steps == runs["corrected"].steps


def test_the_corrected_training_is_healthy(runs):
    assert runs["corrected"].report.healthy
    assert set(runs["corrected"].report.examined) == {
        "targets", "logits", "boxes", "anchor_points", "stride", "losses", "gradients", "weight",
        "normalizer",
    }  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_named_first(runs, name):
    assert runs[name].report.findings[0].code == name
    assert not runs[name].report.healthy


def test_all_mistakes_are_named(runs):
    findings = runs[ALL].report.findings
    assert findings[0].code == "coordinates"
    assert set(MISTAKES) <= {finding.code for finding in findings}


def test_symptoms():
    steps = [type("Step", (), {"dfl": 10.0 if i > 35 else 2.0})() for i in range(40)]
    run = type("Run", (), {"steps": steps, "config": Tiny()})()
    assert compare.stuck_share(run) == 0.4  # 4 of the last 10
    sound = {"grad_norm_max": 5.0, "box_spike": 1.1, "map50": 0.5}
    assert not any(compare.symptoms(run, sound).values())
    bad = {"grad_norm_max": math.nan, "box_spike": 1.6, "map50": 0.05}
    shown = compare.symptoms(run, bad)
    assert (shown["exploding"], shown["unstable"], shown["no convergence"]) == (True, True, True)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dflkern.demo.Config", Tiny)
    arguments = ["demo", "--epochs", "1", "--mistake", "pixels", "--out", str(tmp_path)]
    code = __main__.main([*arguments, "--backend", "reference", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "the doctor: note entropy-floor" in printed
    assert "the doctor: error pixels" in printed
    assert "Broken and corrected" in printed
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "mistakes.json").read_text(encoding="utf-8"))
    assert list(numbers["runs"]) == ["corrected", "pixels"]
    for entry in numbers["runs"].values():
        assert entry["named"] is True
        assert set(entry["symptoms"]) == {"stuck", "exploding", "unstable", "no convergence"}
        assert isinstance(entry["grad_norm_max"], float)
        assert entry["report"]["examined"]
    assert numbers["runs"]["pixels"]["first_finding"] == "pixels"
    assert numbers["runs"]["corrected"]["first_finding"] is None

    page = tmp_path / "page.md"
    page.write_text("<!-- begin mistakes -->\n<!-- end mistakes -->\n", encoding="utf-8")
    command = [sys.executable, str(README), "--readme", str(page), "--results", str(tmp_path)]
    subprocess.run(command, check=True)
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\| corrected \| .* \| none \|\n\| pixels \| .* \| pixels \|\n", text)
    assert "no convergence: corrected, pixels" in text  # not in an epoch this short
    assert "gradients explode: in none" in text


def test_an_unnamed_mistake_fails_the_command(tmp_path, monkeypatch):
    healthy = train(Tiny(epochs=1, steps_per_epoch=30), watched=True)
    monkeypatch.setattr(compare, "train_with_progress", lambda *a, **k: healthy)
    assert compare.run(Tiny(), ["pixels"], tmp_path) == 1


def test_usage():
    with pytest.raises(SystemExit):
        __main__.main(["demo", "--mistake", "laziness"])


def test_limits_are_those_of_the_demo():
    assert report.SEED_MAP == 0.1
    assert report.GRAD_NORM_LIMIT == 30
