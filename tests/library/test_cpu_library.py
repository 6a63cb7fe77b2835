"""The CPU library: its key, its compilers, and its life from the first call on."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from sample import load

import dflkern
from dflkern.__main__ import main
from dflkern.cpu import compiler
from dflkern.cpu import library as cpu_library
from dflkern.library import BuildError, Loader, TransientError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the library is built on POSIX systems")

CALL = """
import warnings, torch, dflkern
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = dflkern.dfl_loss(torch.zeros(4, 16), torch.ones(4))
assert abs(loss[0].item() - 2.7725887) < 1e-6
from dflkern.cpu import library
print(len([w for w in seen if "dflkern" in str(w.message)]))
print(*[w.message for w in seen if "dflkern" in str(w.message)])
print(library.describe())
"""
# As a first import of dflkern does
DEFINE = "import torch\nkeep = torch.library.Library('dflkern', 'DEF')\n"


def call(cache, **environment):
    """Three calls in a process of its own: its warnings, their words, and the library's state."""
    environment = {**os.environ, "DFLKERN_CACHE": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, check=False, timeout=120,
        env={name: value for name, value in environment.items() if value is not None},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warned, words, state = done.stdout.splitlines()
    return int(warned), words, state


@pytest.fixture(scope="session")
def built():
    """The path of this process's library, as the cache held it when the tests began."""
    if not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    return cpu_library.LOADER.find().path


@pytest.fixture
def warm(built, tmp_path):
    """A cache that holds a copy of the library."""
    folder = tmp_path / "warm" / compiler.key()
    folder.mkdir(parents=True)
    for path in (built, built.with_name(f"{built.name}.json")):
        shutil.copy(path, folder)
    for path in (folder, folder.parent):
        path.chmod(0o700)
    return folder.parent


@pytest.fixture
def fresh(cache, monkeypatch):
    """Makes a loader of the CPU library that knows nothing yet, without a library to come with it.

    Its file is not loaded into this process, which has one.
    """
    monkeypatch.delenv("CXX", raising=False)

    def make():
        recipe = dataclasses.replace(cpu_library.RECIPE, prebuilt=None)
        return Loader(recipe, lambda path: None, otherwise=cpu_library.WAY_OUT)

    return make


# ---- what a build depends on ---------------------------------------------------------------------


def test_the_key_covers_what_the_compiler_reads():
    """The files that the preprocessor opens, system and torch headers aside."""
    command = [*compiler.compilers()[0], "-MM", "-MG", "-std=c++17", "-I", str(compiler.sources())]
    paths = [str(compiler.sources() / name) for name in compiler.CPU_SOURCES]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=True)
    words = done.stdout.replace("\\\n", " ").split()
    read = {word for word in words if word.startswith(str(compiler.sources()))}
    assert {str(path) for path in compiler.with_includes(compiler.CPU_SOURCES)} == read


@pytest.fixture
def copied_sources(tmp_path, monkeypatch):
    folder = tmp_path / "csrc"
    shutil.copytree(compiler.sources(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiler, "sources", lambda: folder)
    return folder


def test_only_what_is_compiled_is_part_of_the_key(copied_sources):
    product = set(compiler.with_includes(compiler.CPU_SOURCES))
    keys = {compiler.key()}
    for path in sorted(path for path in copied_sources.rglob("*") if path.is_file()):
        path.write_text(path.read_text() + "\n// changed\n")
        before = len(keys)
        keys.add(compiler.key())
        assert (len(keys) > before) == (path in product), path
    assert len(keys) == 1 + len(product)
    assert copied_sources / "boxes.cu" not in product


def test_another_cpu_or_other_flags_are_another_build(monkeypatch):
    """A home shared by machines: a build for AVX-512 must not meet a CPU without it."""
    keys = {compiler.key()}
    for name, value in (("cpu_features", lambda: ("avx2",)), ("FLAGS", ("-O1",))):
        with monkeypatch.context() as patch:
            patch.setattr(compiler, name, value)
            keys.add(compiler.key())
    assert len(keys) == 3


# ---- which compiler ------------------------------------------------------------------------------


@pytest.fixture
def compilers(fake_compiler, monkeypatch):
    """Compilers of this name alone are on the PATH."""
    tools = fake_compiler("", name="unused").parent
    (tools / "sleep").symlink_to(shutil.which("sleep"))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    return fake_compiler


@pytest.mark.parametrize("words", ["ccache {}", "{} -O2", "'{}'"])
def test_cxx_with_arguments(compilers, monkeypatch, capsys, words):
    path = compilers('echo "it is 1.0"', name="my-c++")
    compilers('exec "$@"', name="ccache")
    monkeypatch.setenv("CXX", words.format(path))
    command, version = compiler.working_compiler()
    assert version == "it is 1.0"
    assert str(path) in command
    assert capsys.readouterr().err == ""
    assert compilers.calls()[-1] == f"{path} {'-O2 ' if '-O2' in words else ''}--version"


@pytest.mark.parametrize("cxx", ["/opt/gone/g++", "gone -O2", "'an open quotation mark", "  "])
def test_a_stale_cxx_is_mentioned_and_another_compiler_taken(compilers, monkeypatch, capsys, cxx):
    path = compilers('echo "it is 1.0"', name="g++")
    monkeypatch.setenv("CXX", cxx)
    assert compiler.working_compiler() == ((str(path),), "it is 1.0")
    assert f"CXX={cxx} is not a working compiler; using {path}" in capsys.readouterr().err


@pytest.mark.parametrize("body", ["exit 1", "sleep 60", "kill -9 $$", r"printf '\377'; exit 1"])
def test_a_compiler_that_does_not_answer_is_passed_over(compilers, monkeypatch, capsys, body):
    monkeypatch.setattr(compiler, "VERSION_TIMEOUT", 1)
    bad = compilers(body, name="bad-c++")
    path = compilers('echo "it is 1.0"', name="c++")
    monkeypatch.setenv("CXX", str(bad))
    assert compiler.working_compiler()[0] == (str(path),)
    assert f"CXX={bad} is not a working compiler (bad-c++" in capsys.readouterr().err


def test_no_compiler(compilers, fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = load(fresh())
    assert (found.loaded, len(found.warnings)) == (False, 1)
    assert "no C++ compiler was found (looked for no-such-compiler, c++" in found.warnings[0]
    assert "apt install g++" in found.warnings[0]


# ---- a build -------------------------------------------------------------------------------------

COMPILES = """
case "$*" in
  *--version*) echo "fake 1.0"; exit 0;;
esac
for word in "$@"; do [ "$last" = -o ] && echo code > "$word"; last="$word"; done
"""


def test_a_build_with_its_manifest(fresh, fake_compiler, monkeypatch, cache, capsys):
    monkeypatch.setenv("CXX", f"{fake_compiler(COMPILES)} -g")
    one = fresh()
    path = fake_compiler(COMPILES)
    assert one.describe() == f"to be built at the first call, with {path} -g"
    found = load(one)
    assert (found.loaded, found.warnings) == (True, [])
    path = cache / compiler.key() / cpu_library.LIBRARY
    assert found.state == f"loaded from {path}"
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert (facts["compiler"], facts["abi"], facts["size"]) == ("fake 1.0", "2.10", 5)
    assert facts["command"].endswith("c++ -g")
    assert "building its CPU kernels (once, about 20 s)" in capsys.readouterr().err
    compilations = [line for line in fake_compiler.calls() if " -c " in line]
    assert len(compilations) == len(compiler.CPU_SOURCES)
    assert [line for line in fake_compiler.calls() if "-shared" in line]
    before = len(fake_compiler.calls())
    monkeypatch.setenv("CXX", "another")
    assert load(fresh()).loaded
    assert len(fake_compiler.calls()) == before


@pytest.mark.parametrize(
    ("body", "words", "remembered"),
    [
        ("echo 'fatal error: it is broken' >&2; exit 1", "it is broken", True),
        (r"printf 'error: \377\376\n' >&2; exit 1", "failed with exit code 1: error", True),
        ("kill -9 $$", "killed by SIGKILL", False),
        ("echo 'error: x.o: No space left on device'; exit 1", "No space left", False),
        ("sleep 60", "did not finish in 1 s", False),
        ("exit 0", "No such file or directory", False),  # and no library
    ],
)
def test_compilers_that_fail(fresh, fake_compiler, monkeypatch, body, words, remembered):
    """One warning with the way out; the next process tries again unless it would fail again."""
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT", 1)
    version = 'case "$*" in *--version*) echo 1.0; exit 0;; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(f"{version}\n{body}")))
    found = load(fresh())
    assert (found.loaded, len(found.warnings)) == (False, 1)
    assert words in found.warnings[0]
    assert "python -m dflkern build" in found.warnings[0]
    assert words in found.state
    tried = len(fake_compiler.calls())
    again = load(fresh())
    assert not again.loaded
    assert (len(fake_compiler.calls()) == tried) is remembered
    assert ("remembered from an earlier attempt" in again.warnings[0]) is remembered
    with pytest.raises(BuildError, match=words) as caught:
        fresh().build()
    assert isinstance(caught.value, TransientError) is not remembered


# ---- the real library ----------------------------------------------------------------------------


def test_a_warm_cache_needs_no_compiler(warm):
    assert call(warm, PATH="/nonexistent", CXX=None) == (
        0, "", f"loaded from {warm / compiler.key() / cpu_library.LIBRARY}",
    )  # fmt: skip


def test_a_truncated_library_is_not_opened(warm, tmp_path):
    """Mapped, it would kill the process with SIGBUS."""
    path = warm / compiler.key() / cpu_library.LIBRARY
    os.truncate(path, 300_000)
    warned, words, state = call(warm, PATH="/nonexistent", CXX=None, TMPDIR=str(tmp_path))
    assert warned == 1
    assert "no C++ compiler was found" in words
    assert "run on the reference" in words
    assert "no C++ compiler was found" in state


def test_a_named_backend_raises_with_the_reason(tmp_path):
    code = "import torch, dflkern; dflkern.use_backend('cpu'); dflkern.dfl_decode(torch.ones(4, 8))"
    environment = {**os.environ, "PATH": "/nonexistent", "CXX": ""}
    environment |= {"DFLKERN_CACHE": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert '"cpu" was asked for and cannot serve this call: no C++ compiler' in done.stderr


def test_a_library_is_loaded_once_in_a_process(built, tmp_path):
    """Also from another path, such as after a second import of the package and a new build."""
    copy = tmp_path / built.name
    shutil.copy(built, copy)
    cpu_library.load_once(built)
    cpu_library.load_once(copy)
    assert str(copy) not in torch.ops.loaded_libraries
    assert dflkern.dfl_decode(torch.zeros(1, 16)).item() == 7.5


def test_explain_and_info_say_what_is_known(fresh, monkeypatch, capsys, compilers):
    logits = torch.zeros(4, 16)
    monkeypatch.setattr(cpu_library, "LOADER", fresh())
    assert "cpu: no, no C++ compiler was found" in dflkern.explain("dfl_decode", logits)
    main(["info"])
    assert "not available: no C++ compiler was found" in capsys.readouterr().out
    compilers('echo "it is 1.0"')
    words = "to be built at the first call, with "
    assert f"cpu: serves it (C++ kernels for CPUs, {words}" in dflkern.explain("dfl_decode", logits)
    main(["info"])
    assert f"available, {words}" in capsys.readouterr().out


def test_the_build_command_says_what_went_wrong(fresh, fake_compiler, monkeypatch, capsys):
    monkeypatch.setattr(cpu_library, "LOADER", fresh())
    monkeypatch.setenv("CXX", str(fake_compiler("echo 'error: it is broken'; exit 1")))
    monkeypatch.setattr(compiler, "working_compiler", lambda scratch: (compiler._named(), "1.0"))
    assert main(["build"]) == 1
    assert "it is broken" in capsys.readouterr().err


COMPUTE = (
    "import sys\n" + DEFINE + "torch.ops.load_library(sys.argv[1])\n"
    "z = torch.arange(32.0).view(2, 16)\n"
    "t = torch.tensor([3.25, 14.0])\n"
    "given = (z, t, None, None, None, 1, 0.01, 'none')\n"
    "loss = torch.ops.dflkern._cpu_dfl_loss(*given)\n"
    "grad = torch.ops.dflkern._cpu_dfl_loss_backward(torch.ones(2), *given)\n"
    "decoded = torch.ops.dflkern._cpu_dfl_decode(torch.zeros(9, 16), None, 1)\n"
    "print(torch.__version__, decoded.sum().item(), loss.tolist(), grad.sum().item())"
)


def compute(python, library):
    """The version of a Python's torch, and what the library's operators compute under it."""
    command = [python, "-c", COMPUTE, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().split(" ", 1)


def test_a_library_for_other_machines_of_this_kind(tmp_path, monkeypatch, capsys):
    """A real build by the command line, without optimisation, which is most of its time."""
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O0"))
    out = tmp_path / "lib"
    assert main(["build", "--out", str(out)]) == 0
    assert str(out / cpu_library.LIBRARY) in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        cpu_library.LIBRARY,
        f"{cpu_library.LIBRARY}.json",
    ]
    one = Loader(dataclasses.replace(cpu_library.RECIPE, prebuilt=out), print, otherwise="")
    path, facts = one.find()
    assert path == out / cpu_library.LIBRARY
    assert (facts["abi"], stat.S_IMODE(path.stat().st_mode)) == ("2.10", 0o644)
    assert compute(sys.executable, path)[1].startswith("67.5 ")
    monkeypatch.setattr(compiler, "cpu_features", lambda: ("sse2",))
    if facts["features"]:
        assert one.find() is None or one.find().path != path


def test_one_build_under_two_torch_versions(built):
    """The library of this torch, loaded and run by another torch."""
    other = os.environ.get("DFLKERN_OTHER_PYTHON")
    if not other:
        pytest.skip("DFLKERN_OTHER_PYTHON names no Python with another torch")
    (version, values), (other_version, other_values) = (
        compute(python, built) for python in (sys.executable, other)
    )
    assert version != other_version
    assert values == other_values
