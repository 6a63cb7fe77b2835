"""The bench: its gate, its byte model and counts, a small run of it, and the README's tables."""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dflkern
from dflkern import bench
from dflkern.bench import cases, command, contenders, counts, gate, goals, results, timing, worker
from dflkern.bench.cases import Case, make_inputs, named
from dflkern.cpu import library as cpu_library
from dflkern.operators import modes

ROOT = Path(__file__).parents[2]
TINY = "decode-rows-64x4x16-fp32"
TINY_LOSS = "loss-rows-64x4x16-fp32"
OPS = ("loss", "decode", "loss_and_decode")
SHAPES = {"rows": (40, 4, 16), "columns": (2, 64, 21)}


def parse(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


def request(*names, **changes):
    asked = {
        "cases": names, "studies": (), "device": "cpu", "backend": "auto", "threads": None,
        "rounds": 2, "least": 1e-5, "limit": 9.0, "compiled": False, "counted": True,
        "allocator": "",
    }  # fmt: skip
    return worker.Request(**{**asked, **changes})


@pytest.fixture
def in_process(monkeypatch):
    """Measure in the test's own process, where monkeypatches hold."""
    monkeypatch.setattr(command, "measure_apart", lambda asked, settings: worker.run(asked))


# --- the gate -----------------------------------------------------------------------------------


def wrong_gradient(function):
    """The results of dflkern's function with a gradient 1 % too large."""

    @functools.wraps(function)
    def wrapped(logits, *args, **kwargs):
        return function(logits * 1.01 - logits.detach() * 0.01, *args, **kwargs)

    return wrapped


def wrong_result(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs) + 1e-3

    return wrapped


@pytest.mark.parametrize("spoil", [wrong_gradient, wrong_result])
@pytest.mark.parametrize("op", ["dfl_loss", "dfl_decode"])
def test_a_wrong_kernel_is_not_timed(op, spoil, monkeypatch, in_process, tmp_path, capsys):
    monkeypatch.setattr(dflkern, op, spoil(getattr(dflkern, op)))
    monkeypatch.setattr(worker, "measure", lambda *_: pytest.fail("timed"))
    name = TINY if op == "dfl_decode" else TINY_LOSS
    arguments = parse("--quick", "--filter", f"^{name}$", "--out", tmp_path)
    assert bench.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "NO" in printed
    assert "error" in printed
    assert "µs" not in printed
    found = json.loads((tmp_path / "bench.json").read_text())["cases"][name]
    assert not found["match"]
    assert "passes" not in found


def test_a_wrong_kernel_is_in_no_study(monkeypatch):
    monkeypatch.setattr(dflkern, "dfl_loss", wrong_result(dflkern.dfl_loss))
    study = worker.run(request(studies=("calls",)))["studies"]["calls"]
    assert study["faults"]
    assert "data" not in study
    assert not results.green({"cases": {}, "studies": {"calls": study}})


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_contenders_compute_the_same(op, layout, dtype):
    case = Case(op, layout, SHAPES[layout], dtype, "call")
    inputs = make_inputs(case, "cpu")
    own = contenders.own(case, inputs)
    peers = contenders.peers(case, inputs, compiled=False)
    assert [fault for one in own for fault in gate.faults(case, inputs, one)] == []
    assert len(peers) >= (2 if op == "decode" else 3)
    for peer in peers:
        exact = gate.expected(case, inputs, mean=peer.mean, exact=True)
        values = gate.evaluate(peer.function, inputs.leaf)
        assert gate.peer_faults(values, exact, inputs.leaf.dtype) == [], peer.label


def test_a_peer_that_differs_or_fails_is_left_out(monkeypatch):
    def differs(z, along, dim):
        return z.mean(dim)

    def fails(z, weights, dim):
        raise ValueError("no such thing")

    monkeypatch.setattr(contenders, "weighted_sum", differs)
    monkeypatch.setattr(contenders, "matmul", fails)
    found = worker.run(request(TINY))["cases"][TINY]
    assert "error" in found["peer_faults"]["weighted sum"][0]
    assert found["peer_faults"]["matmul"] == ["ValueError: no such thing"]
    assert list(found["times"]["both"]) == ["dflkern", worker.COPY]


# --- bytes and counts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtype", "forward", "backward"),
    [
        ("loss", "fp32", 64 + 4 + 4, 64 + 4 + 4 + 64),
        ("loss", "bf16", 32 + 4 + 4, 32 + 4 + 4 + 32),
        ("decode", "fp32", 64 + 4, 64 + 4 + 64),
        ("decode", "fp16", 32 + 4, 32 + 4 + 32),
        ("loss_and_decode", "fp32", 64 + 4 + 8, 64 + 4 + 8 + 64),
    ],
)
def test_byte_model(op, dtype, forward, backward):
    for layout, count in (("rows", 160), ("columns", 168)):
        case = Case(op, layout, SHAPES[layout], dtype, "call")
        assert case.bins == 16
        assert case.count == count
        assert case.traffic("forward") == count * forward
        assert case.traffic("backward") == count * backward
        assert case.traffic("both") == count * (forward + backward)


def test_byte_model_of_the_largest_decode():
    assert named("decode-columns-16x64x8400-fp32").traffic("forward") == 16 * 4 * 8400 * 68


@pytest.mark.parametrize("way", ["eager", "registered"])
def test_kernels_and_saved_bytes(way, monkeypatch):
    if not cpu_library.load():
        pytest.skip(f"no CPU library: {cpu_library.describe()}")
    monkeypatch.setattr(modes, "FAST_PATH", way == "eager")
    case = named(TINY_LOSS)
    inputs = make_inputs(case, "cpu")
    own = contenders.own(case, inputs)[0]
    works = timing.passes(own, inputs.leaf)
    kernels = {name: counts.count_kernels(work, "cpu") for name, work in works.items()}
    assert kernels == {"forward": 1, "backward": 1, "both": 2}
    assert counts.saved_bytes(own.function, inputs.leaf) == 4 * 256  # the target


def test_kernels_and_saved_bytes_of_eager_pytorch():
    leaf = torch.randn(64, 4, 16)
    softmax = contenders.Contender("softmax", lambda z: z.softmax(-1))
    works = timing.passes(softmax, leaf)
    kernels = {name: counts.count_kernels(work, "cpu") for name, work in works.items()}
    assert kernels == {"forward": 1, "backward": 1, "both": 2}
    assert counts.saved_bytes(softmax.function, leaf) == leaf.nbytes  # the probabilities
    assert counts.saved_bytes(lambda z: z.view(256, 16).T, leaf) == 0
    assert counts.count_kernels(timing.Work("", lambda: leaf.view(256, 16).T[2:]), "cpu") == 0


# --- timing -------------------------------------------------------------------------------------


def test_summary():
    assert timing.summary([3.0, 1.0, 2.0, 4.0, 5.0]) == {
        "minimum": 1.0, "median": 3.0, "spread": 2 / 3,
    }  # fmt: skip
    assert timing.summary([2.0])["spread"] == 0


def test_times_are_those_of_the_calls_alone():
    works = [
        timing.Work("slow", lambda: time.sleep(0.004)),
        timing.Work("fast", lambda state: None, prepare=lambda: time.sleep(0.002)),
    ]
    times = timing.measure(works, timing.Effort(3, 1e-4), "cpu")
    assert 0.004 <= times["slow"]["minimum"] < 0.02
    assert times["fast"]["minimum"] < 0.001
    assert times["slow"]["calls"] == 1
    assert times["slow"]["rounds"] == 3


def test_a_limit_ends_the_rounds():
    work = timing.Work("slow", lambda: time.sleep(0.002))
    effort = timing.Effort(rounds=1000, least=1e-4, limit=0.01)
    assert 3 <= timing.measure([work], effort, "cpu")["slow"]["rounds"] <= 6


def test_cuda_times_are_tritons(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    calls = []

    def fake(milliseconds):
        def do_bench(call, return_mode):
            assert return_mode == "all"
            calls.append(call())
            return milliseconds

        return do_bench

    monkeypatch.setattr(testing, "do_bench", fake([3.0, 2.0, 4.0]))
    monkeypatch.setattr(testing, "do_bench_cudagraph", fake([1.0, 1.5]))
    works = [
        timing.Work("forward", lambda: "forward"),
        timing.Work("backward", lambda state: state, prepare=lambda: "state"),
    ]
    times = timing.measure(works, timing.Effort(30, 1e-3), "cuda")
    assert times["forward"]["minimum"] == 0.002
    assert times["forward"]["graph"] == 0.001
    assert "graph" not in times["backward"]
    assert calls == ["forward", "forward", "state"]


def test_ratios_are_of_equal_work():
    times = {
        label: {"minimum": value}
        for label, value in {"dflkern": 1.0, "dflkern, mean": 2.0, "a": 3.0, "b": 3.0}.items()
    }
    found = results._ratios(times, {"a": "dflkern", "b": "dflkern, mean"})
    assert found == {"a": 3.0, "b": 1.5}


def test_goals():
    row = {"ratios": {"Ultralytics DFL": 7.0, "matmul": 5.0}, "half_copy_of_logits": 0.4}
    found = goals.goals(
        {
            "cases": {goals.DECODE_CASE: {"passes": {"forward": row}}, "other": {"match": False}},
            "studies": {
                "threads": {
                    "data": {
                        goals.LOSS_CASE: {"times": {"1": {"minimum": 3.8}, "2": {"minimum": 2.0}}}
                    }
                }
            },
        }
    )
    met = [(g["work"], g["against"], g["measured"], g["met"]) for g in found]
    assert met[0] == ("decode (16, 64, 8400) fp32", "Ultralytics DFL", 7.0, True)
    assert found[0]["fastest_of_its_kind"] == {"peer": "matmul", "ratio": 5.0}
    assert met[1][2:] == (None, None)  # not compiled
    assert met[2][2:] == (0.4, False)
    threads = [goal for goal in met if goal[1] == "itself on one thread"]
    assert threads[-1][0] == "loss + backward, 64 000 × 4 fp32, 2 threads"
    assert threads[-1][2:] == (1.9, True)


# --- the command --------------------------------------------------------------------------------


def test_a_small_run(tmp_path, capfd):
    arguments = parse(
        "--quick", "--filter", f"^({TINY}|calls)$", "--rounds", 3, "--out", tmp_path,
        "--chart", tmp_path / "deep" / "chart.png", "--threads", 1,
    )  # fmt: skip
    assert bench.main(arguments) == 0
    printed = capfd.readouterr().out
    for word in ("dflkern.dfl_decode", "times as fast", "What a call costs", "Goals", "of copy"):
        assert word in printed
    assert (tmp_path / "deep" / "chart.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "bench.json").read_text()
    found = json.loads(text)
    assert str(ROOT) not in text
    assert {"machine", "versions", "commit", "date", "settings", "definitions", "cases", "studies",
            "goals", "seconds"} == set(found)  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["machine"]["threads"] == 1
    assert set(found["settings"]["allocator"]) == {
        "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    }  # fmt: skip
    case = found["cases"][TINY]
    assert case["match"]
    assert set(case["passes"]) == {"forward", "backward", "both"}
    for direction, row in case["passes"].items():
        assert row["bytes"] == named(TINY).traffic(direction)
        least = row["times"]["dflkern"]["minimum"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / least / 1e9)
        for peer in ("weighted sum", "matmul"):
            assert row["ratios"][peer] == row["times"][peer]["minimum"] / least
        assert row["times"]["dflkern"]["rounds"] == 3
    if cpu_library.load():
        parts = {row["part"] for row in found["studies"]["calls"]["data"]["split"]}
        assert {"validation", "dispatcher", "kernel", "autograd, backward"} <= parts


def test_the_default_allocator_is_a_second_process(monkeypatch, tmp_path, capsys):
    asked = []

    def measure_apart(request, settings):
        asked.append((request.allocator, settings, request.compiled))
        found = worker.run(request)
        for times in found["cases"][TINY]["times"].values():
            times["matmul"]["minimum"] = times["dflkern"]["minimum"] * len(asked)
        return found

    monkeypatch.setattr(command, "measure_apart", measure_apart)
    monkeypatch.setattr(worker.contenders.torch, "compile", lambda function, **_: function)
    arguments = parse("--filter", f"^{TINY}$", "--rounds", 2, "--out", tmp_path)
    assert bench.main(arguments) == 0
    assert [settings for _, settings, _ in asked] == [command.KEPT, {}]
    assert [compiled for *_, compiled in asked] == [True, False]
    row = json.loads((tmp_path / "bench.json").read_text())["cases"][TINY]["passes"]["both"]
    assert row["ratios"]["matmul"] == 1
    assert "matmul, compiled" in row["ratios"]
    assert row["ratios_default_allocator"]["matmul"] == 2
    assert "default allocator" in capsys.readouterr().out


def test_settings_reach_the_process(monkeypatch):
    seen = []

    def run(argv, env, **_):
        seen.append(env)
        Path(argv[-1]).write_text("{}")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    command.measure_apart(request(), command.KEPT)
    command.measure_apart(request(), {})
    assert command.KEPT.items() <= seen[0].items()
    assert not command.KEPT.keys() & seen[1].keys()


def test_what_cannot_run(monkeypatch, capsys, tmp_path):
    assert bench.main(parse("--filter", "nonsense")) == 2
    assert TINY in capsys.readouterr().err
    with pytest.raises(worker.CannotRunError, match="cuda"):
        worker.run(request(TINY, backend="cuda"))
    if not torch.cuda.is_available():
        with pytest.raises(worker.CannotRunError, match="no device 'cuda'"):
            worker.run(request(TINY, device="cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main(parse()) == 2
    assert 'pip install "dflkern[bench]"' in capsys.readouterr().err
    for wrong in (["--rounds", "0"], ["--filter", "("]):
        with pytest.raises(SystemExit):
            parse(*wrong)


def test_names_are_distinct_and_quick_is_a_part():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.regime for case in cases.CASES} == {"call", "middle", "bandwidth"}
    assert {case.regime for case in cases.select(None, True)[0]} == {"call", "middle", "bandwidth"}
    assert cases.select("^threads$", False) == ([], ["threads"])


# --- the README's tables ------------------------------------------------------------------------

DEMO = {
    "expectations": [
        {"name": "DFL loss", "expected": "falls | ends", "measured": "2 → 1", "met": True},
        {"name": "mAP@0.5", "expected": "above 0.5", "measured": "0.4", "met": False},
    ],
    "epochs": 5,
    "seconds": 170.4,
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "system": "Linux"},
    "versions": {"dflkern": "0.1", "torch": "2.14"},
}
CPU = {
    "goals": [
        {"work": "decode", "against": "Ultralytics DFL", "asked": 6.0, "unit": "×", "met": False,
         "measured": 5.5, "default_allocator": 12.34,
         "fastest_of_its_kind": {"peer": "matmul", "ratio": 4.0}},
        {"work": "loss", "against": "x", "asked": 0.5, "unit": "", "met": None, "measured": None},
    ],
    "settings": {"rounds": 30, "allocator": command.KEPT},
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "capability": "AVX2"},
    "versions": {"dflkern": "0.1", "torch": "2.14", "ultralytics": "8.4.190"},
    "commit": "abc", "date": "2026-01-01",
    "studies": {"calls": {"data": {"split": [{"part": "kernel", "seconds": 1.5e-6}]}}},
    "cases": {"a": {"passes": {"both": {"ratios": {"hat": 0.9, "matmul": 2.0}}}}, "red": {}},
}  # fmt: skip


def readme(*argv):
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_readme_tables(tmp_path):
    page = tmp_path / "README.md"
    empty = (
        "a\n<!-- begin demo -->\n<!-- end demo -->\nb\n<!-- begin cpu -->\n<!-- end cpu -->\nc\n"
    )
    page.write_text(empty)
    where = ("--readme", page, "--results", tmp_path)
    assert readme("--check", *where).returncode == 0  # nothing recorded, nothing to show
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    (tmp_path / "cpu.json").write_text(json.dumps(CPU))
    done = readme("--check", *where)
    assert done.returncode == 1
    assert "demo, cpu is not what the recorded results say" in done.stderr
    assert page.read_text() == empty

    assert readme(*where).returncode == 0
    assert readme("--check", *where).returncode == 0
    text = page.read_text()
    assert text.startswith("a\n<!-- begin demo -->\n| expectation | asked | measured | met |\n")
    assert "| DFL loss | falls \\| ends | 2 → 1 | yes |" in text
    assert "| mAP@0.5 | above 0.5 | 0.4 | **no** |" in text
    assert "After 5 epochs, on Some CPU, 2 threads of 2 cores, PyTorch 2.14" in text
    assert "| decode | Ultralytics DFL | 6× | **5.50×** | 12.3× | 4.00×, matmul |" in text
    assert "| loss | x | 0.5 | not measured |  |  |" in text
    assert "Slower than a peer, 1 of 2 ratios:" in text
    assert "| a | both | hat | 0.90× |" in text
    assert "kernel 1.5 µs" in text
    assert text.endswith("<!-- end cpu -->\nc\n")

    page.write_text(text.replace("5.50×", "6.50×"))
    done = readme("--check", *where)
    assert done.returncode == 1
    assert "markers cpu is not" in done.stderr


def test_readme_markers_must_be_there_and_known(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- begin gpu -->\n<!-- end gpu -->\n")
    done = readme("--check", "--readme", page, "--results", tmp_path)
    assert done.returncode == 1
    assert "no table is called gpu" in done.stderr
    page.write_text("nothing\n")
    (tmp_path / "cpu.json").write_text(json.dumps(CPU))
    done = readme("--check", "--readme", page, "--results", tmp_path)
    assert done.returncode == 1
    assert "<!-- begin cpu -->" in done.stderr
