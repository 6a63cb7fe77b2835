"""Running compilers: what fails, how, and within which time."""

import os
import threading
import time

import pytest

from dflkern.library import BuildError, FolderError, TransientError
from dflkern.library.processes import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the programs are shell scripts")


def shell(script):
    return ["/bin/sh", "-c", script]


def test_outputs_in_order(tmp_path):
    commands = [shell(f"sleep 0.0{9 - i}; echo {i}; echo error {i} >&2") for i in range(9)]
    outputs = run(commands, timeout=20, scratch=tmp_path)
    assert outputs == [f"{i}\nerror {i}\n" for i in range(9)]
    assert not list(tmp_path.iterdir())
    assert run(commands[:1], timeout=20) == outputs[:1]


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("echo 'a.cpp:1: error: no semicolon' >&2; exit 1", BuildError, "sh failed with exit code "
         "1: a.cpp:1: error: no semicolon"),
        ("exit 3", BuildError, "exit code 3: no message"),
        (r"printf 'error: \377\376 latin \344\n'; exit 1", BuildError, "latin"),
        ("kill -9 $$", TransientError, "sh was killed by SIGKILL"),
        ("kill -TERM $$", TransientError, "sh was killed by SIGTERM"),
        ("exit 137", TransientError, "sh was killed by SIGKILL"),
        ("ulimit -f 1; exec dd if=/dev/zero of=big bs=9999 count=1", TransientError, "SIGXFSZ"),
        ("echo 'c++: fatal error: Killed signal terminated program cc1plus'; exit 1",
         TransientError, "Killed signal"),
        ("echo 'cc1plus: out of memory allocating 65536 bytes'; exit 1", TransientError, "memory"),
        ("echo 'error: a.o: No space left on device'; exit 1", FolderError, "No space left"),
        ("echo 'error: a.o: Disk quota exceeded'; exit 1", FolderError, "quota"),
    ],
)  # fmt: skip
def test_failures(tmp_path, monkeypatch, script, kind, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=words) as caught:
        run([shell(script)], timeout=20, scratch=tmp_path)
    assert type(caught.value) is kind


def test_messages_are_those_of_the_c_locale(tmp_path, monkeypatch):
    """Failures are told apart by their words."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run([shell("echo $LC_ALL $TMPDIR")], timeout=20, scratch=tmp_path) == [f"C {tmp_path}\n"]


def test_what_compilers_write_is_readable_whatever_the_umask(tmp_path):
    previous = os.umask(0o777)
    try:
        run([shell(f"echo object > {tmp_path}/made.o")], timeout=20)
    finally:
        os.umask(previous)
    assert (tmp_path / "made.o").stat().st_mode & 0o777 == 0o644


def test_a_program_that_does_not_run(tmp_path):
    text = tmp_path / "text"
    text.write_text("no program")
    with pytest.raises(BuildError, match="does not run"):
        run([[str(text)]], timeout=20)
    with pytest.raises(BuildError, match="does not run"):
        run([[str(tmp_path / "missing")]], timeout=20)


def alive(path):
    try:
        os.kill(int(path.read_text()), 0)
    except (OSError, ValueError):
        return False
    return b"\nState:\tZ" not in status(path) if os.path.exists("/proc") else True


def status(path):
    try:
        with open(f"/proc/{int(path.read_text())}/status", "rb") as file:
            return file.read()
    except OSError:
        return b"\nState:\tZ"


def test_a_hanging_compiler_is_killed_with_what_it_started(tmp_path):
    hanging = shell(f"sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/own; wait")
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"sh did not finish in 1 s"):
        run([hanging, shell("true")], timeout=1, scratch=tmp_path)
    assert time.monotonic() - began < 10
    for name in ("own", "child"):
        until = time.monotonic() + 5
        while alive(tmp_path / name):
            assert time.monotonic() < until, f"{name} is alive"
            time.sleep(0.01)


def test_a_failure_ends_the_others(tmp_path):
    began = time.monotonic()
    with pytest.raises(BuildError, match="exit code 1"):
        run([shell("exit 1"), shell("sleep 60")], timeout=60, scratch=tmp_path)
    assert time.monotonic() - began < 30


def test_ctrl_c_ends_the_compilers_at_once(tmp_path):
    """They run in sessions of their own: the terminal's Ctrl-C reaches this process alone."""
    before = os.getpgid(0)
    script = f"ps -o pgid= -p $$ > {tmp_path}/group; echo $$ > {tmp_path}/own; sleep 60"
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), 2))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([shell(script)], timeout=60, scratch=tmp_path)
    assert time.monotonic() - began < 10
    assert not alive(tmp_path / "own")
    group = (tmp_path / "group").read_text().strip()
    assert group != str(before)
