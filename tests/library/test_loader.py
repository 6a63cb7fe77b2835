"""The life of a compiled file in one process: every state that its place can be in."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

import pytest
import sample
from sample import CONTENT, FILE, WAY_OUT, load, loader

from dflkern.library import BuildError, TransientError, failures, files, locks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cache's rules are those of POSIX")


@pytest.fixture
def folder(cache):
    """The sample's folder in the cache, with a good file in it."""
    assert load(loader()).builds == 1
    return cache / "key"


def manifest(**changes):
    def write(folder):
        path = folder / f"{FILE}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / FILE, 5000),
    "one byte changed": lambda folder: (folder / FILE).write_bytes(b"\1" + CONTENT[1:]),
    "empty": lambda folder: (folder / FILE).write_bytes(b""),
    "longer": lambda folder: (folder / FILE).write_bytes(CONTENT + b"\0"),
    "without a manifest": lambda folder: (folder / f"{FILE}.json").unlink(),
    "empty manifest": lambda folder: (folder / f"{FILE}.json").write_bytes(b""),
    "binary manifest": lambda folder: (folder / f"{FILE}.json").write_bytes(CONTENT),
    "manifest that is a list": lambda folder: (folder / f"{FILE}.json").write_text("[1, 2]"),
    "deeply nested manifest": lambda folder: (folder / f"{FILE}.json").write_text("[" * 100_000),
    "another size": manifest(size="many"),
    "another digest": manifest(sha256=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rebuilt_and_never_used(folder, damage, capsys):
    DAMAGES[damage](folder)
    used = []
    found = load(loader(use=lambda path: used.append(path.read_bytes())))
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert used == [CONTENT]
    assert str(folder / FILE) in capsys.readouterr().err  # says which file is damaged
    assert load(loader()).builds == 0


def make_fifo(path):
    os.mkfifo(path)


KINDS = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\0garbage" * 1000),
    "folder": lambda path: path.mkdir(),
    "full folder": lambda path: (path / "in it").mkdir(parents=True),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "named pipe": make_fifo,
    "unreadable": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
}
NAMES = [
    "cache", "cache/key", *(f"cache/key/{FILE}{end}" for end in ("", ".json", ".lock", ".failure")),
    f"cache/key/build-{FILE}-abc", f"cache/key/{FILE}.json.PID.draft",
    f"tmp/dflkern-{os.getuid() if os.name == 'posix' else 0}",
]  # fmt: skip


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_cache_holds_nothing_raises_or_hangs(cache, kind, name, works):
    """With a build that works, the file is loaded; without, there is one warning."""
    path, file = cache.parent / name.replace("PID", str(os.getpid())), cache / "key" / FILE
    load(loader())
    file.unlink()  # so that a build is needed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    KINDS[kind](path)
    for _ in range(2):
        one = loader() if works else loader(build=fail("it is broken"))
        found = load(one)
        assert found.loaded is works
        assert len(found.warnings) == (not works)
        if works and name.startswith("cache/key/"):
            assert found.state == f"loaded from {file}"  # what was in the way is gone


def fail(reason, kind=BuildError):
    def build(path):
        sample.built.append(path)
        raise kind(reason)

    return build


def test_a_failure_is_warned_of_once_and_remembered(cache, capsys):
    first = load(loader(build=fail("it is broken")))
    assert (first.loaded, first.builds) == (False, 1)
    assert first.warnings == [f"dflkern: no sample: it is broken. {WAY_OUT}"]
    assert first.state == "it is broken"
    assert "building" in capsys.readouterr().err
    second = load(loader(build=fail("not tried")))
    assert (second.loaded, second.builds) == (False, 0)
    assert "it is broken (remembered from an earlier attempt)" in second.warnings[0]
    assert capsys.readouterr().err == ""
    assert "remembered" in loader().describe()


def test_another_compiler_is_tried(cache):
    load(loader(build=fail("it is broken")))
    found = load(loader(compiler=lambda: "compiler 2"))
    assert (found.loaded, found.builds) == (True, 1)
    assert not (cache / "key" / f"{FILE}.failure").exists()


def test_a_failure_is_forgotten_after_a_day(cache, monkeypatch):
    load(loader(build=fail("it is broken")))
    now = time.time()
    for hours, builds in ((23, 0), (25, 1), (-1, 1)):  # the last: a clock that was wrong
        with monkeypatch.context() as patch:
            patch.setattr(failures.time, "time", lambda hours=hours: now + hours * 3600)
            assert load(loader(build=fail("still broken"))).builds == builds
        path = cache / "key" / f"{FILE}.failure"
        path.write_text(json.dumps({**json.loads(path.read_text()), "time": now}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"reason": 3}', '{"time": NaN}'])
def test_a_broken_record_of_a_failure_is_ignored(cache, text):
    load(loader(build=fail("it is broken")))
    (cache / "key" / f"{FILE}.failure").write_text(text)
    found = load(loader())
    assert (found.loaded, found.builds) == (True, 1)


@pytest.mark.parametrize("kind", [TransientError, OSError, MemoryError, ZeroDivisionError])
def test_what_may_pass_is_not_remembered(cache, kind):
    first = load(loader(build=fail("for now", kind)))
    assert (first.loaded, len(first.warnings)) == (False, 1)
    assert "for now" in first.warnings[0]
    assert not list(cache.glob("*/*.failure"))
    assert not list(cache.glob("*/build-*"))
    second = load(loader())
    assert (second.loaded, second.builds) == (True, 1)


def test_no_compiler_is_a_reason_and_not_remembered(cache):
    def missing():
        raise BuildError("there is no compiler")

    found = load(loader(compiler=missing))
    assert (found.loaded, found.builds, len(found.warnings)) == (False, 0, 1)
    assert found.state == "there is no compiler"
    assert not cache.exists()
    assert load(loader()).loaded
    assert load(loader(compiler=missing)).loaded


def test_ctrl_c_passes_and_leaves_the_process_able_to_try_again(cache):
    one = loader(build=fail("", KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        one.load()
    assert not list(cache.glob("*/*.failure"))
    assert not list(cache.glob("*/build-*"))
    assert one.loaded is None
    with pytest.raises(KeyboardInterrupt):
        one.load()
    assert load(loader()).loaded


def test_ctrl_c_while_another_thread_builds(cache, monkeypatch):
    """The main thread is interrupted while it waits; the build goes on and succeeds."""
    monkeypatch.setenv("SAMPLE_SLEEP", "0.5")
    one = loader()
    thread = threading.Thread(target=one.load)
    thread.start()
    sample.wait_for(lambda: sample.built)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        one.load()
    thread.join()
    assert one.loaded is True
    assert load(loader()).builds == 0


def test_threads_build_once(cache, monkeypatch):
    monkeypatch.setenv("SAMPLE_SLEEP", "0.2")
    one, results = loader(), []
    threads = [threading.Thread(target=lambda: results.append(one.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len(sample.built) == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(cache, monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    found = load(loader())
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])


def test_a_lock_that_is_never_released(cache, monkeypatch, capsys):
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    (cache / "key").mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    with locks.exclusive(cache / "key" / f"{FILE}.lock", 0, "sample") as held:
        assert held
        found = load(loader(timeout=-9.8))  # 10 s are added for what is not the build
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    words = capsys.readouterr().err
    assert "waiting for another process that builds its sample" in words
    assert "going on without it" in words


def test_what_others_build_meanwhile_is_not_swept_away(cache, monkeypatch):
    """Only the holder of the lock knows that a temporary folder of the file is abandoned."""
    left = cache / "key" / f"build-{FILE}-left"
    other = cache / "key" / "build-other.so-left"
    old = cache / "old key" / "build-old.so-left"
    for path in (left, other, old):
        path.mkdir(parents=True, mode=0o700)
    for path in (cache, cache / "key"):
        path.chmod(0o700)
    os.utime(old, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_acquire", lambda *_: False)
        loader().build()
    assert [path.exists() for path in (left, other, old)] == [True, True, False]
    loader().build()
    assert [path.exists() for path in (left, other, old)] == [False, True, False]


def test_no_folder_at_all(monkeypatch, tmp_path):
    """No home, no folder for temporary files."""

    def missing():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", missing)
    monkeypatch.setenv("DFLKERN_CACHE", "~no-such-user/cache")
    monkeypatch.chdir(tmp_path)
    found = load(loader(build=fail("not reached")))
    assert (found.loaded, found.builds, len(found.warnings)) == (False, 0, 1)
    assert "there is no folder to keep it in; name another folder" in found.warnings[0]


def test_a_file_that_does_not_load_is_built_anew(folder):
    """Such as one that was built on a machine with a newer C library, in a shared home."""
    calls = []

    def use(path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError("version GLIBC_9.9 not found")

    def build(path):
        sample.built.append(path)
        path.write_bytes(CONTENT[::-1])
        return {}

    found = load(loader(use=use, build=build))
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert calls == [folder / FILE] * 2


def test_a_file_that_never_loads_is_built_once_a_day(cache):
    def use(path):
        raise OSError("undefined symbol")

    first, second = load(loader(use=use)), load(loader(use=use))
    assert (first.loaded, first.builds) == (False, 2)  # in both folders
    assert "does not load: undefined symbol" in first.warnings[0]
    assert (second.loaded, second.builds, len(second.warnings)) == (False, 0, 1)


@pytest.fixture
def prebuilt(tmp_path):
    path = tmp_path / "package"
    path.mkdir()
    made = path / "made"
    made.mkdir()
    files.install(sample_at(made / FILE), path / FILE, {"machine": "this"})
    return path


def sample_at(path):
    path.write_bytes(CONTENT)
    return path


def test_what_came_with_the_package_needs_no_key_and_no_cache(prebuilt, cache):
    def never():
        raise AssertionError("not needed")

    for path in (prebuilt, prebuilt / FILE):
        path.chmod(0o777)  # is as trusted as the package's Python files
    found = load(loader(prebuilt=prebuilt, key=never, compiler=never, build=never))
    assert (found.loaded, found.warnings) == (True, [])
    assert found.state == f"loaded from {prebuilt / FILE}"
    assert not cache.exists()


@pytest.mark.parametrize("damage", [*DAMAGES, "for another machine", "says nothing"])
def test_a_package_file_that_does_not_serve_is_passed_over(prebuilt, cache, damage):
    DAMAGES.get(damage, lambda path: None)(prebuilt)
    name = "missing" if damage == "says nothing" else "machine"
    wanted = "this" if damage in DAMAGES else "other"
    found = load(loader(prebuilt=prebuilt, fits=lambda facts: facts[name] == wanted, build=other))
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert found.state == f"loaded from {cache}/key/{FILE}"


def other(path):
    return {"machine": "other", "missing": "other"} | {"made": sample.build(path)}


def test_a_build_that_was_asked_for_is_made_whatever_was_remembered(cache):
    faults = [True, True, False]
    one = loader(build=lambda path: (fail("it is broken") if faults.pop(0) else sample.build)(path))
    assert not load(one).loaded
    with pytest.raises(BuildError, match="it is broken"):
        one.build()
    assert one.build() == cache / "key" / FILE
    assert load(one).loaded
    assert load(loader()).builds == 0


def test_describe_builds_nothing(cache):
    one = loader()
    assert one.describe() == "to be built at the first call, with compiler 1"
    assert not cache.exists()
    one.load()
    assert loader().describe() == f"built, at {cache}/key/{FILE}"


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_no_stderr(cache, monkeypatch, capsys, stderr):
    if stderr:
        stderr = io.StringIO()
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert loader().load()
    assert capsys.readouterr().out == ""


def test_a_full_disk_leaves_the_old_file(folder, monkeypatch):
    """The build that fails in its last step is a failure of this attempt alone."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="No space left on device"):
        loader().build()
    monkeypatch.undo()
    monkeypatch.setenv("DFLKERN_CACHE", str(folder.parent))
    assert load(loader()).builds == 0
    assert not list(folder.glob("build-*"))
