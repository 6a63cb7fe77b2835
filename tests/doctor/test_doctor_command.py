"""`python -m dflkern doctor`: files that cannot run code, exit codes, JSON, picture."""

import importlib.util
import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from dflkern import doctor
from dflkern.__main__ import main
from dflkern.doctor.files import UnreadableError, read

GOOD = {"targets": 0.3 + 9 * torch.rand(200, 4), "num_bins": 16}
ABOVE = {"targets": torch.cat((GOOD["targets"], torch.full((20, 4), 20.3))), "num_bins": 16}
NEGATIVE = {"targets": GOOD["targets"] - 5, "num_bins": 16}


NAMES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}


def safetensors(path, tensors):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = (
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else struct.pack("<q", int(tensor))
        )
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def save(path, content):
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() if torch.is_tensor(v) else v for k, v in content.items()})
    else:
        safetensors(path, {k: torch.as_tensor(v) for k, v in content.items()})
    return path


def run(tmp_path, *arguments):
    return main(["doctor", *map(str, arguments), "--picture", str(tmp_path / "targets.png")])


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_exit_codes(tmp_path, capsys, suffix):
    for content, code, words in (
        (GOOD, 0, "Healthy: 1 note"),
        (ABOVE, 1, "Start with above-range"),
        (NEGATIVE, 2, "Start with negative"),
    ):
        assert run(tmp_path, save(tmp_path / f"case{suffix}", content)) == code
        printed = capsys.readouterr().out
        assert words in printed
        assert "Targets as DFL takes them, K = 16" in printed
        assert (tmp_path / "targets.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo(tmp_path, capsys):
    assert run(tmp_path, "--demo") == 2
    printed = capsys.readouterr().out
    for code in ("coordinates", "extra-bin", "loss-clamp"):
        assert f"error: {code}\n" in printed
    assert "Start with coordinates." in printed


def test_json(tmp_path, capsys):
    assert run(tmp_path, save(tmp_path / "case.pt", ABOVE), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"severity", "healthy", "num_bins", "examined", "findings", "levels"}
    assert (report["severity"], report["healthy"], report["num_bins"]) == ("warning", False, 16)
    assert report["findings"][0]["code"] == "above-range"
    assert report["findings"][0]["share"] == pytest.approx(20 / 220)
    level = report["levels"][0]
    assert level["stride"] is None
    assert sum(level["counts"]) == level["count"] == 880
    infinite = save(tmp_path / "infinite.pt", {**GOOD, "losses": [1.0, float("nan")]})
    assert run(tmp_path, infinite, "--json") == 2
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "non-finite"


def test_every_argument_can_come_from_a_file(tmp_path):
    content = {
        **GOOD, "margin": 0.1, "dim": 2, "stride": torch.full((200,), 8.0),
        "logits": torch.randn(2, 16, 9), "losses": [2.0, 1.0], "gradients": {"head": torch.ones(3)},
        "weight": torch.ones(200), "foreground": torch.ones(200, dtype=torch.bool),
        "normalizer": 3.0, "anchor_points": torch.rand(200, 2), "boxes": torch.rand(200, 4),
        "project": None,
    }  # fmt: skip
    found = read(save(tmp_path / "all.pt", content))
    assert found.keys() == content.keys()
    assert (found["margin"], found["dim"], found["num_bins"]) == (0.1, 2, 16)
    flat = {"gradients/head": torch.ones(3), "gradients/neck": torch.ones(4)}
    for suffix in (".npz", ".safetensors"):
        found = read(save(tmp_path / f"flat{suffix}", flat))
        assert {name: len(value) for name, value in found["gradients"].items()} == {
            "head": 3,
            "neck": 4,
        }


def test_bfloat16_survives(tmp_path):
    values = torch.rand(5, 4).bfloat16()
    found = read(save(tmp_path / "half.safetensors", {"targets": values}))
    assert torch.equal(found["targets"], values)


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs safetensors to compare with"
)
def test_safetensors_as_its_own_library_writes_it(tmp_path):
    from safetensors.torch import save_file

    tensors = {"targets": torch.rand(7, 4), "weight": torch.rand(7).half()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


class Bomb:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_cannot_run_code(tmp_path, capsys):
    mark = tmp_path / "exploded"
    torch.save({"targets": Bomb(mark)}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"targets": Bomb(mark)}, protocol=2))
    np.savez(tmp_path / "bomb.npz", targets=np.array([Bomb(mark)], dtype=object))
    for name, words in (("bomb.pt", "without running code"), ("raw.pt", "without running code"),
                        ("bomb.npz", "plain arrays")):  # fmt: skip
        assert run(tmp_path, tmp_path / name) == 3
        assert words in capsys.readouterr().err
    assert not mark.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())  # the bomb is a live one
    assert mark.exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.pt", None, "There is no file"),
        ("x.jpg", b"1,2", "ends in .jpg; .pt, .pth, .npz, .safetensors are read"),
        ("x.pt", b"rubbish", "damaged"),
        ("x.npz", b"rubbish", "damaged"),
        ("x.safetensors", b"", "is empty"),
        ("x.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "damaged"),
        ("x.safetensors", struct.pack("<Q", 2) + b"[]", "damaged"),
        (
            "x.safetensors",
            struct.pack("<Q", 62)
            + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}      ',
            "damaged",
        ),
    ],
)
def test_what_is_no_file_of_tensors(tmp_path, name, data, words):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableError, match=words):
        read(tmp_path / name)


def test_what_cannot_be_examined(tmp_path, capsys):
    for content, words in (
        ({"predictions": torch.rand(3)}, "holds predictions, which the doctor does not know"),
        ({"targets": torch.rand(3, 4)}, "need num_bins"),
        ({"targets": torch.rand(3, 4), "num_bins": 16, "stride": torch.rand(9)}, "do not fit"),
    ):
        assert run(tmp_path, save(tmp_path / "case.pt", content)) == 3
        assert words in capsys.readouterr().err
    torch.save([1], tmp_path / "list.pt")
    assert run(tmp_path, tmp_path / "list.pt") == 3
    assert "a dictionary is needed" in capsys.readouterr().err


def test_usage(capsys):
    for arguments in ([], ["x.pt", "--demo"]):
        with pytest.raises(SystemExit):
            main(["doctor", *arguments])
        assert "usage: dflkern doctor" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path, save(tmp_path / "case.pt", GOOD)) == 0
    assert 'No picture: pip install "dflkern[doctor]"' in capsys.readouterr().err


def test_importing_dflkern_does_not_import_the_doctor():
    code = (
        "import sys, dflkern\n"
        "assert 'dflkern.doctor' not in sys.modules\n"
        "dflkern.doctor.examine\n"
        "print([m for m in ('matplotlib', 'numpy', 'rich') if m in sys.modules])"
    )
    code = "import sys, torch\nbefore = set(sys.modules)\n" + code.replace(
        "in sys.modules])", "in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report_is_public():
    assert isinstance(doctor.examine(**GOOD), doctor.Report)
