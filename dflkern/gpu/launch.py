"""Running launch plans: which devices Triton can serve, preparation, and the launches.

What a launch needs beyond its tensors is kept as a `Ready`: by a key without sizes where the
distributions are one contiguous aligned range of memory, else by their strides. A compiled kernel
is kept by what it was compiled from, which has no sizes in it.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, compute_dtype, describe_besides
from .box_problem import BoxProblem
from .launch_plan import Argument, LaunchPlan, Start, steps
from .plans import plan
from .triton import kernel_of


class Ready(NamedTuple):
    """One launch of an operator, loaded on a device.

    Attributes:
        start: takes the tensors of these roles and then numbers.
        rows, scratch: of `LaunchPlan`. With rows, the grid and the only number follow from n.
        counts: whether the numbers are the programs of the launch before and n.
    """

    start: Start
    roles: tuple[str, ...]
    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    rows: tuple[int, int] | None
    scratch: tuple[str, int] | None
    counts: bool


def why_not(device: torch.device) -> tuple[str, ...]:
    """Why the Triton kernels cannot serve a device; empty if they can."""
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type == "cpu" and not interpreted():
        return (
            "the logits are on the CPU, where Triton runs only in its interpreter "
            "(TRITON_INTERPRET=1, set before the first use, for tests)",
        )
    return () if device.type == "cpu" else (f'there is no Triton for the device "{device.type}"',)


PROBE = LaunchPlan(
    "probe", "triton", "probe_kernel", (1, 1, 1), (32, 1, 1), (Argument("n", "i32", 1),),
    (("BLOCK", 32),),
)  # fmt: skip


@functools.cache
def _why_not_gpu(device: torch.device) -> tuple[str, ...]:
    """Why a GPU cannot run Triton kernels, as one that does nothing shows; it is warned of, once.

    Raises:
        RuntimeError: if a CUDA graph is being captured.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dflkern: no Triton kernel has run on this GPU yet, and none can be loaded while a "
                "CUDA graph is being captured. Run the call once before the capture."
            )
        index = torch.cuda.current_device()
        try:
            loaded(PROBE, index)(1, 1, 1, current_stream(index), 1)
        except Exception as error:  # of any kind: of Triton, a C compiler, the driver, a folder
            reason = f"{device} cannot run them: {_first_line(error)}"
            warnings.warn(
                f"dflkern: no Triton kernels: {reason}. Calls run on the next backend.",
                RuntimeWarning,
                stacklevel=3,
            )
            return (reason,)
    return ()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not hasattr(kernel_of("columns_forward_kernel"), "cache_key")


Launches = tuple[Ready, ...]
_ready: dict[tuple[Any, ...], Launches | None] = {}
KEPT = 4096  # launches of layouts that need their sizes


Describe = Callable[[Mapping[str, Any]], Problem]


def run_distributions(op: str, tensors: dict[str, Any], describe: Describe) -> bool:
    """Launch a Triton operator on distributions, if nothing is to be copied before.

    Args:
        op: the operator's name.
        tensors: its arguments and results by name.
        describe: gives their Problem; asked once for each key.

    Returns:
        Whether it was launched: not without distributions, and not where something is copied.
    """
    logits: Tensor = tensors["logits"]
    dim, device = tensors["dim"], logits.get_device()
    shape = logits.shape
    bins = shape[dim]
    n = logits.numel() // bins
    beside = describe_besides(tensors)
    if not n or device < 0 or not beside.in_place:
        return False
    aligned = logits.data_ptr() % 16 == 0
    if aligned and dim == len(shape) - 1 and logits.is_contiguous():
        layout: Any = bins if n < 1 << 31 else -bins
    else:
        layout = shape, logits.stride(), dim
    others = tensors.get("margin"), tensors["project"] is not None
    key = op, logits.dtype, layout, device, aligned, others, beside
    ready = _ready.get(key)
    if ready is None:
        ready = _launches(key, describe(tensors), n)
        if ready is None:
            return False
    _start(ready, logits, tensors, n)
    return True


def _launches(key: tuple[Any, ...], problem: Problem, n: int) -> Launches | None:
    """The launches for a key, which are kept; None if something must be copied."""
    if problem.copied:
        return None
    if isinstance(key[2], int) and plan(key[0], problem, "triton").rows is None:
        key = (*key, n)  # long rows with a project, or weights with strides of their own
        if key in _ready:
            return _ready[key]
    if len(_ready) > KEPT:
        _ready.clear()
    ready = _ready[key] = _prepare(key[0], problem, "triton", problem.device)
    return ready


def run(
    op: str, problem: Problem, backend: str, tensors: dict[str, Any], results: Sequence[str]
) -> None:
    """Launch an operator on any problem with distributions.

    Args:
        op: the operator's name.
        problem: of these logits; if it says that they are copied, they are the copy.
        backend: "triton" or "cuda".
        tensors: its arguments, of any dtype and strides, and its results by name.
        results: the names of the results.
    """
    held = _held(problem, backend, tensors, results)
    logits = held["logits"]
    if logits.is_cuda:
        _start(_prepare_once(op, problem, backend, logits.device), logits, held, problem.count)
        return
    for step in steps(op, problem.beside.reduction):
        interpret(plan(step, problem, backend), held)


def _prepare(op: str, problem: Problem, backend: str, device: torch.device) -> Launches:
    ready = []
    for step in steps(op, problem.beside.reduction):
        one = plan(step, problem, backend)
        roles = [a.value for a in one.arguments if isinstance(a.value, str)]
        numbers = [
            a.value for a in one.arguments if not isinstance(a.value, str) and a.type != "null"
        ]
        with torch.cuda.device(device):
            start = loaded(one, device.index)
        ready.append(
            Ready(start, tuple(roles), one.grid, tuple(numbers), one.rows, one.scratch, one.counts)
        )
    return tuple(ready)


_prepare_once = functools.lru_cache(maxsize=4096)(_prepare)


def _start(ready: tuple[Ready, ...], logits: Tensor, tensors: dict[str, Any], n: int) -> None:
    device = logits.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            _start(ready, logits, tensors, n)
        return
    stream = current_stream(device)
    programs = 0
    for start, roles, (x, y, z), numbers, rows, scratch, counts in ready:
        if rows is not None:
            each, block = rows
            x, numbers = -(-(n // each) // block) + (n % each > 0), (n,)
        elif counts:
            numbers = (programs, n)
        if scratch is not None:
            programs = x * y * z
            tensors[scratch[0]] = _scratch(logits, scratch[1] * programs or n)
        start(x, y, z, stream, *[tensors[role].data_ptr() for role in roles], *numbers)


def _scratch(logits: Tensor, count: int) -> Tensor:
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty(count) if logits.dtype is dtype else logits.new_empty(count, dtype=dtype)
    )


IN_PLACE = ("logits", "weight")  # of boxes: read where they are, whatever their strides


def _held(
    problem: Problem, backend: str, tensors: dict[str, Any], results: Sequence[str]
) -> dict[str, Any]:
    """The tensors as a plan takes them."""
    held = dict(tensors)
    if backend == "triton" and not isinstance(problem, BoxProblem):
        beside, dim = problem.beside, tensors["dim"]
        logits = tensors["logits"]
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if tensors.get("target") is not None:
            held["target"] = tensors["target"].contiguous()
        for name in ("weight", "grad_loss", "grad_position"):
            value, how = tensors.get(name), getattr(beside, name)
            if value is not None and how.mode == "dense":
                if beside.reduction == "side_mean" and name == "grad_loss":
                    value = value.unsqueeze(dim - 1)
                held[name] = value.expand(shape).contiguous()
        return held
    for name, value in tensors.items():
        if isinstance(value, Tensor) and name not in IN_PLACE and name not in results:
            held[name] = _prepared(value, problem.compute_dtype)
    return held


def _prepared(value: Tensor, dtype: torch.dtype) -> Tensor:
    in_order = value.is_contiguous()
    if in_order and value.dtype is dtype and value.data_ptr() % 16 == 0:
        return value  # before anything that costs time
    if value.dtype is torch.bool:
        return value if in_order and value.is_cuda else value.contiguous().view(torch.uint8)
    return packed(value.to(dtype))


def packed(value: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, as plans assume of everything but the logits."""
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def interpret(launch_plan: LaunchPlan, tensors: dict[str, Any]) -> None:
    """Run a Triton plan on tensors by role, in the interpreter."""
    if launch_plan.scratch is not None:
        programs = math.prod(launch_plan.grid)
        n = tensors["target"].numel() if "target" in tensors else 0
        role, each = launch_plan.scratch
        tensors[role] = _scratch(tensors["logits"], each * programs or n)
    arguments = {
        argument.name: tensors[argument.value]
        if isinstance(argument.value, str)
        else argument.value
        for argument in launch_plan.arguments
    }
    kernel_of(launch_plan.kernel)[launch_plan.grid](**arguments, **dict(launch_plan.constants))


def current_stream(device: int) -> int:
    """The handle of PyTorch's current stream, as Triton reads it, too."""
    return torch._C._cuda_getCurrentRawStream(device)


_loaded: dict[tuple[Any, ...], Start] = {}


def loaded(launch_plan: LaunchPlan, device: int) -> Start:
    """The plan's kernel on a device, which is the current one; compiled at the first call."""
    key = (device, launch_plan.signature)
    start = _loaded.get(key)
    if start is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{launch_plan.op}: the kernel for this call is not compiled yet, and it cannot be "
                "compiled while a CUDA graph is being captured. Run the call once before the "
                "capture."
            )
        loading = importlib.import_module(f".{launch_plan.backend}.loading", __package__)
        start = _loaded[key] = loading.load(launch_plan)
    return start
