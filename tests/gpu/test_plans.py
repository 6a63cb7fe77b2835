"""Launch plans: pure values, the right structure for each problem, compiled offline."""

import os
import subprocess
import sys

import pytest
import torch

from dflkern.gpu import LaunchPlan, arguments, plan, steps
from dflkern.operators.table import ALL
from dflkern.problem import Axis, describe, merge

CUDA = torch.device("cuda")


def problem_of(shape, dim, dtype=torch.float32, stride=None, **options):
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    return describe(shape, stride, dtype, CUDA, dim % len(shape), **options)


def test_a_plan_is_a_pure_value():
    problem = problem_of((1000, 16), 1, margin=0.01)
    first = plan("dfl_loss", problem, "triton")
    plan.cache_clear()
    second = plan("dfl_loss", problem_of((1000, 16), 1, margin=0.01), "triton")
    assert isinstance(first, LaunchPlan)
    assert first == second
    assert hash(first) == hash(second)
    assert first.grid == (8, 1, 1)
    assert dict(first.constants)["position_ptr"] is None
    assert [a.value for a in first.arguments] == ["logits", "target", "loss", 1000]


@pytest.mark.parametrize(
    ("shape", "dim", "options", "forward", "backward"),
    [
        ((999, 16), 1, {}, "rows_chunk", "rows_tile"),
        ((999, 24), 1, {}, "rows_chunk", "rows_lazy"),
        ((999, 17), 1, {}, "rows_lazy", "rows_lazy"),
        ((999, 91), 1, {}, "rows_tile", "rows_tile"),
        ((999, 16), 1, {"project": True}, "rows_lazy", "rows_lazy"),
        ((999, 91), 1, {"project": True}, "columns", "columns"),
        ((999, 16), 1, {"aligned": False}, "columns", "columns"),
        ((999, 16), 1, {"stride": (20, 1)}, "columns", "columns"),
        ((999, 16), 1, {"stride": (32, 2)}, "columns", "columns"),
        ((2, 4, 16, 50), 2, {}, "columns", "columns"),
        ((2, 5, 4, 16), 3, {}, "rows_chunk", "rows_tile"),
    ],
)
def test_structure(shape, dim, options, forward, backward):
    problem = problem_of(shape, dim, **options)
    for op in ("dfl_loss", "dfl_decode", "dfl_loss_and_decode"):
        assert plan(op, problem, "triton").kernel == f"{forward}_forward_kernel"
        assert plan(f"{op}_backward", problem, "triton").kernel == f"{backward}_backward_kernel"


def test_a_heads_slice_is_read_in_place():
    """The box channels of (2, 100, 50), viewed as (B, 4, K, A): strides (5000, 800, 50, 1)."""
    problem = problem_of((2, 4, 16, 50), 2, stride=(5000, 800, 50, 1))
    assert problem.layout == "columns"
    assert problem.axes == (
        Axis(2, 5000, 200, 3200), Axis(4, 800, 50, 800), Axis(50, 1, 1, 1),
    )  # fmt: skip
    launch = plan("dfl_decode_backward", problem, "triton")
    assert launch.grid == (1, 4, 2)
    numbers = {a.name: a.value for a in launch.arguments} | dict(launch.constants)
    assert numbers["bin_stride"] == numbers["grad_bin_stride"] == 50
    assert numbers["middle_stride"] == 800
    assert numbers["outer_stride"] == 5000
    assert numbers["axis_stride"] == 1


def test_a_contiguous_head_has_two_axes():
    problem = problem_of((16, 4, 16, 8400), 2)
    assert [axis.size for axis in problem.axes] == [64, 8400]
    assert plan("dfl_decode", problem, "triton").grid == (66, 64, 1)


def test_merge_leaves_out_size_one_and_keeps_what_cannot_be_joined():
    axes = [Axis(3, 40, 20, 20), Axis(1, 7, 7, 7), Axis(4, 10, 5, 5), Axis(5, 2, 1, 1)]
    assert merge(axes) == (Axis(60, 2, 1, 1),)
    axes[0] = Axis(3, 41, 20, 20)
    assert merge(axes) == (Axis(3, 41, 20, 20), Axis(20, 2, 1, 1))


def test_offsets_beyond_31_bits_have_64_bit_arguments():
    problem = problem_of((4, 16, 8), 1, stride=(2**33, 2**28, 1))
    types = {a.name: a.type for a in plan("dfl_decode", problem, "triton").arguments}
    assert "i64" in types.values()
    assert types["bin_stride"] == "i32"


def test_a_long_axis_walks_the_grids_first_axis(monkeypatch):
    """The second and third axes of a grid end at 65 535 programs."""
    problem = problem_of((70_000, 16, 100), 1, stride=(2000, 100, 1))
    assert plan("dfl_decode", problem, "triton").grid == (-(-70_000 // 128), 100, 1)
    plan.cache_clear()
    monkeypatch.setattr(arguments, "GRID_LIMIT", 10**9)
    assert plan("dfl_decode", problem, "triton").grid == (1, 70_000, 1)
    plan.cache_clear()


def test_nothing_is_launched_without_distributions():
    with pytest.raises(ValueError, match="no distributions"):
        plan("dfl_loss", problem_of((0, 16), 1), "triton")
    with pytest.raises(ValueError, match='"reference" has no launch plans'):
        plan("dfl_loss", problem_of((1, 16), 1), "reference")


def test_int64_offsets_in_the_interpreter():
    """Two rows 2³¹ + 16 elements apart, in virtual memory that is never touched in between."""
    pytest.importorskip("triton")
    import dflkern

    if torch.cuda.is_available():
        pytest.skip("runs in Triton's interpreter, and this process compiles for the GPU")
    gap = 2**31 + 16
    storage = torch.empty(gap + 16, dtype=torch.float16)
    rows = storage.as_strided((2, 16), (gap, 1))
    rows.copy_(torch.randn(2, 16).half())
    with dflkern.use_backend("triton"):
        decoded = dflkern.dfl_decode(rows)
    torch.testing.assert_close(decoded, dflkern.dfl_decode(rows.clone()), rtol=1e-6, atol=1e-6)


def test_a_first_launch_under_graph_capture_is_refused(monkeypatch):
    """Compiling would break the capture; after one warm-up call it is let through."""
    from dflkern.gpu import launch

    loading = pytest.importorskip("dflkern.gpu.triton.loading")
    made = plan("dfl_loss", problem_of((77, 16), 1, margin=0.015), "triton")
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(loading, "load", lambda plan: "loaded")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match="Run the call once before the capture"):
        launch.loaded(made, 0)
    capturing = False
    assert launch.loaded(made, 0) == "loaded"
    capturing = True
    assert launch.loaded(made, 0) == "loaded"


COMPILE = """
import json, re, sys
import torch
from dflkern.gpu import plan
from dflkern.gpu.offline import compile_plan
from dflkern.problem import describe

done = {}
arch = int(sys.argv[1])
every = arch == 90
cases = [(16, 1, d, p) for d in ("float32", "bfloat16") for p in (False, every)]
cases += [(17, 1, "float32", False), (91, 1, "float16", False), (91, 0, "float16", every)]
cases += [(16, 0, d, False) for d in ("float32", "float16", "float64")]
cases += [(8, 0, "float16", every)]
for bins, dim, dtype, project in cases:
    shape = (5000, bins) if dim == 1 else (bins, 5000)
    stride = torch.empty(shape, device="meta").stride()
    problem = describe(
        shape, stride, getattr(torch, dtype), torch.device("cuda"), dim, margin=0.01,
        project=project,
    )
    alone = every and bins == 16 and dtype == "float32" and not project
    for op in ("dfl_loss_and_decode", *(["dfl_loss", "dfl_decode"] if alone else [])):
        for name in (op, op + "_backward"):
            made = plan(name, problem, "triton")
            ptx = compile_plan(made, arch).ptx
            done[f"{name} {bins} {dim} {dtype} {project}"] = [
                made.kernel, f".target sm_{arch}" in ptx, bool(re.search(r"\\b(atom|red)\\.", ptx)),
            ]
print(json.dumps(done))
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_offline(arch, tmp_path):
    """In a process without TRITON_INTERPRET, for a GPU that is not there; no kernel has atomics."""
    import json

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout.splitlines()[-1])
    kernels = {kernel for kernel, _, _ in done.values()}
    assert kernels == {
        f"{structure}_{way}_kernel"
        for structure, ways in {
            "columns": ("forward", "backward"), "rows_chunk": ("forward",),
            "rows_lazy": ("forward", "backward"), "rows_tile": ("forward", "backward"),
        }.items()
        for way in ways
    }  # fmt: skip
    assert all(right_target for _, right_target, _ in done.values())
    assert not any(atomics for _, _, atomics in done.values())


# Two values of each setting. A new one fails here until the plans know it
VALUES = {
    "margin": (0.01, 0.25),
    "reduction": ("sum", "none"),
    "box_format": ("xyxy", "cxcywh"),
    "iou": ("iou", "ciou"),
}


@pytest.mark.parametrize(
    ("op", "setting"),
    [(op, s.name) for op in ALL.values() if op.problem for s in op.settings],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_setting_is_ignored(op, setting):
    """The Triton kernels do all that an operator is asked for, so a setting changes their plan."""
    with torch.device("meta"):
        given = torch.empty(2, 4, 64)
        arguments = {
            "logits": torch.empty(2, 4, 16, 64), "dim": 2, "project": None, "positions": None,
            "target": given, "weight": torch.empty(2, 64) if "iou" in op.names else given,
            "normalizer": torch.empty(()), "foreground": None, "stride": None,
            **dict.fromkeys(op.upstream, given), "grad_loss": given, "grad_position": given,
        }  # fmt: skip
    defaults = {name: values[0] for name, values in VALUES.items()}
    launches = []
    for value in VALUES[setting]:
        settings = {**defaults, setting: value}
        if op.limits is not None and "triton" in op.limits(settings):
            return  # refused, not ignored
        problem = op.problem({**arguments, **settings})
        names = steps(op.name, settings["reduction"])
        launches.append([plan(name, problem, "triton") for name in names])
    assert launches[0] != launches[1]
