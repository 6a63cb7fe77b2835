"""Finding and building compiled files: in the package, else in the cache folders."""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import failures, files, folders, locks
from .files import Facts, Found
from .reporting import BuildError, FolderError, TransientError, announce

ABANDONED = 24 * 3600.0  # seconds after which no build is still at work in a temporary folder
UNREADABLE = (BuildError, OSError, ValueError)


class LoadError(BuildError):
    """A file that is what was built does not load."""


@dataclass(frozen=True)
class Recipe:
    """A compiled file: what it is called, what it depends on, and how it is made.

    Attributes:
        file: its name.
        purpose: what it is to the user, for messages: "CPU kernels".
        duration: how long a build usually takes, for messages: "about 20 s"; empty for one that
            takes too little time to be announced.
        key: the name of its folder in the cache, which says all that its use depends on. It must
            not need a compiler.
        build: compiles it to a path in an empty folder and returns facts for its manifest.
        compiler: names the compiler that `build` would take, without running it, or raises a
            BuildError that says why there is none.
        toolchain: what a failed build is remembered for, a text that changes with the compilers
            that are installed; None means the compiler's name.
        prebuilt: the folder of a file that came with the package, or None.
        fits: whether a file with these facts runs on this machine.
        executable: whether it is loaded as code, which a file system mounted noexec prevents.
        timeout: the most seconds that `build` takes.
    """

    file: str
    purpose: str
    duration: str
    key: Callable[[], str]
    build: Callable[[Path], Facts]
    compiler: Callable[[], str]
    toolchain: Callable[[], str] | None = None
    prebuilt: Path | None = None
    fits: Callable[[Facts], bool] = lambda facts: True
    executable: bool = True
    timeout: float = 300.0

    def lock_wait(self) -> float:
        """Seconds after which a lock's holder is taken for dead: it had time to build."""
        return self.timeout + 10


def find(recipe: Recipe, problems: list[str]) -> Iterator[Found]:
    """The verified files, best first. Needs no compiler, no lock, no home, and writes nothing.

    Args:
        recipe: what to find.
        problems: gets a sentence for each file that is there and cannot be used.

    Raises:
        BuildError: if the key cannot be told.
    """
    if recipe.prebuilt is not None:
        found = _verified(recipe, recipe.prebuilt, problems, check_owner=False)
        if found:
            yield found
    key = recipe.key()
    for root in folders.roots():
        folder = _existing(root, recipe, key, problems)
        found = _verified(recipe, folder, problems) if folder else None
        if found:
            yield found


def obtain(recipe: Recipe) -> Found:
    """The file, found or else built.

    Raises:
        BuildError: with the compiler's message, or with what is wrong with every folder.
    """
    found = next(find(recipe, []), None)
    return found or build(recipe, lambda found: None, wanted=lambda found: True)


def remembered(recipe: Recipe) -> str | None:
    """Why an earlier build failed, if that is known and another attempt would do the same."""
    key, toolchain = recipe.key(), (recipe.toolchain or recipe.compiler)()
    for root in folders.roots():
        folder = _existing(root, recipe, key, [])
        reason = folder and failures.recall(_failure(folder, recipe), toolchain)
        if reason:
            return f"{reason} (remembered from an earlier attempt)"
    return None


def remember(recipe: Recipe, error: BuildError) -> None:
    """Write a failure down in the first folder that takes it, unless it is a transient one."""
    if isinstance(error, TransientError):
        return
    with contextlib.suppress(BuildError):
        toolchain = (recipe.toolchain or recipe.compiler)()
        for root in folders.roots():
            with contextlib.suppress(FolderError):
                folder = folders.prepare(root, recipe.key(), executable=recipe.executable)
                failures.remember(_failure(folder, recipe), str(error), toolchain)
                return


def build(
    recipe: Recipe, use: Callable[[Found], None], *, wanted: Callable[[Found], bool]
) -> Found:
    """Build the file in the first cache folder that can hold it, and use it.

    Args:
        recipe: what to build.
        use: loads the file; an error that it raises sends the build to the next folder.
        wanted: whether a file that another process built in the meantime will do.

    Raises:
        BuildError: with the compiler's message, or with what is wrong with every folder.
    """
    key = recipe.key()
    refusals: list[BuildError] = []
    for root in folders.roots():
        try:
            folder = folders.prepare(root, key, executable=recipe.executable)
            lock = folder / f"{recipe.file}.lock"
            with locks.exclusive(lock, recipe.lock_wait(), recipe.purpose) as held:
                problems = [str(error) for error in refusals]
                found = _verified(recipe, folder, problems)
                if found is None or not wanted(found):
                    where = f" in {folder}" if refusals else ""
                    because = f": {'; '.join(problems)}" if problems else ""
                    if recipe.duration:
                        what = f"{recipe.purpose} (once, {recipe.duration})"
                        announce(f"building its {what}{where}{because}")
                    _sweep(root, folder, recipe, held)
                    found = build_in(folder, recipe.file, recipe.build)
                    with contextlib.suppress(OSError):
                        _failure(folder, recipe).unlink()
            use(found)
            return found
        except (FolderError, OSError) as error:
            refusals.append(_as_build_error(error))
        except LoadError as error:
            refusals.append(error)
    permanent = [error for error in refusals if not isinstance(error, TransientError)]
    words = "; ".join(map(str, refusals)) or "there is no folder to keep it in"
    kind = BuildError if permanent else FolderError
    raise kind(f"{words}; name another folder in the environment variable DFLKERN_CACHE")


def build_in(folder: Path, file: str, make: Callable[[Path], Facts]) -> Found:
    """Build a file in a temporary folder inside `folder`, and put it into `folder` in one step.

    Raises:
        BuildError: from `make`.
        OSError: such as a full disk.
    """
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=f"build-{file}-"))
    try:
        scratch.chmod(0o700)
        made = scratch / file
        return files.install(made, folder / file, make(made))
    except BuildError as error:
        if not scratch.exists():
            raise TransientError(f"{scratch} was removed during the build") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(root: Path, folder: Path, recipe: Recipe, held: bool) -> None:
    """Remove what killed processes left: of this file if the lock is held, of others when old."""
    for scratch in root.glob("*/build-*"):
        own = held and scratch.parent == folder
        own = own and scratch.name.startswith(f"build-{recipe.file}-")
        with contextlib.suppress(OSError):  # another process removed it
            found = scratch.lstat()
            abandoned = own or time.time() - found.st_mtime > ABANDONED
            if abandoned and stat.S_ISDIR(found.st_mode):
                shutil.rmtree(scratch, ignore_errors=True)


def _verified(
    recipe: Recipe, folder: Path, problems: list[str], *, check_owner: bool = True
) -> Found | None:
    path = folder / recipe.file
    try:
        found = files.verify(path, check_owner=check_owner)
        if found is None or recipe.fits(found.facts):
            return found
        problems.append(f"{path} is for other machines than this one")
    except UNREADABLE as error:
        problems.append(str(error))
    except (KeyError, TypeError) as error:  # raised by `fits`
        problems.append(f"{files.manifest_of(path)} lacks {error}")
    return None


def _existing(root: Path, recipe: Recipe, key: str, problems: list[str]) -> Path | None:
    try:
        return folders.trusted(root, key, executable=recipe.executable)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        problems.append(str(error))
        return None


def _failure(folder: Path, recipe: Recipe) -> Path:
    return folder / f"{recipe.file}.failure"


def _as_build_error(error: FolderError | OSError) -> BuildError:
    return error if isinstance(error, FolderError) else FolderError(str(error))
