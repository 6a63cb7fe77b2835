"""Processes of an ordinary user, who has a home and a folder for temporary files."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import types

import pytest
import sample

NOBODY = 65534


def command(user=NOBODY, mount=None):
    """The start of a command line that runs as an ordinary user, with a mount if asked for.

    Where the tests run as root, the user keeps root's right to read everything, since Python itself
    may be in root's home.
    """
    words = []
    if mount is not None:
        if os.getuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("mounting a file system needs root and the program unshare")
        options, folder = mount
        script = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
        words += [shutil.which("unshare"), "-m", "/bin/sh", "-c", script, "sh"]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, and there is no setpriv to become an ordinary user")
        words += [shutil.which("setpriv"), f"--reuid={user}", f"--regid={NOBODY}"]
        right = "caps=+dac_read_search"
        words += ["--clear-groups", f"--inh-{right}", f"--ambient-{right}"]
    return [*words, sys.executable]


class User:
    """An ordinary user: `nobody` where the tests run as root, else whoever runs them."""

    def __init__(self, folder):
        self.folder = folder
        self.home, self.temporary = folder / "home", folder / "tmp"
        for path in (self.home, self.temporary):
            path.mkdir(mode=0o700)
            self.give(path)

    def give(self, path):
        """Make the user the owner of a path and of what is below it."""
        if os.getuid() == 0:
            for each in (path, *path.rglob("*")):
                os.chown(each, NOBODY, NOBODY, follow_symlinks=False)

    @property
    def cache(self):
        return self.home / ".cache" / "dflkern"

    def start(self, task="load", *, user=NOBODY, mount=None, umask=-1, **environment):
        """Start a process that runs the sample; an environment variable of None is unset."""
        hidden = dict.fromkeys(("DFLKERN_CACHE", "XDG_CACHE_HOME", "CXX"))
        own = {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        environment = {**os.environ, **hidden, **own, **environment}
        return subprocess.Popen(
            [*command(user, mount), "-B", sample.__file__, task],
            text=True, umask=umask, cwd="/", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={name: value for name, value in environment.items() if value is not None},
        )  # fmt: skip

    def load(self, *words, **options):
        """What three calls of load() say in a process of the user's, and what it printed."""
        return result(self.start(*words, **options))


def result(process):
    """What a process of `User.start` reports."""
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode and any(word in errors for word in ("mount:", "unshare:", "setpriv:")):
        pytest.skip(f"this root may not do everything: {errors.strip()}")
    assert process.returncode == 0, errors
    return types.SimpleNamespace(**json.loads(output), messages=errors)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)
