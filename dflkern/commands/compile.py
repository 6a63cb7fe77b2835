"""`python -m dflkern compile`: compile every GPU kernel for GPUs that are not there."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..gpu import plan, steps
from ..gpu.launch_plan import ELEMENT
from ..gpu.offline import compile_plan, facts
from ..operators.table import ALL
from ..problem import Problem

# The launches by name, and the operators that they belong to; box_loss has two
OPS = {step: op for op in ALL.values() if op.problem for step in steps(op.name)}
DTYPES = {name: dtype for dtype, name in ELEMENT.items()}
BINS = (8, 16, 17, 33, 91)  # 91: a general number of bins, too many for a lane's registers
LAYOUTS = ("rows", "columns", "strided")
BATCH, ANCHORS = 64, 4096
AMD = ("gfx942", "gfx1100")


@dataclass(frozen=True)
class Variant:
    """One kernel: a launch of an operator on a million distributions, boxes with all options.

    The layouts: rows, of one contiguous range; columns, with neighbouring distributions
    contiguous; strided, every other element of longer rows.
    """

    op: str
    backend: str
    arch: int | str
    dtype: str
    bins: int
    layout: str
    project: bool

    @property
    def name(self) -> str:
        """The stem of its files."""
        parts = [self.op, self.backend, self.dtype, f"k{self.bins}", self.layout]
        arch = f"sm{self.arch}" if isinstance(self.arch, int) else self.arch
        return "-".join([*parts, *["project"] * self.project, arch])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Architectures, where to, and which part."""
    parser.add_argument(
        "--arch",
        default="80,90,100",
        help="compute capabilities and AMD targets, as in 80,90,gfx942 (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    for name, choices in (
        ("op", tuple(OPS)), ("dtype", tuple(DTYPES)), ("backend", ("triton", "cuda")),
        ("layout", LAYOUTS),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", action="append", choices=choices, help="only this; may be repeated"
        )
    parser.add_argument("--bins", type=int, action="append", help="only this many bins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")


def main(arguments: argparse.Namespace) -> int:
    """Compile in processes of their own, and write the manifest."""
    began = time.perf_counter()
    try:
        archs = [parse_arch(word) for word in arguments.arch.split(",")]
    except ValueError as error:
        print(f"dflkern compile: {error}", file=sys.stderr)
        return 2
    wanted = list(variants(arguments, archs))
    arguments.out.mkdir(parents=True, exist_ok=True)
    kernels, failures = [], []
    with _workers(arguments.jobs) as pool:
        with _interrupts_held():
            jobs = {pool.submit(compile_variant, each, arguments.out): each for each in wanted}
        for done, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
            name = jobs[job].name
            try:
                kernels.append(job.result())
            except Exception as error:  # a compiler's, of any kind: the others go on
                failures.append(name)
                print(f"{done}/{len(wanted)} {name}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{done}/{len(wanted)} {name}", flush=True)
    kernels.sort(key=lambda kernel: str(kernel["name"]))
    path = arguments.out / "manifest.json"
    path.write_text(json.dumps({"kernels": kernels}, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - began
    print(f"{len(kernels)} kernels in {seconds:.0f} s, {len(failures)} failed; wrote {path}")
    return 1 if failures or not kernels else 0


def parse_arch(word: str) -> int | str:
    """80 for "80", the name for an AMD target.

    Raises:
        ValueError: for anything else.
    """
    if word.isdecimal():
        return int(word)
    if word.startswith("gfx"):
        return word
    raise ValueError(f'"{word}" is no architecture: give a number such as 90, or a gfx target.')


def variants(arguments: argparse.Namespace, archs: list[int | str]) -> Iterator[Variant]:
    """Every kernel that was asked for; those of CUDA C++ where NVRTC is."""
    backends = arguments.backend or ["triton", *(["cuda"] if torch.version.cuda else [])]
    for op, backend, arch, dtype, bins, layout, project in itertools.product(
        arguments.op or OPS,
        backends,
        archs,
        arguments.dtype or DTYPES,
        arguments.bins or BINS,
        arguments.layout or LAYOUTS,
        (False, True),
    ):
        if isinstance(arch, int) or backend == "triton":
            yield Variant(op, backend, arch, dtype, bins, layout, project)


def compile_variant(variant: Variant, out: Path) -> dict[str, Any]:
    """Write one kernel's files; its entry in the manifest."""
    launch = plan(variant.op, _problem(variant), variant.backend)
    compiled = compile_plan(launch, variant.arch)
    entry = {**asdict(variant), "name": variant.name, "kernel": compiled.entry}
    entry["shared"] = compiled.shared
    files = {"ptx": compiled.ptx.encode(), "cubin": compiled.cubin, "hsaco": compiled.hsaco}
    for kind, content in files.items():
        if content:
            entry[kind] = f"{variant.name}.{kind}"
            (out / entry[kind]).write_bytes(content)
    if compiled.cubin:
        found = facts.facts(compiled.cubin, compiled.entry)
        entry |= {
            "registers": found.registers,
            "spills": found.spills,
            "stack": found.stack,
            "sass_instructions": found.instructions,
            "widest_load": found.widest_load,
        }
    return entry


def _problem(variant: Variant) -> Problem:
    shape, dim = (BATCH, ANCHORS, 4, variant.bins), 3
    if variant.layout == "columns":
        shape, dim = (BATCH, 4, variant.bins, ANCHORS), 2
    with torch.device("meta"):
        logits = torch.empty(shape, dtype=DTYPES[variant.dtype])
        if variant.layout == "strided":
            logits = torch.empty((*shape[:3], 2 * shape[3]), dtype=logits.dtype)[..., ::2]
        given = torch.empty(BATCH, ANCHORS)
    op = OPS[variant.op]
    assert op.problem is not None
    project = given if variant.project else None
    arguments = {"logits": logits, "dim": dim, "project": project, "margin": 0.01}
    if not op.rows:  # boxes
        arguments |= {"stride": given, "foreground": given, "weight": given}
    problem = op.problem(arguments)
    return replace(problem, device=torch.device("cuda"))


@contextlib.contextmanager
def _workers(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that end at once when the block ends with an exception, such as Ctrl-C."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, _prepare) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started in the block never see Ctrl-C, which this process answers for them."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _prepare() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # it stops Triton from compiling
