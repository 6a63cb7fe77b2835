"""`python -m dflkern`, and what importing the package does."""

import ast
import contextlib
import errno
import graphlib
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

import dflkern
from dflkern.__main__ import COMMANDS, main
from dflkern.gpu.cuda import loading as cuda

PACKAGE = Path(dflkern.__file__).parent


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"dflkern   {dflkern.__version__}" in text
    for line in ("torch ", "triton ", "python ", "devices", "cpu "):
        assert line in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert lines["reference"].endswith(": available")
    for backend in ("cpu", "triton", "cuda"):
        assert "available" in lines[backend]
    assert cuda.describe() in lines["cuda"]


def test_usage(capsys):
    for argv in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert "usage: dflkern" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dflkern {dflkern.__version__}\n"


def test_import_does_nothing_but_define():
    """No Triton, no optional library, no CUDA initialisation."""
    code = (
        "import sys, torch, dflkern\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([m for m in ('triton', 'matplotlib', 'sklearn', 'rich', 'torchmetrics',"
        " 'ultralytics') if m in sys.modules and m not in before])"
    )
    code = "import sys, torch\nbefore = set(sys.modules)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_public_is_typed_and_documented():
    for name in dflkern.__all__:
        thing = getattr(dflkern, name)
        assert inspect.getdoc(thing), name
        fields = inspect.isclass(thing) and issubclass(thing, tuple)  # of a NamedTuple
        function = thing.__init__ if inspect.isclass(thing) and not fields else thing
        hints = typing.get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        assert set(parameters) <= set(hints), name
        assert inspect.isclass(thing) or "return" in hints, name
    assert (PACKAGE / "py.typed").exists()


def test_imports_point_one_way():
    """checks, problem ← reference ← cpu, gpu ← operators ← functional ← modules ← the rest."""
    order = (
        ("checks", "problem", "library", "interception"),
        ("geometry",), ("iou",),
        ("reference",), ("cpu",), ("gpu",), ("operators",), ("detection",), ("functional",),
        ("modules", "detection_loss"), ("__init__", "adapters", "doctor"), ("commands",),
        ("demo", "bench"),
        ("__main__",),
    )  # fmt: skip
    rank = {name: i for i, names in enumerate(order) for name in names}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level < len(parts):
                continue
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            for name in names:
                target = rank.get(name, rank["__init__"])
                assert target <= rank[parts[0]], f"{path} imports {name}"


def test_no_import_circles():
    """Imports inside functions are imports too."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("dflkern", *path.relative_to(PACKAGE).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {name: set() for name in modules}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package.split(".")[: len(package.split(".")) + 1 - node.level]
                source = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    module = f"{source}.{alias.name}"
                    graph[name].add(module if module in modules else source)
    graph["dflkern"] -= {"dflkern.doctor"}  # for type checkers
    try:
        assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_names_a_machine():
    for path in PACKAGE.rglob("*.py"):
        assert "/work/" not in path.read_text(), path


# --- what any subcommand may meet ---------------------------------------------------------------


def command(*arguments, **options):
    """Start `python -m dflkern` in a process group of its own, as a shell does."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for name in ("TRITON_INTERPRET", "PYTHONUNBUFFERED"):  # argparse ignores a failed write
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "dflkern", *arguments],
        env=environment, start_new_session=True, text=True, **options,
    )  # fmt: skip


ARGUMENTS = {
    "info": (), "bench": ("--quick",), "build": (), "doctor": ("--demo",), "demo": (),
    "compile": ("--out", "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "/out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the output: No space left"),
    ],
)
def test_what_every_subcommand_answers_alike(name, error, code, words, monkeypatch, capsys):
    def fail(arguments):
        raise error

    module = importlib.import_module(COMMANDS[name][0], "dflkern")
    monkeypatch.setattr(module, "main", fail)
    code = 3 if (name, code) == ("doctor", 2) else code
    with capsys.disabled():  # its stdout may be closed on the way
        kept = os.dup(1)
    try:
        assert main([name, *ARGUMENTS[name]]) == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == (1 if words else 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["info"],
        ["doctor", "--demo", "--picture", "/dev/null/x"],
        ["demo", "--epochs", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_has_gone(arguments, tmp_path):
    """As `python -m dflkern … | head -0`: no traceback, and the shells' code for it."""
    if arguments[0] == "demo":
        pytest.importorskip("rich", reason="the demo needs rich, which is not installed")
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*arguments, stdout=writer, cwd=tmp_path)
    os.close(writer)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 141, err
    assert re.fullmatch(r"(dflkern: building its CPU kernels .*\n)?", err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["doctor", "--demo"]])
def test_output_to_a_full_disk(arguments, tmp_path):
    with open("/dev/full", "w") as full:
        process = command(*arguments, stdout=full, cwd=tmp_path)
        _, err = process.communicate(timeout=120)
    assert process.returncode == (3 if arguments[0] == "doctor" else 2)
    assert err == "dflkern: the output: No space left on device.\n"


@pytest.mark.parametrize(
    ("arguments", "begun"),
    [
        (["compile", "--arch", "80", "--out", ".", "--jobs", "2"], r"1/\d+ "),
        (["demo", "--out", "."], r"epochs of "),
        (["bench", "--quick", "--out", "."], r"\[1/"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ctrl_c_ends_all_processes_without_a_traceback(arguments, begun, tmp_path):
    for module in {"compile": ["triton"], "demo": ["rich", "torchmetrics"], "bench": ["rich"]}[
        arguments[0]
    ]:
        pytest.importorskip(module, reason=f"needs {module}, which is not installed")
    process = command(*arguments, stderr=subprocess.STDOUT, cwd=tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(begun, line):
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, lines
    assert rest.endswith("interrupted\n")
    assert "Traceback" not in "".join(lines) + rest
    for _ in range(100):  # workers that have been told to end
        if not (left := processes_in(tmp_path)):
            break
        time.sleep(0.1)
    assert not left


def processes_in(folder):
    """Processes that run in a folder, by way of /proc, which only Linux has."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.resolve() == folder.resolve():
                found.append(link)
    return found


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--epochs", "1"], ["compile", "--arch", "80"], ["build"]],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("below", [False, True])
def test_a_place_that_cannot_be_written(arguments, below, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "x" if below else tmp_path / "file"
    process = command(*arguments, "--out", str(out), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert str(out) in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_info_calls_triton_available_only_where_a_gpu_is_visible(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for visible in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda visible=visible: visible)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        main(["info"])
        line = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("  triton")
        )
        if importlib.util.find_spec("triton") is None:
            assert "Triton is not installed" in line
        elif visible:
            assert line.endswith(": available")
        else:
            assert "not available: Triton is installed, but its kernels need a GPU" in line
