"""`python -m dflkern doctor` on hundreds of odd files: a sentence and a documented exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import odd_files
import pytest
import torch

from dflkern.__main__ import main
from dflkern.doctor.files import MAX_BYTES

SENTENCE = re.compile(r"(examine: |There is no file |record: ).*[.]$")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    done = subprocess.run(
        [sys.executable, odd_files.__file__, str(folder), "5"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]  # no crash of the interpreter either
    assert not done.stderr, done.stderr[-3000:]
    *lines, memory = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {ascii(path.name) for path in folder.iterdir()} - {
        "'exploded'"
    }
    assert memory < 2  # GiB, of the whole process
    assert not (folder / "exploded").exists()  # nothing ran code from a file
    return lines


def test_there_are_many(results):
    assert len({name for name, *_ in results}) >= 300
    assert {code for _, _, code, *_ in results} == {0, 1, 2, 3}


def test_each_ends_in_a_documented_exit_code_and_soon(results):
    for name, form, code, _, err, seconds in results:
        assert code in (0, 1, 2, 3), (name, form, code)
        assert "Traceback" not in err, (name, err)
        assert "The doctor failed" not in err, (name, err)
        assert seconds < odd_files.SECONDS, (name, seconds)


def test_what_cannot_be_examined_is_told_in_one_sentence(results):
    for name, _, code, out, err, _ in results:
        if code == 3:
            file = name.strip("'\"").encode().decode("unicode_escape")
            assert not out, name
            assert SENTENCE.match(err.strip()) or err.startswith(file), (name, err)
            assert len(err) < 1000, name


def test_reports_are_printed_though_the_picture_cannot_be_drawn(results):
    reports = [result for result in results if result[2] != 3]
    assert len(reports) > 100
    for name, form, _, out, err, _ in reports:
        if form:
            assert json.loads(out)["examined"], name
        else:
            assert "Looked at" in out, name
        assert not err or re.fullmatch(r"No picture: .*\n", err), (name, err)


@pytest.mark.parametrize("name", [
    "state_dict.pt", "state_dict-old.pth", "checkpoint.pt", "checkpoint-old.pth", "wrapped.pt",
    "pickled.pt", "model.pt", "script.pt", "yolo.onnx", "last.ckpt", "pytorch_model.bin",
])  # fmt: skip
def test_a_model_is_called_one_and_what_to_record_instead(results, name):
    err = next(err for file, _, _, _, err, _ in results if file == repr(name))
    assert re.search(r"is a model, not|holds a model's parameters", err)
    assert "Record that in a training step: torch.save({'targets': targets" in err
    assert "dflkern.doctor.watch(model)" in err


@pytest.mark.parametrize(
    "name", ["labels.txt", "labels.xml", "coco.json", "boxes.csv", "data.yaml", "DATA.YML"]
)
def test_labels_are_called_so_and_what_to_record_instead(results, name):
    err = next(err for file, _, _, _, err, _ in results if file == repr(name))
    assert "is a text file, such as labels" in err
    assert "Record that in a training step: torch.save({'targets': targets" in err


@pytest.mark.parametrize("name", ["bomb.npz", "bomb.pt", "expands.pt"])
def test_what_expands_to_too_much_is_refused_with_the_limit(results, name):
    err = next(err for file, _, _, _, err, _ in results if file == repr(name))
    assert re.search(r"expands to \d+[.]\d GiB; up to 512 MiB are read", err)
    assert MAX_BYTES == 512 << 20


def test_names_from_a_file_cannot_control_the_terminal(results):
    for name, _, _, out, err, _ in results:
        assert "\x1b" not in out, name
        assert name.count("x1b") or "\x1b" not in err, name


def test_ultralytics_checkpoint(tmp_path, capsys):
    pytest.importorskip("ultralytics", reason="needs Ultralytics, which is not installed")
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    torch.save({"epoch": 1, "model": model.half(), "train_args": {}}, tmp_path / "100ep.pt")
    assert main(["doctor", str(tmp_path / "100ep.pt")]) == 3
    assert "100ep.pt is a model, not recorded tensors" in capsys.readouterr().err


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "secret.pt"
    torch.save({"targets": torch.rand(3, 4), "num_bins": 16}, path)
    path.chmod(0)
    code = "import os, sys; os.getuid() or os.setuid(65534)\n" if hasattr(os, "setuid") else ""
    code += "from dflkern.__main__ import main; sys.exit(main(sys.argv[1:]))"
    for folder in (path, tmp_path):
        folder.chmod(0o000 if folder == path else 0o700)
    done = subprocess.run(
        [sys.executable, "-c", "import sys, dflkern.commands.doctor\n" + code, "doctor", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert re.search(r"cannot be read: Permission denied[.]$", done.stderr.strip())


def test_without_the_safetensors_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["doctor", str(tmp_path / "x.safetensors")]) == 3
    assert 'pip install "dflkern[doctor]"' in capsys.readouterr().err


def test_a_working_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """The report comes first; the picture that cannot be drawn is one line."""
    torch.save({"targets": 9 * torch.rand(40, 4), "num_bins": 16}, tmp_path / "case.pt")
    (tmp_path / "runs").write_text("in the way of the folder")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "case.pt"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Healthy")
    assert re.fullmatch(r"No picture: .*runs.*\n", captured.err)


@pytest.mark.parametrize(
    ("encoding", "form"), [("ascii", ()), ("ascii", ("--json",)), ("latin-1", ())]
)
def test_output_encodings(tmp_path, encoding, form):
    done = subprocess.run(
        [sys.executable, "-m", "dflkern", "doctor", "--demo", "--picture", "/dev/null/é", *form],
        capture_output=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    out = done.stdout.decode(encoding)
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    if form:
        assert json.loads(out)["severity"] == "error"
    else:
        assert "Start with coordinates" in out


def test_examining_is_bounded_where_reading_is(tmp_path):
    """The largest file that is read is examined within a few gigabytes."""
    rows = MAX_BYTES // 4 // 64 // 4
    path = tmp_path / "large.pt"
    torch.save({"logits": torch.zeros(rows, 4, 64), "num_bins": 64}, path)
    if path.stat().st_size > MAX_BYTES:
        torch.save({"logits": torch.zeros(rows - 64, 4, 64), "num_bins": 64}, path)
    code = (
        "import resource, sys\nfrom dflkern.__main__ import main\ncode = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    Path(path).unlink()
    assert done.returncode in (0, 1), done.stderr
    assert float(done.stderr.split()[-1]) < 4  # GiB
