"""A small file with the life of a library, and processes of an ordinary user that load it.

The processes import dflkern.library alone, which needs no torch, so that they start at once.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 65534
CONTENT = bytes(range(256)) * 400
FILE = "sample.so"

if __name__ == "__main__":  # in a process of its own: the package without its __init__
    package = types.ModuleType("dflkern")
    package.__path__ = [str(ROOT / "dflkern")]
    sys.modules["dflkern"] = package

from dflkern.library import Loader, Recipe

built = []


def build(path):
    """Write the content; $SAMPLE_SLEEP slows that down, $SAMPLE_FAIL makes it fail."""
    built.append(path)
    path.with_name("part.o").write_bytes(b"")
    time.sleep(float(os.environ.get("SAMPLE_SLEEP", "0")))
    path.write_bytes(CONTENT)
    return {"machine": "any"}


def use(path):
    if path.read_bytes() != CONTENT:
        raise OSError(f"{path} has the wrong content")


def recipe(**changes):
    defaults = {
        "file": FILE,
        "purpose": "sample",
        "duration": "no time",
        "key": lambda: "key",
        "build": build,
        "compiler": lambda: "compiler 1",
    }
    return Recipe(**defaults | changes)


def loader(use=use, **changes):
    return Loader(recipe(**changes), use, otherwise="Otherwise nothing; the way out.")


def load(one):
    """What three calls of load() say: the result, the warnings, the state."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = {one.load() for _ in range(3)}
    (result,) = results
    words = [str(each.message) for each in seen]
    return types.SimpleNamespace(
        loaded=result, warnings=words, state=one.describe(), builds=len(built)
    )


def main():
    print(json.dumps(vars(load(loader()))))


def command(user=None, mount=None):
    """The start of a command line that runs as an ordinary user, with a mount if asked for.

    Where the tests run as root, the user is `user` and keeps the right to read everything, since
    Python itself may be in root's home.
    """
    words = []
    if mount is not None:
        if os.getuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("only root can mount a file system")
        options, folder = mount
        script = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
        words += [shutil.which("unshare"), "-m", "/bin/sh", "-c", script, "sh"]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, and there is no setpriv to become an ordinary user")
        words += [
            shutil.which("setpriv"), f"--reuid={user or NOBODY}", f"--regid={NOBODY}", "--clear-groups",
            "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
        ]  # fmt: skip
    return [*words, sys.executable]


class User:
    """An ordinary user with a home and a folder for temporary files."""

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

    def start(self, *, user=None, mount=None, umask=-1, code=None, **environment):
        """Start a process that loads the sample, or runs other code."""
        hidden = ("DFLKERN_CACHE", "XDG_CACHE_HOME", "CXX")
        environment = {
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "HOME": str(self.home), "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }  # fmt: skip
        script = [str(Path(__file__))] if code is None else ["-c", code]
        return subprocess.Popen(
            [*command(user, mount), *script], text=True, umask=umask, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={name: value for name, value in environment.items() if value is not None},
        )  # fmt: skip

    def load(self, **options):
        """What three calls of load() say in a process of the user's, and what it printed."""
        return result(self.start(**options))


def result(process):
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if "Operation not permitted" in errors and ("mount" in errors or "setpriv" in errors):
        pytest.skip(f"root without the right to do this: {errors.strip()}")
    assert process.returncode == 0, errors
    found = types.SimpleNamespace(**json.loads(output))
    found.messages = errors
    return found


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


if __name__ == "__main__":
    main()
