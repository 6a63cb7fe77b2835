"""The operators of the table in torch.ops.dflkern: schemas, implementations, fakes and autograd.

They are private: call the functions of `dflkern` instead. The backend is a string argument, so that
a backward pass, which runs in another thread on CUDA, and a compiled graph see what the caller
asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .implementations import compute, empty_results
from .run import gradient, observed, setup_context
from .table import TABLE, Arguments, Operator


def own_library() -> torch.library.Library:
    """The registrations of this import; those of an earlier import of dflkern are taken back."""
    namespace = vars(torch.ops.dflkern)
    if "registrations" in namespace:
        namespace["registrations"]._destroy()
    namespace["registrations"] = library = torch.library.Library("dflkern", "FRAGMENT")
    return library


def register(op: Operator, library: torch.library.Library) -> None:
    """Register an operator, and its gradient if it has one."""

    def named(inputs: tuple[Any, ...]) -> Arguments:
        return dict(zip(op.names, inputs, strict=True))

    def implementation(*inputs: Any) -> Any:
        return compute(op, named(inputs))

    def fake(*inputs: Any) -> Any:
        results = empty_results(op, named(inputs))
        return results[0] if len(results) == 1 else tuple(results)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, op, named(inputs))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradient(ctx, grads, observed), *(None,) * (len(op.names) - 1)

    name = f"dflkern::{op.name}"
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(op.name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    if op.gradient is not None:
        torch.library.register_autograd(name, backward, setup_context=setup, lib=library)
        register(op.gradient, library)


library = own_library()
for _op in TABLE.values():
    register(_op, library)
