"""The tables, for rich to print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..commands.console import open_console
from .box_steps import TENSOR_BYTES, ULTRALYTICS
from .cases import BYTE_MODEL, PASSES
from .contenders import COMPILED, OURS
from .counts import KERNELS, SAVED
from .results import eager_peer

DEFINITIONS = {
    "match": "results and gradient against float64: their error is at most that of PyTorch in the "
    "same dtype, plus a small multiple of epsilon; no time is taken of a case that fails",
    "passes": "forward without grad; backward alone, of a random upstream gradient; both together",
    "time": "the minimum over interleaved rounds, in each of which everything in a case is sampled "
    "once in a random order; on CUDA triton.testing.do_bench",
    "spread": "interquartile range of the rounds over their median",
    "gb_per_s": f"bytes over time, in 1e9 per second; bytes: {BYTE_MODEL}",
    "share_of_copy": "the time of a copy that reads and writes as many bytes, in the same rounds, "
    "over the time",
    "half_copy_of_logits": "half the time of copying the logits, over the time",
    "kernels": KERNELS,
    "saved": SAVED,
    "tensor_bytes": TENSOR_BYTES,
    "ratios": "the peer's time over dflkern's, for equal work: Ultralytics' DFLoss ends in a mean "
    "over the four sides, so it is held against dflkern with that mean",
    "default_allocator": "ratios of a process with glibc's own settings, where large temporaries "
    "are mapped afresh at each call; all others under MALLOC_MMAP_THRESHOLD_=4294967296 "
    "MALLOC_TRIM_THRESHOLD_=8589934592, for both sides",
}
WIDE = 0.5
OPS = {"decode": "dfl_decode", "loss": "dfl_loss", "loss_and_decode": "dfl_loss_and_decode"}


def show(results: dict[str, Any]) -> None:
    """Print everything."""
    console = open_console(140)
    machine, versions = results["machine"], results["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['capability']}"
    console.print(
        f"{where}, {machine['threads']} threads of {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        highlight=False,
        markup=False,
    )
    words = Table.grid(padding=(0, 1))
    for name, text in results["definitions"].items():
        words.add_row(name, text, style="dim")
    console.print(words)
    for op in OPS:
        cases = {name: case for name, case in results["cases"].items() if case["op"] == op}
        if cases:
            console.print(_absolute(op, cases))
            if any(case["match"] for case in cases.values()):
                console.print(_relative(op, cases))
    for name, study in results["studies"].items():
        for table in _study(name, study):
            console.print(table)
    console.print(_goals(results["goals"]))
    busy = spreads(results)
    if busy:
        console.print(busy, style="yellow", highlight=False)
    for name, found in _faults(results):
        console.print(f"{name}: {found}", style="red", highlight=False, markup=False)


def spreads(results: dict[str, Any]) -> str | None:
    """A warning if other processes took the cores while dflkern was timed."""
    found = [row["times"][OURS]["spread"] for *_, row in _rows(results["cases"])]
    wide = sum(spread > WIDE for spread in found)
    if not wide:
        return None
    return (
        f"{wide} of {len(found)} times of dflkern have a spread above {WIDE:.0%}: other processes "
        "took the cores meanwhile, and ratios mean little. Measure again on an idle machine."
    )


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    if value < 1e-4:
        return f"{value * 1e6:.1f} µs"
    return f"{value * 1e6:.0f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def size(value: int) -> str:
    """Bytes with a fitting unit."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


def _table(title: str, *columns: str, left: int = 2, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _rows(cases: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    for name, case in cases.items():
        for direction in PASSES:
            if case["match"]:
                yield (
                    name if direction == "forward" else "",
                    direction,
                    case,
                    case["passes"][direction],
                )


def _absolute(op: str, cases: dict[str, Any]) -> Table:
    graph = any("ratios_in_graph" in row for *_, row in _rows(cases))
    columns = ["case", "pass", "match", "backend", "time", "spread", "GB/s", "of copy", "kernels",
               "saved"]  # fmt: skip
    table = _table(f"dflkern.{OPS[op]}", *columns, *(["in graph"] if graph else []))
    for name, case in cases.items():
        if not case["match"]:
            table.add_row(name, "", "[bold red]NO[/bold red]", case["backend"])
            continue
        for first, direction, _, row in _rows({name: case}):
            time = row["times"][OURS]
            table.add_row(
                first,
                direction,
                "yes",
                case["backend"],
                seconds(time["minimum"]),
                f"{time['spread']:.0%}",
                f"{row['gb_per_s']:.1f}",
                f"{row['share_of_copy']:.2f}",
                str(row["kernels"][OURS]),
                "" if direction == "forward" else size(case["saved"][OURS]),
                *([seconds(time["graph"]) if "graph" in time else ""] if graph else []),
            )
    return table


def _relative(op: str, cases: dict[str, Any]) -> Table:
    peers = list(dict.fromkeys(p for *_, row in _rows(cases) for p in row["ratios"]))
    eager = [peer for peer in peers if not peer.endswith(COMPILED)]
    compiled = len(peers) > len(eager)
    default = any("ratios_default_allocator" in row for *_, row in _rows(cases))
    table = _table(
        f"dflkern.{OPS[op]}: times as fast as eager{' | torch.compile of it' * compiled}",
        "case",
        "pass",
        *eager,
        *(["default allocator"] if default else []),
        caption="default allocator: against Ultralytics, else the first eager column"
        if default
        else None,
    )
    for first, direction, _, row in _rows(cases):
        ratios = row["ratios"]
        cells = [
            f"{_ratio(ratios.get(peer))} | {_ratio(ratios.get(peer + COMPILED))}"
            if compiled
            else _ratio(ratios.get(peer))
            for peer in eager
        ]
        if default:
            named = eager_peer(row)
            ratio = row.get("ratios_default_allocator", {}).get(named)
            cells.append(_ratio(ratio))
        table.add_row(first, direction, *cells)
    return table


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.2f}" if value < 2 else f"{value:.1f}"
    return f"[red]{text}[/red]" if value < 1 else text


def _study(name: str, study: dict[str, Any]) -> Iterator[Table]:
    data = study.get("data")
    if not data:
        return
    if name == "calls":
        title = f"What a call costs: {data['case']}"
        table = _table(title, "call", "time", "spread", left=1)
        for label, time in data["times"].items():
            table.add_row(label, seconds(time["minimum"]), f"{time['spread']:.0%}")
        yield table
        if data["split"]:
            table = _table("The same, split by differences", "part", "is", "time")
            for row in data["split"]:
                table.add_row(row["part"], row["is"], f"{row['seconds'] * 1e6:.1f} µs")
            yield table
        return
    if name in ("boxes", "ultralytics"):
        yield _steps(name, data)
        return
    first = "fp32" if name == "dtypes" else "1"
    table = _table(f"{name}, in the same rounds", "case", "pass", name, "time", f"{first} / it")
    for case, found in data.items():
        base = found["times"][first]["minimum"]
        for label, time in found["times"].items():
            least = time["minimum"]
            table.add_row(case, found["pass"], label, seconds(least), f"{base / least:.2f}")
    yield table


def _steps(name: str, data: dict[str, Any]) -> Table:
    title = {
        "boxes": "The box path of a step: decode of all anchors, IoU and DFL, backward",
        "ultralytics": "The loss of an Ultralytics step and its backward: patched against not",
    }[name]
    table = _table(title, "step", "side", "time", "spread", "kernels", "tensor bytes", "saved",
                   "times as fast")  # fmt: skip
    for step, found in data.items():
        for label, time in found["times"].items():
            ours = label == OURS
            table.add_row(
                step if ours else "",
                label,
                seconds(time["minimum"]),
                f"{time['spread']:.0%}",
                str(found["kernels"][label]),
                size(found["tensor_bytes"][label]),
                size(found["saved"][label]),
                _ratio(found.get("ratio")) if ours else "",
            )
        for reason in found["refused"]:
            table.add_row("", f"{ULTRALYTICS}: {reason}")
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = _table(
        "Goals", "work", "against", "asked", "measured", "met", "default allocator",
        "fastest of its kind",
    )  # fmt: skip
    for goal in goals:
        unit, fastest = goal["unit"], goal.get("fastest_of_its_kind")
        other = goal.get("default_allocator")
        met = {None: "", True: "[green]yes[/green]", False: "[bold red]NO[/bold red]"}[goal["met"]]
        table.add_row(
            goal["work"],
            goal["against"],
            f"{'≤ ' if goal.get('at_most') else ''}{goal['asked']:g}{unit}",
            "not measured" if goal["measured"] is None else f"{goal['measured']:.2f}{unit}",
            met,
            "" if other is None else f"{other:.1f}{unit}",
            f"{fastest['ratio']:.2f}× {escape(fastest['peer'])}" if fastest else "",
        )
    return table


def _faults(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, entry in [*results["cases"].items(), *results["studies"].items()]:
        for fault in entry["faults"]:
            yield name, fault
        for peer, faults in entry.get("peer_faults", {}).items():
            yield name, f"not compared with {peer}: {'; '.join(faults)}"
