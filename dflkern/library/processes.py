"""Running compilers: side by side, with a time limit, and with failures told apart."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from .reporting import BuildError, FolderError, TransientError

# What compilers and linkers print, in the C locale, when the machine is at fault
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")
TRANSIENT = (
    "Killed", "Terminated", "signal terminated", "annot allocate memory", "ut of memory",
    "memory exhausted", "Resource temporarily unavailable", "Input/output error",
    "Stale file handle", "Too many open files", "Read-only file system",
)  # fmt: skip


class _Running(NamedTuple):
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    output: IO[bytes]


def run(
    commands: Sequence[Sequence[str]], *, timeout: float, scratch: Path | None = None
) -> list[str]:
    """Run commands, as many at a time as there are CPUs.

    Args:
        commands: each a program and its arguments.
        timeout: seconds for all of them together; what still runs then is killed.
        scratch: a folder for their temporary files; None means the system's.

    Returns:
        What each printed.

    Raises:
        BuildError: if one fails, with its first error message; TransientError if it was killed,
            timed out or lacked memory; FolderError if the disk is full.
    """
    waiting, running = deque(enumerate(commands)), dict[int, _Running]()
    outputs = [""] * len(commands)
    deadline = time.monotonic() + timeout
    try:
        while waiting or running:
            while waiting and len(running) < _cpus():
                i, command = waiting.popleft()
                running[i] = _start(command, scratch)
            for i, one in list(running.items()):
                if one.process.poll() is not None:
                    outputs[i] = _result(running.pop(i))
            if running and time.monotonic() > deadline:
                late = next(iter(running.values())).command
                raise TransientError(f"{_name(late)} did not finish in {timeout:.0f} s")
            if running:
                time.sleep(0.01)
    finally:
        for one in running.values():
            _kill(one)
    return outputs


def _start(command: Sequence[str], scratch: Path | None) -> _Running:
    """Start a command in a session of its own: Ctrl-C is for this process, which then kills it."""
    environment = {**os.environ, "LC_ALL": "C"}
    if scratch is not None:
        environment["TMPDIR"] = str(scratch)
    output = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (closed by _result or _kill)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True, umask=0o022,
        )  # fmt: skip
    except BlockingIOError as error:
        output.close()
        raise TransientError(f"{command[0]} could not be started: {error}") from error
    except OSError as error:
        output.close()
        raise BuildError(f"{command[0]} does not run: {error}") from error
    return _Running(command, process, output)


def _result(one: _Running) -> str:
    with one.output as file:
        file.seek(0)
        text = file.read().decode("utf-8", errors="replace")
    code = one.process.returncode
    if code == 0:
        return text
    name = _name(one.command)
    number = -code if code < 0 else code - 128  # 128 + signal: what a shell makes of it
    if 0 < number < 65:
        raise TransientError(f"{name} was killed by {_signal(number)}")
    lines = text.strip().splitlines()
    told = [line for line in lines if "error" in line.lower()] or lines[-3:] or ["no message"]
    reason = f"{name} failed with exit code {code}: {told[0].strip()}"
    if any(words in text for words in NO_SPACE):
        raise FolderError(reason)
    if any(words in text for words in TRANSIENT):
        raise TransientError(reason)
    raise BuildError(reason)


def _kill(one: _Running) -> None:
    with contextlib.suppress(OSError):
        os.killpg(one.process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        one.process.wait(timeout=5)
    one.output.close()


def _name(command: Sequence[str]) -> str:
    return Path(command[0]).name


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
