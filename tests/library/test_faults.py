"""What can go wrong with a file on disk, as an ordinary user meets it: a process per case."""

import os
import signal
from pathlib import Path

import pytest
from sample import CONTENT, FILE, WAY_OUT, wait_for
from users import NOBODY, mode, result

pytestmark = pytest.mark.skipif(os.name != "posix", reason="users and modes are those of POSIX")
AS_ROOT = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root")


def test_built_once_then_found(user):
    first, second = user.load(), user.load(PATH="/nonexistent")
    assert (first.loaded, first.builds, first.warnings) == (True, 1, [])
    assert "building its sample (once, no time)" in first.messages
    assert first.state == f"loaded from {user.cache}/key/{FILE}"
    assert (second.loaded, second.builds, second.messages) == (True, 0, "")


def test_no_home(user):
    """A user without an entry in /etc/passwd and without $HOME, as in containers."""
    user.temporary.chmod(0o1777)
    found = user.load(user=54321, HOME=None)
    assert (found.loaded, found.warnings) == (True, [])
    number = 54321 if os.getuid() == 0 else os.getuid()
    if os.getuid() == 0:
        assert found.state.startswith(f"loaded from {user.temporary}/dflkern-{number}/key/")


def test_read_only_home(user):
    user.home.chmod(0o500)
    first, second = user.load(), user.load()
    place = f"{user.temporary}/dflkern-"
    assert (first.loaded, first.builds, first.warnings) == (True, 1, [])
    assert first.messages.count("\n") == 1
    assert place in first.messages
    assert "Permission denied" in first.messages
    assert (second.loaded, second.builds, second.messages) == (True, 0, "")
    assert second.state.startswith(f"loaded from {place}")


def test_read_only_cache_that_holds_the_file(user):
    user.load()
    for path in (user.cache / "key" / FILE, user.cache / "key", user.cache):
        path.chmod(0o500 if path.is_dir() else 0o400)
    found = user.load(PATH="/nonexistent")
    assert (found.loaded, found.builds, found.messages) == (True, 0, "")
    assert found.state == f"loaded from {user.cache}/key/{FILE}"


def test_nowhere_to_write(user):
    user.home.chmod(0o500)
    user.temporary.chmod(0o500)
    found = user.load()
    assert (found.loaded, found.builds, len(found.warnings)) == (False, 0, 1)
    assert "Permission denied" in found.warnings[0]
    assert "DFLKERN_CACHE" in found.warnings[0]
    assert found.warnings[0].endswith(WAY_OUT)


def test_noexec_cache(user):
    found = user.load(mount=(f"noexec,uid={NOBODY},mode=0700", user.home))
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert found.state.startswith(f"loaded from {user.temporary}/dflkern-")
    assert "mounted noexec" in found.messages


def test_full_disk(user):
    found = user.load(mount=(f"size=40k,uid={NOBODY},mode=0700", user.home))
    assert (found.loaded, found.builds, found.warnings) == (True, 2, [])
    assert found.state.startswith(f"loaded from {user.temporary}/dflkern-")
    assert "No space left on device" in found.messages


def test_every_disk_is_full(user):
    mount = (f"size=48k,uid={NOBODY},mode=0700", user.home)
    found = user.load(mount=mount, TMPDIR=str(user.home / "tmp"))
    assert (found.loaded, len(found.warnings)) == (False, 1)
    assert "No space left on device" in found.warnings[0]
    assert {os.path.basename(path) for path in found.files} == {f"{FILE}.lock"}


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o027, 0o777])
def test_umask(user, umask):
    """Whatever the umask, a process accepts what another one built, and others cannot change it."""
    first, second = user.load(umask=umask), user.load(umask=umask)
    assert (first.loaded, first.builds, first.warnings) == (True, 1, [])
    assert (second.loaded, second.builds, second.messages) == (True, 0, "")
    assert mode(user.cache) == mode(user.cache / "key") == mode(user.home / ".cache") == 0o700
    assert mode(user.cache / "key" / FILE) == mode(user.cache / "key" / f"{FILE}.json") == 0o644


@AS_ROOT
@pytest.mark.parametrize("name", [".", "key", f"key/{FILE}"])
def test_what_belongs_to_another_user_is_not_loaded(user, name):
    user.load()
    os.chown(user.cache / name, 12345, 12345)
    found = user.load()
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert f"belongs to user 12345, not to {NOBODY}" in found.messages
    again = user.load()
    assert (again.loaded, again.builds) == (True, 0)
    assert again.state == found.state


@AS_ROOT
def test_what_root_provides_is_loaded(user):
    user.load()
    for path in (user.cache, *user.cache.rglob("*")):
        os.chown(path, 0, 0)
        path.chmod(0o755)
    found = user.load()
    assert (found.loaded, found.builds, found.messages) == (True, 0, "")


@AS_ROOT
def test_a_link_to_the_file_of_another_user_is_not_loaded(user):
    user.load()
    file = user.cache / "key" / FILE
    foreign = user.folder / "foreign.so"
    file.rename(foreign)
    os.chown(foreign, 12345, 12345)
    file.symlink_to(foreign)
    user.give(user.cache)
    os.chown(foreign, 12345, 12345)
    found = user.load()
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert "leads to what belongs to user 12345" in found.messages
    assert not file.is_symlink()
    assert foreign.read_bytes() == CONTENT


@AS_ROOT
def test_a_link_that_another_user_made_is_not_followed(user):
    own = user.folder / "own"
    own.mkdir(mode=0o700)
    user.give(own)
    user.cache.parent.mkdir(mode=0o700)
    user.give(user.home)
    user.cache.symlink_to(own)
    os.chown(user.cache, 12345, 12345, follow_symlinks=False)
    found = user.load()
    assert found.loaded
    assert "belongs to user 12345" in found.messages
    assert not list(own.iterdir())


def test_a_linked_cache_folder_of_ones_own(user):
    scratch = user.folder / "scratch"
    scratch.mkdir(mode=0o700)
    user.cache.parent.mkdir(mode=0o700)
    user.cache.symlink_to(scratch)
    for path in (scratch, user.home):
        user.give(path)
    first, second = user.load(), user.load()
    assert (first.loaded, first.builds, first.warnings) == (True, 1, [])
    assert (second.loaded, second.builds, second.messages) == (True, 0, "")
    assert (scratch / "key" / FILE).exists()


@pytest.mark.parametrize("name", [".", "key", f"key/{FILE}"])
def test_what_others_can_write_to_is_not_loaded(user, name):
    user.load()
    path = user.cache / name
    path.chmod(0o777)
    found = user.load()
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert "others can write to" in found.messages
    assert "chmod go-w" in found.messages


def test_eight_processes_build_once(user):
    processes = [user.start(SAMPLE_SLEEP="1") for _ in range(8)]
    results = [result(process) for process in processes]
    assert all(found.loaded and not found.warnings for found in results)
    assert sum(found.builds for found in results) == 1
    assert sum("building" in found.messages for found in results) == 1
    assert sorted(path.name for path in (user.cache / "key").iterdir()) == [
        FILE, f"{FILE}.json", f"{FILE}.lock",
    ]  # fmt: skip


def test_a_waiting_process_says_so(user):
    first = user.start(SAMPLE_SLEEP="3")
    wait_for(lambda: list(user.cache.glob("key/build-*")))
    second = user.load()
    assert (second.loaded, second.builds) == (True, 0)
    assert "waiting for another process that builds its sample" in second.messages
    assert result(first).builds == 1


def test_killed_in_a_build(user):
    process = user.start(SAMPLE_SLEEP="60")
    wait_for(lambda: list(user.cache.glob("key/build-*/part.o")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(user.cache.glob("key/build-*"))
    found = user.load()
    assert (found.loaded, found.builds, found.warnings) == (True, 1, [])
    assert not list(user.cache.glob("key/build-*"))


def test_fork_during_a_build(user):
    """The child has neither its parent's thread nor its locks, and waits for the parent's file."""
    found = user.load("fork", SAMPLE_SLEEP="1")
    assert (found.loaded, found.child) == (True, 0)
    assert found.messages.count("building its sample") == 1


def test_a_child_of_a_killed_builder_does_not_keep_the_lock(user):
    process = user.start("fork and sleep", SAMPLE_SLEEP="60")
    wait_for(lambda: list(user.cache.glob("key/build-*/part.o")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list the children of a process")
    wait_for(children.read_text)
    process.kill()
    process.wait()
    found = user.load()
    os.killpg(process.pid, signal.SIGKILL)
    assert (found.loaded, found.builds) == (True, 1)
    assert "waiting" not in found.messages
