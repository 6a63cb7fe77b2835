"""Triton kernels compiled for a GPU that is here, and how they are started.

`JITFunction.run` spends some 8 µs a launch on binding and specialising its arguments. A plan has
done that, so its kernel is compiled once and started by the compiled kernel's own `run`, as
`JITFunction.run` does at its end. Where this Triton does it differently, kernels are started by
keyword arguments.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ..launch_plan import ELEMENT, LaunchPlan, Start
from . import kernel_of

# The last lines of JITFunction.run in the versions whose compiled kernels are started directly
STARTED_BY = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)
# And how CudaLauncher.__call__ does its part, for kernels that need no scratch memory
LAUNCHED_BY = (
    "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, "
    "self.launch_pdl, kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, "
    "global_scratch, profile_scratch, self.arg_annotations, self.kernel_signature, kernel_args)"
)
DTYPES = {element: dtype for dtype, element in ELEMENT.items()} | {
    "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64
}  # fmt: skip


def source_of(plan: LaunchPlan) -> ASTSource:
    """What Triton compiles for a plan: signature, constants, and what is a multiple of 16."""
    kernel = kernel_of(plan.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    constants = dict(plan.constants)
    types = dict.fromkeys(constants, "constexpr") | {a.name: a.type for a in plan.arguments}
    return ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[a.name],): [["tt.divisibility", 16]] for a in plan.arguments if a.divisible},
    )


def options_of(plan: LaunchPlan) -> dict[str, Any]:
    """How Triton compiles: a multiply-add is fused where a kernel says so, and nowhere else."""
    return {"num_warps": plan.num_warps, "enable_fp_fusion": False}


def load(plan: LaunchPlan) -> Start:
    """Compile a plan's kernel for the current device and load it there.

    Raises:
        OSError: if no kernel can be kept in the folder of Triton's cache.
    """
    check_cache()
    kernel = kernel_of(plan.kernel)
    if not starts_directly():
        return _by_keywords(plan, kernel)
    compiled = _compile(plan)
    given = {argument.name: f"a{i}" for i, argument in enumerate(plan.arguments)}
    # The launcher takes all parameters in their order, and reads no constants
    every = ", ".join(given.get(name, "None") for name in kernel.arg_names)
    run = compiled.run
    scope = {
        "run": run,
        "function": compiled.function,
        "metadata": compiled.packed_metadata,
        "describe": compiled.launch_metadata,
        "profiler": _profiler,
    }
    plain = f"run(x, y, z, stream, function, metadata, None, None, None, {every})"
    if _needs_no_wrapper(run):
        scope |= {
            "launch": run.launch,
            "cooperative": run.launch_cooperative_grid,
            "pdl": run.launch_pdl,
            "notes": run.arg_annotations,
            "signature": run.kernel_signature,
        }
        plain = (
            "launch(x, y, z, stream, function, cooperative, pdl, metadata, None, None, None, None, "
            f"None, notes, signature, ({every},))"
        )
    # A function made for its number of arguments: a loop over them would cost another 1 µs
    start: Start = eval(
        f"""lambda x, y, z, stream, {", ".join(given.values())}: (
            {plain}
            if profiler() is None
            else run(x, y, z, stream, function, metadata, describe((x, y, z), stream, {every}),
                     *profiler(), {every})
        )""",
        scope,
    )
    return start


def _compile(plan: LaunchPlan) -> Any:
    """A plan's compiled kernel, loaded; compiled anew where Triton's cache holds a damaged one."""
    try:
        return _compile_once(plan)
    except Exception:  # of any kind: from a file that is no JSON, or no machine code
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            return _compile_once(plan)


def _compile_once(plan: LaunchPlan) -> Any:
    compiled = triton.compile(source_of(plan), options=options_of(plan))
    # Else it unloads itself after Triton's own modules are gone, and Python prints the exception
    atexit.register(setattr, compiled, "module", None)
    assert compiled.run is not None  # asking for it loads the machine code
    return compiled


@functools.cache
def check_cache() -> None:
    """See to it that kernels can be kept: later, an OSError would come out of any call."""
    folder = Path(knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"the folder of Triton's cache, {folder}, cannot be written to; name another one in "
            "the environment variable TRITON_CACHE_DIR"
        )


def _needs_no_wrapper(launcher: Any) -> bool:
    """Whether a launcher does nothing but hand its arguments to the function of the driver."""
    return (
        _source_has(type(launcher).__call__, LAUNCHED_BY)
        and not getattr(launcher, "gsan_enabled", True)
        and launcher.global_scratch_size == launcher.profile_scratch_size == 0
    )


def _profiler() -> tuple[Any, Any] | None:
    """What is called before and after each launch, None where nobody listens."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return enter, leave
    return None


def starts_directly() -> bool:
    """Whether this Triton's compiled kernels are started as here."""
    return _source_has(JITFunction.run, STARTED_BY)


@functools.cache
def _source_has(function: Any, text: str) -> bool:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return text in " ".join(source.split())


class _Pointer(NamedTuple):
    """An address with its element type, as Triton takes one."""

    address: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.address


def _by_keywords(plan: LaunchPlan, kernel: Any) -> Start:
    dtypes = [DTYPES[a.type[1:]] if a.type[0] == "*" else None for a in plan.arguments]
    options = {**dict(plan.constants), **options_of(plan)}

    def start(x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        named = {
            argument.name: value if dtype is None else _Pointer(value, dtype)
            for argument, value, dtype in zip(plan.arguments, arguments, dtypes, strict=True)
        }
        kernel[x, y, z](**named, **options)  # on the current stream, which `stream` is

    return start
