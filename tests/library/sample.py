"""A small file with the life of a library; run as a script, it loads it in a process of its own.

The script imports dflkern.library alone, which needs no torch, so that it starts at once.
"""

import json
import os
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

if __name__ == "__main__":  # the package without its __init__
    package = types.ModuleType("dflkern")
    package.__path__ = [str(Path(__file__).parents[2] / "dflkern")]
    sys.modules["dflkern"] = package

from dflkern.library import Loader, Recipe

CONTENT = bytes(range(256)) * 400
FILE = "sample.so"
WAY_OUT = "Without it, nothing; this is the way out."

built = []  # the paths of this process's builds


def build(path):
    """Write the content; $SAMPLE_SLEEP slows that down."""
    built.append(path)
    path.with_name("part.o").write_bytes(b"")
    time.sleep(float(os.environ.get("SAMPLE_SLEEP", "0")))
    path.write_bytes(CONTENT)
    return {"machine": "any"}


def use(path):
    if path.read_bytes() != CONTENT:
        raise OSError(f"{path} has the wrong content")


def loader(use=use, **changes):
    defaults = {
        "file": FILE,
        "purpose": "sample",
        "duration": "no time",
        "key": lambda: "key",
        "build": build,
        "compiler": lambda: "compiler 1",
    }
    return Loader(Recipe(**defaults | changes), use, otherwise=WAY_OUT)


def load(one):
    """What three calls of load() say: the result, the warnings, the state, how often it built."""
    before = len(built)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        (loaded,) = {one.load() for _ in range(3)}
    return types.SimpleNamespace(
        loaded=loaded,
        warnings=[str(each.message) for each in seen],
        state=one.describe(),
        builds=len(built) - before,
    )


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def fork_during_build(in_child):
    """Build in a thread, fork meanwhile; the child's exit code."""
    one = loader()
    thread = threading.Thread(target=one.load)
    thread.start()
    wait_for(lambda: built)
    child = os.fork()
    if child == 0:
        os._exit(in_child(one))
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(task):
    tempfile.tempdir = os.environ["TMPDIR"]  # even if it cannot be written to
    code = None
    if task == "fork":
        code = fork_during_build(lambda one: 0 if one.load() else 1)
    elif task == "fork and sleep":
        code = fork_during_build(lambda one: time.sleep(60))
    found = vars(load(loader()))
    home = Path(os.environ.get("HOME", "/nonexistent"))
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    print(json.dumps({**found, "child": code, "files": files}))


if __name__ == "__main__":
    main(sys.argv[1])
