"""Compiled GPU kernels, run in the PTX emulator and compared with the reference.

A `Case` names a launch. `run_case` plans and compiles it as the library does, runs the PTX, and
returns an `Outcome`. Cases are independent, so they run in processes of their own (`Workers`),
which compile for GPUs: TRITON_INTERPRET, which the test session sets, stops Triton from doing so.
"""

import concurrent.futures
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dflkern.gpu import plan
from dflkern.gpu.cuda import nvrtc
from dflkern.gpu.offline import compile_plan, facts
from dflkern.library import BuildError
from dflkern.operators.table import ALL
from dflkern.problem import compute_dtype, describe
from ptxemu import Buffer, PtxError, run
from support import budget_faults, positions_for

HELD = 4096  # distributions of a large problem that are run
FAR = (1 << 27) + 5  # distributions whose logits, K ≥ 16, reach beyond 2³¹ elements
MARGIN = 0.01
NAMES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        op: "dfl_loss", "dfl_decode_backward", …
        backend: "triton" or "cuda".
        arch: 80 for sm_80 and so on.
        dtype: a name of NAMES.
        bins: how many.
        layout: a name of `logits_of`.
        count: distributions; at least, where the layout's other axes do not divide it.
        project: with non-uniform positions.
        special: with NaN, infinities and huge numbers among the data.
        part: "first" or "last" runs only those blocks of the launch, in buffers that hold only
            their part of memory, and "" all of it.
    """

    op: str
    backend: str = "triton"
    arch: int = 80
    dtype: str = "fp32"
    bins: int = 16
    layout: str = "rows"
    count: int = 261
    project: bool = False
    special: bool = False
    part: str = ""

    def __str__(self):
        marks = [self.part] * bool(self.part) + ["project"] * self.project
        marks += ["special"] * self.special
        words = (self.backend, f"sm_{self.arch}", self.op, self.dtype, f"K{self.bins}", self.layout)
        return "-".join([*words, str(self.count), *marks])


@dataclass(frozen=True)
class Outcome:
    """What a case came to: `faults` is empty if all is well.

    `distributions` is how many results were written, `counts` what the PTX cost (None if the run
    broke off), and `facts`, for a first part, what the machine code says. `later` has counts and
    facts of the launches after the first.
    """

    kernel: str
    faults: tuple
    distributions: int = 0
    counts: object = None
    facts: object = None
    later: tuple = ()


def logits_of(layout, count, bins, dtype):
    """Random logits with about `count` distributions, and the axis of their bins."""

    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * 3).to(dtype)

    if layout == "rows":
        return random(count, bins), 1
    if layout == "columns":
        return random(2, bins, -(-count // 2)), 1
    if layout == "offset":
        return random(count * bins + 1)[1:].view(count, bins), 1
    if layout == "padded":
        return random(count, bins + 3)[:, 1 : 1 + bins], 1
    if layout == "strided":
        return random(count, 2 * bins)[:, ::2], 1
    if layout == "slice":  # box channels between others, anchors out of a longer axis
        anchors = -(-count // 8)
        head = random(2, 4 * bins + 5, anchors + 7)[:, 2 : 2 + 4 * bins]
        return head.view(2, 4, bins, anchors + 7)[..., :anchors], 2
    if layout == "permuted":
        return random(3, 4, bins, -(-count // 12)).permute(2, 3, 1, 0), 0
    raise ValueError(layout)


LAYOUTS = ("rows", "columns", "offset", "padded", "strided", "slice", "permuted")


def run_case(case):
    """Plan, compile, run, compare."""
    torch.manual_seed(0)
    dtype = NAMES[case.dtype]
    if case.part:
        problem, logits, dim, ahead = _part(case, dtype)
    else:
        logits, dim = logits_of(case.layout, case.count, case.bins, dtype)
        problem = describe(
            tuple(logits.shape), logits.stride(), dtype, torch.device("cuda"), dim,
            aligned=logits.storage_offset() * dtype.itemsize % 16 == 0,
            margin=MARGIN, project=case.project,
        )  # fmt: skip
        ahead = 0
    inputs = inputs_for(case, logits, dim)
    launch = plan(case.op, problem, case.backend)
    compiled = compile_plan(launch, case.arch)
    blocks = range(int(np.prod(launch.grid)))
    if case.part:
        some = max(1, len(blocks) * HELD // problem.count - (case.part == "last"))
        blocks = blocks[:some] if case.part == "first" else blocks[-some:]
    outputs = outputs_for(case, logits, dim)
    try:
        machine, buffers = emulate(launch, compiled, blocks, inputs, outputs, ahead)
        _, again = emulate(launch, compiled, blocks[::-1], inputs, outputs, ahead)
    except PtxError as error:
        return Outcome(launch.kernel, (str(error),))
    found = []
    for role in outputs:
        buffer = buffers[role]
        if buffer.unwritten and not case.part:
            found.append(f"{role}: {buffer.unwritten} elements unwritten")
        if buffer.written_twice:
            found.append(f"{role}: {buffer.written_twice} elements written twice")
        if not np.array_equal(buffer.bytes, again[role].bytes):
            found.append(f"{role}: other bits when blocks run in another order")
    results = {role: tensor_of(buffers[role], empty) for role, empty in outputs.items()}
    written = {role: mask_of(buffers[role], empty) for role, empty in outputs.items()}
    found += differences(case.op, results, written, inputs, dim)
    distributions = int(next(iter(written.values())).sum())
    if "grad_logits" in outputs:
        distributions //= case.bins
    code = facts.facts(compiled.cubin, compiled.entry) if case.part == "first" else None
    return Outcome(launch.kernel, tuple(found), distributions, machine.counts(), code)


def _part(case, dtype):
    """The problem, the logits that are held of it, and how many distributions lie before them."""
    bins = case.bins
    if case.layout == "columns":
        outer = -(-case.count // HELD)
        shape, held = (outer, bins, HELD), (1, bins, HELD)
        before = (outer - 1) * HELD
    else:
        shape, held = (case.count, bins), (HELD, bins)
        before = case.count - HELD
    offset = int(case.layout == "offset")
    storage = (torch.randn(offset + math.prod(held), dtype=torch.float64) * 3).to(dtype)
    problem = describe(
        shape, torch.empty(shape, device="meta").stride(), dtype, torch.device("cuda"), 1,
        aligned=not offset, margin=MARGIN, project=case.project,
    )  # fmt: skip
    return problem, storage[offset:].view(held), 1, before if case.part == "last" else 0


def inputs_for(case, logits, dim):
    """Logits, targets, positions and upstream gradients by role."""
    shape = [size for axis, size in enumerate(logits.shape) if axis != dim]
    wide = compute_dtype(logits.dtype)
    positions = torch.tensor(positions_for(case.bins), dtype=wide) if case.project else None
    low, high = (-1, case.bins) if positions is None else (positions[0] - 1, positions[-1] + 1)
    target = (torch.rand(shape, dtype=torch.float64) * (high - low) + low).to(wide)
    if case.special:
        _make_special(logits.movedim(dim, -1), target)
    return {
        "logits": logits,
        "target": target,
        "project": positions,
        "grad_loss": torch.randn(shape, dtype=wide),
        "grad_position": torch.randn(shape, dtype=wide),
    }


def _make_special(rows, target):
    """What a kernel must answer with NaN, inf or the right number, in the first distributions."""
    flat = [tuple(place) for place in np.ndindex(*target.shape)][:9]
    nan, inf = float("nan"), float("inf")
    rows[flat[0]][2] = nan
    rows[flat[1]][3] = inf
    rows[flat[2]][:] = -inf
    rows[flat[3]][4:], target[flat[3]] = -inf, 0.5  # outside of the target's pair
    rows[flat[4]][0], target[flat[4]] = -inf, 0.5  # inside of it
    rows[flat[5]].mul_(5000)
    target[flat[6]], target[flat[7]], target[flat[8]] = nan, inf, -inf


def outputs_for(case, logits, dim):
    """Empty results by role."""
    if ALL[case.op].is_gradient:
        return {"grad_logits": torch.empty_like(logits)}
    shape = [size for axis, size in enumerate(logits.shape) if axis != dim]
    empty = torch.empty(shape, dtype=compute_dtype(logits.dtype))
    return dict.fromkeys(ALL[case.op].results, empty)


def emulate(launch, compiled, blocks, inputs, outputs, ahead=0):
    """Run blocks of a launch; the machine, and the buffers by role.

    `ahead` is how many distributions lie before those held.
    """
    buffers, arguments = {}, []
    for argument in launch.arguments:
        role = argument.value
        if isinstance(role, str):
            tensor = inputs.get(role, outputs.get(role))
            scale = 0 if role == "project" else tensor.numel() // inputs["target"].numel()
            buffers[role] = buffer_of(tensor, role, role not in outputs, ahead * scale)
            arguments.append(buffers[role])
        else:
            arguments.append(0 if role is None else role)
    shared = compiled.shared if launch.shared is None else launch.shared
    return (
        run(compiled.ptx, compiled.entry, launch.grid, launch.block, arguments, shared, blocks),
        buffers,
    )


def buffer_of(tensor, name, defined, ahead):
    """A tensor's storage from its first element on; what is not of the tensor is undefined."""
    offset = tensor.storage_offset()
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())[offset:]
    mask = np.zeros(len(storage), bool)
    mask[_places(tensor)] = defined
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = storage.view(integers[tensor.itemsize])
    skip = offset * tensor.itemsize
    return Buffer(bits.numpy(), mask, skip=skip, at=ahead, name=name)


def _places(tensor):
    """Where each element of a tensor lies in its storage, from the first element on."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.arange(last + 1).as_strided(tensor.shape, tensor.stride()).numpy()


def tensor_of(buffer, like):
    """What a buffer holds, in the dtype and shape of a tensor."""
    values = torch.from_numpy(buffer.array()).view(like.dtype)
    return values[torch.from_numpy(_places(like))]


def mask_of(buffer, like):
    """Which elements of such a tensor a buffer defines."""
    held = buffer.defined[buffer.first : buffer.end].reshape(-1, like.itemsize).all(1)
    return torch.from_numpy(held)[torch.from_numpy(_places(like))]


def differences(op, results, written, inputs, dim):
    """Where results are further from float64 than PyTorch in the same dtype, by the budget."""
    peers, exact = (expected(op, inputs, dim, double) for double in (False, True))
    faults = []
    for role, result in results.items():
        at = written[role]
        if not at.any():
            faults.append(f"{role}: nothing written")
        found = budget_faults(result[at], peers[role][at], exact[role][at])
        faults += [f"{role}: {fault}" for fault in found]
    return faults


def expected(op, inputs, dim, double):
    """The reference's results by role, in float64 or in the inputs' dtypes."""
    values = {
        role: value.double() if double and value is not None else value
        for role, value in inputs.items()
    }
    made = ALL[op].evaluate({**ALL[op].defaults, **values, "dim": dim, "margin": MARGIN})
    return dict(zip(ALL[op].results, made if isinstance(made, tuple) else (made,), strict=True))


def compiles(backend):
    """Why cases of a backend cannot run here, None if they can."""
    problem = describe((8, 16), (16, 1), torch.float32, torch.device("cuda"), 1)
    try:
        plan("dfl_loss", problem, backend)
    except ValueError as error:
        return str(error)
    if backend == "cuda":
        try:
            nvrtc.version()
        except BuildError as error:
            return str(error)
    return None


class Workers:
    """Runs cases in two processes; `outcome` waits for one."""

    def __init__(self, cases):
        self.pool = concurrent.futures.ProcessPoolExecutor(
            min(2, os.cpu_count()), multiprocessing.get_context("spawn"), _prepare
        )
        able = {backend: compiles(backend) is None for backend in {case.backend for case in cases}}
        self.futures = {
            case: self.pool.submit(_run, case)
            for case in dict.fromkeys(cases)
            if able[case.backend]
        }

    def outcome(self, case):
        """What a case came to."""
        if case not in self.futures:
            pytest.skip(f"{case.backend}: {compiles(case.backend)}")
        return self.futures[case].result()

    def close(self):
        """End the processes, whatever is still to do."""
        self.pool.shutdown(cancel_futures=True)


def _run(case):
    if isinstance(case, Case):
        return run_case(case)
    from box_emulation import run_box_case

    return run_box_case(case)


def _prepare():
    assert "triton" not in sys.modules
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def variants(case, **choices):
    """The cases that differ from one in the given fields, each a list of values."""
    cases = [case]
    for name, values in choices.items():
        cases = [replace(each, **{name: value}) for each in cases for value in values]
    return cases
