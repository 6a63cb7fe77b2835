"""`python -m dflkern`, and what importing the package does."""

import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import dflkern
from dflkern import cuda_library
from dflkern.__main__ import main

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
    assert cuda_library.describe() in lines["cuda"]


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
        function = thing.__init__ if inspect.isclass(thing) else thing
        hints = typing.get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        assert set(parameters) <= set(hints), name
        assert inspect.isclass(thing) or "return" in hints, name
    assert (PACKAGE / "py.typed").exists()


def test_imports_point_one_way():
    """reference, geometry, problem ← kernels ← backends ← ops ← api ← modules ← demo ← __main__."""
    order = (
        ("checks", "problem", "library"), ("box_problem", "geometry", "iou", "reductions"),
        ("reference",), ("compiler",), ("cuda_compiler",), ("native",), ("cuda_library",),
        ("kernels",), ("backends",),
        ("implementations",), ("ops",), ("eager",), ("eager_boxes",), ("arguments",),
        ("api",),
        ("modules",), ("__init__", "adapters", "doctor"),
        ("info", "demo", "build", "compile", "bench"), ("__main__",),
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


def test_no_file_names_a_machine():
    for path in PACKAGE.rglob("*.py"):
        assert "/work/" not in path.read_text(), path
