"""The CUDA library without a GPU: its launch plans, its names, its build, how it is found."""

import dataclasses
import itertools
import os
import platform
import re
import shutil
import stat
import subprocess

import pytest
import torch

import dflkern
from dflkern.__main__ import main
from dflkern.box_problem import describe_boxes
from dflkern.cpu import compiler
from dflkern.gpu import launch, plan, prefers_triton
from dflkern.gpu.cuda import compiler as cuda_compiler
from dflkern.gpu.cuda import library as cuda_library
from dflkern.gpu.cuda.plans import SHARED_LIMIT
from dflkern.gpu.offline.nvcc import compile_plan, unit_of
from dflkern.library import BuildError, Loader
from dflkern.operators import backends
from dflkern.problem import describe

CUDA = torch.device("cuda")
OPS = [
    name + suffix
    for name in ("dfl_loss", "dfl_decode", "dfl_loss_and_decode")
    for suffix in ("", "_backward")
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def problem_of(shape, dim, dtype=torch.float32, stride=None, **options):
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    return describe(shape, stride, dtype, CUDA, dim % len(shape), **options)


def every_plan():
    shapes = [
        ((999, 0), 1, None), ((0, 1000), 0, None), ((0, 999), 0, None), ((3, 0, 5), 1, None),
        ((99, 0), 1, (300, 1)), ((99, 0), 1, (600, 2)), ((0,), 0, None),
    ]  # fmt: skip
    for (shape, dim, stride), bins, dtype, aligned, project in itertools.product(
        shapes, (2, 8, 16, 17, 33, 91, 256), DTYPES, (True, False), (True, False)
    ):
        shape = tuple(bins if axis == dim else size for axis, size in enumerate(shape))
        problem = problem_of(
            shape, dim, dtype, stride, aligned=aligned, project=project, margin=0.01
        )
        for op in OPS:
            yield plan(op, problem, "cuda")


def every_box_plan():
    for bins, dtype, kind, dim in itertools.product(
        (2, 8, 16, 17, 33, 256), DTYPES, DTYPES, (2, 3)
    ):
        shape = (2, 4, bins, 9) if dim == 2 else (2, 9, 4, bins)
        logits = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(2, 9, 3, dtype=kind, device="meta")
        for facts in ({}, {"project": True, "stride": True, "box_format": "cxcywh"}):
            for op in ("decode_boxes", "decode_boxes_backward"):
                yield plan(op, describe_boxes(logits, dim, **facts), "cuda")
        for facts in ({}, {"project": True, "foreground": True, "iou": "giou", "margin": 0.1}):
            problem = describe_boxes(logits, dim, weight=weight, **facts)
            for op in ("box_loss", "box_loss_sums", "box_loss_backward"):
                yield plan(op, problem, "cuda")


def test_plans_name_kernels_of_the_sources():
    """The table of csrc/kernels.cuh, expanded by the preprocessor."""
    ask = [
        '#include "box_entries.cuh"',
        "#define BOTH(s, w, k) DFL_NAME(s, w, forward, k); DFL_NAME(s, w, backward, k);",
        "@rows DFL_EACH(BOTH, rows)",
        "@columns DFL_EACH(BOTH, columns1) DFL_EACH_PAIR(BOTH)",
        "@general DFL_GENERAL_NAME(rows, forward); DFL_GENERAL_NAME(rows, backward);",
        "DFL_GENERAL_NAME(columns, forward); DFL_GENERAL_NAME(columns, backward);",
        "#define BOXES(k) BOTH(boxes, decode, k) BOTH(boxes, loss, k)",
        "@boxes DFL_EACH_BOX_BINS(BOXES) DFL_NAME(boxes, sums, forward, 0);",
    ]  # fmt: skip
    names = set()
    for element in ("fp16", "bf16", "fp32", "fp64"):
        expanded = subprocess.run(
            [
                *compiler.compilers()[0], "-E", "-P", "-x", "c++", f"-DDFL_ELEMENT={element}",
                f"-I{compiler.sources()}", "-",
            ],
            input="\n".join(ask), capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for part in expanded.partition("@")[2].split("@"):
            if (part.split()[0], element) in cuda_compiler.UNITS:
                names |= set(re.findall(r"(\w+);", part))
    assert len(names) == 3 * 2 * (3 * 4 * 4 - 1) + 4 * 4 + 4 * 5 + 3 * 4 * 4
    plans = [*every_plan(), *every_box_plan()]
    assert {made.kernel for made in plans} <= names
    assert {unit_of(name) for name in names} == set(cuda_compiler.UNITS)
    unused = names - {made.kernel for made in plans}
    assert not unused


def test_the_sources_are_compiled_for_the_units_of_the_table():
    text = (compiler.sources() / "kernels.cuh").read_text()
    units = re.findall(r"X\((\w+), ([fb][pf]\d+)\)", text.partition("#define DFL_UNITS")[2])
    assert set(units) == set(cuda_compiler.UNITS)


@pytest.mark.parametrize(
    ("shape", "dim", "options", "structure"),
    [
        ((999, 16), 1, {}, "rows"),
        ((999, 16), 1, {"project": True}, "rows_asked"),
        ((999, 16), 1, {"aligned": False}, "general_rows"),
        ((999, 16), 1, {"stride": (20, 1)}, "general_rows"),
        ((999, 91), 1, {}, "general_rows"),
        ((999, 16), 1, {"dtype": torch.float64}, "general_rows"),
        ((2, 4, 16, 50), 2, {}, "columns2"),
        ((2, 4, 16, 51), 2, {}, "columns1"),
        ((2, 4, 16, 50), 2, {"aligned": False}, "columns1"),
        ((2, 4, 16, 50), 2, {"stride": (5001, 800, 50, 1)}, "columns1"),
        ((999, 16), 1, {"stride": (32, 2)}, "columns1"),
        ((2, 4, 17, 50), 2, {"project": True}, "columns2_asked"),
        ((2, 4, 33, 50), 2, {"project": True}, "columns1_asked"),
        ((2, 4, 20, 50), 2, {}, "general_columns"),
    ],
)
def test_structure(shape, dim, options, structure):
    problem = problem_of(shape, dim, **options)
    for op in OPS:
        assert plan(op, problem, "cuda").kernel.startswith(f"{structure}_")


def test_a_plan_is_a_pure_value():
    problem = problem_of((1000, 16), 1, margin=0.01)
    first = plan("dfl_loss", problem, "cuda")
    plan.cache_clear()
    second = plan("dfl_loss", problem_of((1000, 16), 1, margin=0.01), "cuda")
    assert first == second
    assert hash(first) == hash(second)
    assert (first.kernel, first.grid, first.block) == (
        "rows_loss_forward_k16_fp32", (8, 1, 1), (128, 1, 1),
    )  # fmt: skip
    assert [(a.name, a.type, a.value) for a in first.arguments] == [
        ("logits", "*fp32", "logits"), ("target", "*fp32", "target"), ("project", "null", 0),
        ("loss", "*fp32", "loss"), ("position", "null", 0), ("bound", "fp32", 14.99),
        ("n", "i64", 1000),
    ]  # fmt: skip


def test_plans_fit_every_gpu():
    for made in every_plan():
        assert made.shared <= SHARED_LIMIT
        assert made.block[0] in (32, 64, 128)
        assert made.grid[0] < 2**31
        assert max(made.grid[1:]) <= 65535
        numbers = {a.name: a.value for a in made.arguments}
        rows = numbers.get("rows", 256 if made.kernel.startswith("columns2") else 128)
        assert made.grid[0] * rows >= numbers["n"]


def test_auto_takes_triton_where_that_is_the_better_one():
    few, many = problem_of((999, 24), 1), problem_of((999, 91), 1)
    fixed = problem_of((999, 17), 1, torch.float16)
    assert prefers_triton(few)
    assert not prefers_triton(many)
    assert not prefers_triton(fixed)
    assert not prefers_triton(problem_of((999, 24), 1, aligned=False))
    assert prefers_triton(problem_of((2, 24, 50), 1))
    assert not prefers_triton(problem_of((2, 91, 50), 1))
    assert backends.preference(backends._kind_of(few, ("triton", "cuda"))) == (
        "triton",
        "cuda",
        "reference",
    )
    assert backends.preference(backends._kind_of(fixed, ("triton", "cuda"))) == (
        "cuda",
        "triton",
        "reference",
    )


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A cache of its own, and a process that has looked for no library yet."""
    monkeypatch.setenv("DFLKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_library, "LOADER", fresh_loader())
    return tmp_path


def fresh_loader(**changes):
    recipe = dataclasses.replace(cuda_library.RECIPE, **changes)
    absent = cuda_library.NOT_BUILT
    return Loader(recipe, cuda_library.load_once, otherwise="", absent=absent)


def test_not_built(alone):
    assert cuda_library.describe() == cuda_library.NOT_BUILT
    assert not cuda_library.load()
    assert backends.unavailable("cuda") == [cuda_library.NOT_BUILT]


def test_amd(alone, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in cuda_library.refusals()[0]


def test_a_broken_library_is_a_reason(alone, monkeypatch):
    def write(path):
        path.write_bytes(b"not a library")
        return {"machine": platform.machine(), "archs": [80]}

    broken = cuda_library.LOADER.build(write)
    with pytest.warns(RuntimeWarning, match=f"{broken} does not load"):
        assert not cuda_library.load()
    assert not cuda_library.load()
    assert str(broken) in cuda_library.refusals()[0]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ([80, 90], 80, True), ([80, 90], 86, True), ([80, 90], 75, False), ([86], 80, False),
        ([80, 90], 100, True), ([80, 90], 90, True), ([75, 120], 90, False), ([90], 89, False),
    ],
)  # fmt: skip
def test_which_gpus_a_build_runs_on(archs, capability, runs):
    assert cuda_library.runs_on(archs, capability) == runs


def test_no_nvcc(alone, monkeypatch, capsys):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert main(["build", "--cuda"]) == 1
    words = capsys.readouterr().err
    assert "no CUDA compiler was found (looked for no-such-nvcc)" in words
    assert "install NVIDIA's CUDA toolkit" in words


def test_arch_is_for_cuda(capsys):
    assert main(["build", "--arch", "80"]) == 1
    assert "add --cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", "--cuda", "--arch", "new"])


@pytest.fixture
def fake_nvcc(alone, monkeypatch):
    """An nvcc that knows three architectures, logs its calls and writes empty files."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA, so no CUDA library is built for it")
    path = alone / "nvcc"
    path.write_text(
        '#!/bin/sh\necho "$@" >> ' + str(alone / "calls") + "\n"
        'case "$1" in --list-gpu-arch) echo compute_80 compute_90 compute_100;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done; true\n'
    )
    path.chmod(0o700)
    monkeypatch.setenv("NVCC", str(path))
    return alone


def test_a_build_is_found_afterwards(fake_nvcc, capsys):
    assert main(["build", "--cuda", "--arch", "9.0,sm_80,80"]) == 0
    path, facts = cuda_library.LOADER.find()
    assert str(path) in capsys.readouterr().out
    assert cuda_library.refusals() == []
    assert cuda_library.describe() == f"built, at {path}"
    assert facts["archs"] == [80, 90]
    calls = (fake_nvcc / "calls").read_text().splitlines()
    compilations = [line for line in calls if "-DDFL_ELEMENT=" in line]
    assert len(compilations) == len(cuda_compiler.UNITS)
    for line in compilations:
        assert re.findall(r"-gencode=(\S+)", line) == [
            "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90",
            "arch=compute_90,code=compute_90",
        ]  # fmt: skip
    assert sum("-cudart=static" in line for line in calls) == 1
    path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="others can write to"):
        assert not cuda_library.load()
    assert "others can write to" in cuda_library.refusals()[0]


def test_archs(fake_nvcc, monkeypatch):
    nvcc = cuda_compiler.find_nvcc()
    if not torch.cuda.is_available():
        assert cuda_compiler.choose_archs(None, nvcc) == (80, 90, 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda_compiler.choose_archs(None, nvcc) == (90,)
    with pytest.raises(BuildError, match="cannot build for sm_75; it knows 80, 90, 100"):
        cuda_compiler.choose_archs([75], nvcc)


def test_prebuilt(fake_nvcc, monkeypatch):
    out = fake_nvcc / "lib"
    assert main(["build", "--cuda", "--arch", "80", "--out", str(out)]) == 0
    assert cuda_library.LOADER.find() is None
    monkeypatch.setattr(cuda_library, "LOADER", fresh_loader(prebuilt=out))
    assert cuda_library.LOADER.find().path == out / cuda_library.LIBRARY


def test_one_file_compiles(alone):
    """With the real nvcc: the file with the least in it, as the emulator and the budgets get it."""
    if shutil.which("nvcc") is None and not os.environ.get("NVCC"):
        pytest.skip("no nvcc")
    problem = problem_of((999, 16), 1, torch.float64, margin=0.01)
    made = plan("dfl_loss_backward", problem, "cuda")
    compiled = compile_plan(made, 80)
    assert compiled.entry == "general_rows_backward_fp64"
    assert re.findall(r"\.entry (\w+)", compiled.ptx) == [compiled.entry]
    assert ".target sm_80" in compiled.ptx
    assert not re.search(r"\b(atom|red)\.", compiled.ptx)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.shared == made.shared == 128 * 17 * 8
    (ptx,) = (alone / "cache").glob("*/*.ptx")
    before = ptx.stat().st_mtime_ns
    assert compile_plan(made, 80) == compiled
    assert ptx.stat().st_mtime_ns == before
    assert stat.S_IMODE(ptx.parent.stat().st_mode) == 0o700


def test_the_library_knows_every_plan():
    """The real library: each plan's kernel is there, and takes as many tensors and numbers."""
    if not cuda_library.load():
        pytest.skip(f"no CUDA library: {cuda_library.describe()}")
    tensor = torch.zeros(4)
    kernels = {made.kernel: made for made in (*every_plan(), *every_box_plan())}
    for made in kernels.values():
        roles = [argument.value for argument in made.arguments]
        tensors = dict.fromkeys((role for role in roles if isinstance(role, str)), tensor)
        with pytest.raises(RuntimeError, match="take tensors of one CUDA device"):
            launch.launch(made, tensors)
    with pytest.raises(RuntimeError, match="has no kernel nonsense; it was built from other"):
        torch.ops.dflkern._cuda_launch("nonsense", [1, 1, 1], 128, 0, [tensor], [], 0.0)
    with pytest.raises(RuntimeError, match="takes a grid of 3 axes, 5 tensors"):
        torch.ops.dflkern._cuda_launch(
            "rows_loss_forward_k16_fp32", [1, 1, 1], 128, 0, [tensor], [1], 0.0
        )
    with dflkern.use_backend("cuda"), pytest.raises(RuntimeError, match="the logits are on cpu"):
        dflkern.dfl_decode(torch.zeros(3, 16))
