"""Real Ultralytics models under the adapter: losses, training, checkpoints, export, precision."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics", reason="needs Ultralytics: pip install '.[peers]'")

import ultralytics

from dflkern.adapters.ultralytics import patch
from yolo import SIZE, TASKS, batch_for, build, step, train

OLD = ultralytics.__version__.startswith("8.3")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, small layers cost thirty times as much on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["yolov8n", "yolo11n"])
def test_the_loss_of_a_real_model(family, task):
    model, batch = build(family, task), batch_for(task)
    parts, gradients = step(model, batch)
    with patch():
        patched, patched_gradients = step(model, batch)
    torch.testing.assert_close(patched, parts, rtol=1e-5, atol=1e-6)
    assert patched_gradients.keys() == gradients.keys()
    expected, actual = (
        torch.cat([value.flatten() for value in each.values()])
        for each in (gradients, patched_gradients)
    )
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_real_model_under_bf16_autocast(task):
    """Against upstream in fp32: the layers' rounding stays, and moves a loss by about 1 %."""
    model, batch = build("yolov8n", task), batch_for(task)
    expected, _ = step(model, batch)
    with patch(), torch.autocast("cpu", torch.bfloat16):
        parts, gradients = step(model, batch)
    torch.testing.assert_close(parts, expected, rtol=0.05, atol=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("objects", [(3, 0), (0, 0)], ids=["one image", "all images"])
@pytest.mark.parametrize("task", TASKS)
def test_images_without_objects(task, objects):
    model, batch = build("yolov8n", task), batch_for(task, objects=objects)
    parts, gradients = step(model, batch)
    with patch():
        patched, patched_gradients = step(model, batch)
    torch.testing.assert_close(patched, parts, rtol=1e-5, atol=1e-6)
    assert {k for k, v in patched_gradients.items() if v.any()} == {
        k for k, v in gradients.items() if v.any()
    }


@pytest.mark.parametrize("family", ["yolov8n", "yolo11n"])
def test_ten_optimiser_steps_track_the_unpatched_run(family):
    """A change of one unit in the last place grows to 5e-6 of these losses; 1e-4 leaves room."""
    model = build(family)
    expected = train(model, 10)
    with patch():
        actual = train(model, 10)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(expected.unique(dim=0)) == 10


@pytest.mark.skipif(OLD, reason="Ultralytics 8.3 has no model with reg_max: 1")
def test_a_model_without_dfl_is_told_so_and_unchanged():
    model, batch = build("yolo26n"), batch_for()
    parts, gradients = step(model, batch)
    with patch(), pytest.warns(UserWarning, match="reg_max: 1, so it has no DFL"):
        patched, patched_gradients = step(model, batch)
    assert torch.equal(patched, parts)
    assert all(torch.equal(patched_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("task", TASKS)
def test_predictions(task):
    model, image = build("yolov8n", task).eval(), batch_for()["img"]

    def predict():
        with torch.no_grad():
            found = model(image)[0]
        return found[0] if isinstance(found, tuple) else found

    expected = predict()
    with patch():
        torch.testing.assert_close(predict(), expected, rtol=1e-5, atol=1e-3)  # pixels
        with torch.autocast("cpu", torch.bfloat16):
            assert predict().shape == expected.shape


LOAD = """
import sys
sys.modules["dflkern"] = None  # not importable
import torch
model = torch.load(sys.argv[1], weights_only=False)["model"].float()
output = model.eval()(torch.full((1, 3, 128, 128), 0.5))[0]
model.train().criterion = None
torch.save(output, sys.argv[2])
"""


def test_a_checkpoint_loads_without_dflkern(tmp_path):
    model = build("yolov8n")
    with patch():
        model.loss(batch_for())[0].sum().backward()
        torch.save({"model": model}, tmp_path / "last.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "last.pt"), str(tmp_path / "output.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval()(torch.full((1, 3, 128, 128), 0.5))[0]
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected)


@pytest.fixture(scope="module")
def exported():
    """A model that returns its predictions alone, as before an export."""
    model = build("yolov8n").eval()
    model.model[-1].export = True
    image = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        model(image)  # makes the anchors
    return model, image


def jit_graph(model, image, _):
    graph = str(torch.jit.trace(model, image, check_trace=False).inlined_graph)
    return re.sub(r"___torch_mangle_\d+\.", "", graph)  # TorchScript counts its compiled classes


def export_graph(model, image, _):
    return str(torch.export.export(model, (image,), strict=False).graph)


def onnx_file(model, image, path):
    pytest.importorskip("onnx", reason="needs onnx: pip install '.[peers]'")
    torch.onnx.export(model, (image,), path, opset_version=17, dynamo=False)  # as Ultralytics does
    return path.read_bytes()


def fx_code(model, image, _):
    return torch.fx.symbolic_trace(model.model[-1].dfl).code


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize("export", [jit_graph, export_graph, onnx_file, fx_code])
def test_an_export_sees_the_original_graph(export, exported, tmp_path):
    expected = export(*exported, tmp_path / "expected.onnx")
    with patch():
        assert export(*exported, tmp_path / "actual.onnx") == expected


@pytest.fixture(scope="module")
def precision():
    """The script that measures it."""
    path = Path(__file__).parents[2] / "benchmarks" / "precision.py"
    spec = importlib.util.spec_from_file_location("precision", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_precision(precision):
    """fp32 arithmetic on the logits, whatever their dtype; gradients are rounded to it."""
    found = precision.errors(images=2)
    for what, by_dtype in found.items():
        for label, error in by_dtype.items():
            ours, theirs = error[precision.PATCHED], error[precision.UPSTREAM]
            if "pixels" in what:
                bound = 5e-4
            elif "loss" in what:
                bound = 1e-6
            else:
                bound = max(1e-6, torch.finfo(precision.DTYPES[label]).eps / 2)
            assert ours <= bound, (what, label)
            if label != "fp32" and what != "DFL loss, relative":
                assert theirs > 10 * ours, (what, label)
    assert found["decode in training, largest, pixels"]["bf16 autocast"][precision.UPSTREAM] > 1
