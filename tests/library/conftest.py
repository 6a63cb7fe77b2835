"""Fixtures: an ordinary user, and a cache of its own for this process."""

import tempfile

import pytest
import sample
import users


@pytest.fixture
def user(tmp_path):
    """An ordinary user with a home, who can reach this folder."""
    return users.User(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of this process; the second choice is beside it."""
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    sample.built.clear()
    return tmp_path / "cache"


@pytest.fixture
def fake_compiler(tmp_path):
    """Makes a compiler out of a shell script: a log of its calls, then the script."""

    def make(body, name="c++"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        log = f'echo "$0 $@" >> {tmp_path}/calls'
        path.write_text(f"#!/bin/sh\n{log}\n{body}\n", errors="surrogateescape")
        path.chmod(0o755)
        return path

    make.calls = lambda: (
        (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    )
    return make
