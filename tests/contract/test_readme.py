"""The README's code runs, and its tables are those of the recorded results."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_code_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].grad.isfinite().all()
    assert names["logits"].grad.any()
    assert names["xyxy"].shape == (2, 4, 8400)
    assert names["iou_loss"].isfinite()
    assert "serves it" in capsys.readouterr().out


def test_the_two_commands_are_those_of_the_project():
    assert 'pip install ".[demo]" && python -m dflkern demo' in README
    assert 'pip install ".[test]" && pytest' in README


def test_tables_are_the_recorded_ones():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
