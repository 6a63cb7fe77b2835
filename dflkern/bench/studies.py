"""Small tables of dflkern alone: what a call costs, what the dtype does, what threads bring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch

import dflkern

from ..cpu import library as cpu_library
from ..operators import modes
from ..operators.run import bind
from .cases import DTYPES, MARGIN, Case, make_inputs, named
from .contenders import own
from .timing import Context, Effort, Time, Work, measure, passes

CALL_CASE = "loss-rows-64x4x16-fp32"
DECODE_CASE = "decode-columns-16x64x8400-fp32"
LOSS_CASE = "loss-rows-64000x4x16-fp32"
# What a study times, and of which pass
COMPARED = {DECODE_CASE: "forward", LOSS_CASE: "both"}
CASES_OF = {"calls": (CALL_CASE,), "dtypes": tuple(COMPARED), "threads": tuple(COMPARED)}

VALIDATION = "validation"
FORWARD, BACKWARD = "C++ operator", "C++ operator, backward"
ONE = ", 1 distribution"
NO_GRAD, GRAD, BOTH = "call, no grad", "call, with grad", "call and backward"
REGISTERED = "registered operator: "
COMPILED = "torch.compile: "


def run(name: str, effort: Effort, device: str, backend: str, compiled: bool) -> Any:
    """One study by name, as JSON holds it."""
    if name == "calls":
        return _calls(effort, device, backend, compiled)
    return {"dtypes": _dtypes, "threads": _threads}[name](effort, device)


def variants(name: str) -> list[Case]:
    """The cases that a study times, whose gates must be green."""
    dtypes = tuple(DTYPES) if name == "dtypes" else ("fp32",)
    return [replace(named(case), dtype=dtype) for case in CASES_OF[name] for dtype in dtypes]


def _dtypes(effort: Effort, device: str) -> Any:
    """Seconds by case and dtype, all dtypes in the same rounds."""
    found = {}
    for name, direction in COMPARED.items():
        works = [replace(_own_work(replace(named(name), dtype=d), direction, device), label=d)
                 for d in DTYPES]  # fmt: skip
        found[name] = {"pass": direction, "times": measure(works, effort, device)}
    return found


def _threads(effort: Effort, device: str) -> Any:
    """Seconds by case and number of threads, all numbers in the same rounds."""
    if torch.device(device).type != "cpu":
        return {}
    most = torch.get_num_threads()
    counts = sorted({1, most} | {2**i for i in range(1, 16) if 2**i < most})
    found = {}
    for name, direction in COMPARED.items():
        work = _own_work(named(name), direction, device)
        works = [
            replace(work, label=str(count), context=_with_threads(count, work)) for count in counts
        ]
        found[name] = {"pass": direction, "times": measure(works, effort, device)}
    return found


def _own_work(case: Case, direction: str, device: str) -> Work:
    inputs = make_inputs(case, device)
    return passes(own(case, inputs)[0], inputs.leaf)[direction]


def _with_threads(count: int, work: Work) -> Context:
    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            with work.context():
                work.call()  # the new team of threads starts here, untimed
                yield
        finally:
            torch.set_num_threads(before)

    return context


def _calls(effort: Effort, device: str, backend: str, compiled: bool) -> Any:
    """What a call of dfl_loss on 256 distributions costs, step by step."""
    case = named(CALL_CASE)
    inputs = make_inputs(case, device)
    logits, target = inputs.leaf, cast(torch.Tensor, inputs.target)
    upstream = torch.randn(logits.shape[:-1], device=device)
    leaf = logits.clone().requires_grad_()

    def call(z: torch.Tensor) -> torch.Tensor:
        return dflkern.dfl_loss(z, target, margin=MARGIN)

    def ways(prefix: str, call: Callable[..., Any], context: Context) -> list[Work]:
        def no_grad() -> contextlib.ExitStack:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(context())
                return stack.pop_all()

        return [
            Work(prefix + NO_GRAD, lambda: call(logits), context=no_grad),
            Work(prefix + GRAD, lambda: call(leaf), context=context),
            Work(
                prefix + BOTH,
                lambda: torch.autograd.grad(call(leaf), leaf, upstream),
                context=context,
            ),
        ]

    works = [Work(VALIDATION, lambda: bind(dflkern.dfl_loss, logits, target, margin=MARGIN))]
    works += ways("", call, contextlib.nullcontext)
    if device == "cpu" and backend in ("auto", "cpu") and cpu_library.load():
        forward = torch.ops.dflkern._cpu_dfl_loss.default
        backward = torch.ops.dflkern._cpu_dfl_loss_backward.default
        for label, end in (("", len(logits)), (ONE, 1)):
            z, t, g = logits[:end], target[:end], upstream[:end]
            if end == 1:
                z, t, g = (x[:, :1].contiguous() for x in (z, t, g))
            works += _operator_works(label, forward, backward, z, t, g)
        works += ways(REGISTERED, call, _registered)
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(call, fullgraph=True, dynamic=False)
        works += ways(COMPILED, fast, contextlib.nullcontext)
    times = measure(works, effort, "cpu")  # the host's time, whatever the device
    return {"case": case.name, "times": times, "split": split(times)}


def _operator_works(
    label: str, forward: Any, backward: Any, z: Any, t: Any, g: Any
) -> tuple[Work, Work]:
    given = (z, t, None, None, None, z.ndim - 1, MARGIN, "none")
    return (
        Work(FORWARD + label, lambda: forward(*given), context=torch.no_grad),
        Work(BACKWARD + label, lambda: backward(g, *given), context=torch.no_grad),
    )


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """The registered operators in place of the fast path."""
    before = modes.FAST_PATH
    modes.FAST_PATH = False
    try:
        yield
    finally:
        modes.FAST_PATH = before


def split(times: dict[str, Time]) -> list[dict[str, Any]]:
    """The parts of a call and its backward, in seconds, by differences of the measured times."""
    t = {label: time["minimum"] for label, time in times.items()}
    if FORWARD not in t:
        return []
    rows = (
        ("validation", "the checks alone", t[VALIDATION]),
        ("dispatcher", "the C++ operator on 1 distribution", t[FORWARD + ONE]),
        ("kernel", "what 256 distributions add to that", t[FORWARD] - t[FORWARD + ONE]),
        ("Python", "the rest of a call without grad", t[NO_GRAD] - t[VALIDATION] - t[FORWARD]),
        ("autograd, forward", "what grad adds to a call", t[GRAD] - t[NO_GRAD]),
        ("dispatcher, backward", "the C++ operator on 1 distribution", t[BACKWARD + ONE]),
        (
            "kernel, backward",
            "what 256 distributions add to that",
            t[BACKWARD] - t[BACKWARD + ONE],
        ),
        ("autograd, backward", "the rest of the backward", t[BOTH] - t[GRAD] - t[BACKWARD]),
        ("together", "a call and its backward", t[BOTH]),
    )
    return [{"part": part, "is": text, "seconds": seconds} for part, text, seconds in rows]
