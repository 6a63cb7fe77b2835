"""The wheel: pure, complete, and usable away from the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dflkern

ROOT = Path(__file__).parents[2]

USE = """
import pathlib, sys
import torch
import dflkern
assert pathlib.Path(dflkern.__file__).is_relative_to(sys.argv[1]), dflkern.__file__
logits = torch.randn(8, 4, 16, requires_grad=True)
dflkern.dfl_loss(logits, torch.rand(8, 4) * 15, reduction="mean").backward()
assert logits.grad.abs().sum() > 0
print(dflkern.explain("dfl_decode", logits))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources, so that the build leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    if not names:
        pytest.skip("the tests do not run from a clone, so there are no sources to build from")
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_is_pure_and_complete(wheel):
    assert wheel.name == f"dflkern-{dflkern.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dflkern").rglob("*.py")} | {
        "dflkern/py.typed"
    }
    assert modules <= names
    assert not [name for name in names if name.startswith("tests")]
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_works_outside_the_clone(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(site)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dfl_decode: 32 distributions of 16 bins" in done.stdout
