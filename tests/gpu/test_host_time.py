"""The benchmark of host time: what it counts is certain, what it times is only there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record(stub_device, tmp_path_factory):
    path = tmp_path_factory.mktemp("host_time") / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_time", "--rounds", "1", "--out", str(path),
         "--only", "dfl_loss none", "eager"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_launches_and_file_system_calls_are_counted(record):
    _, found = record
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["dfl_loss none", "eager", "decode without grad, eager"]
    assert rows["dfl_loss none"]["launches_passed"] == 2  # forward and backward
    assert rows["eager"]["launches"] == rows["eager"]["launches_passed"] + 1  # a gradient of one
    assert rows["eager"]["launches"] > 20
    assert rows["dfl_loss none"]["files"] == 0


def test_times_hold_the_launches(record):
    _, found = record
    for row in found["rows"]:
        assert row["same"] >= row["launches"] * found["launch_ns"] / 1000
        assert row["new"] is None or row["new"] > 0


def test_goals_are_printed_with_what_was_measured(record):
    table, _ = record
    assert "met    dfl_loss none: launches, gradient passed in: 2.00, at most 3" in table
