"""The gate before any time: results and gradients against float64, by an error budget."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .cases import MARGIN, Case, Inputs
from .contenders import Contender, Function, Outputs

# What a kernel may add to the error of PyTorch in the same dtype, in units of the dtype's epsilon:
# an exponential of base 2 costs a unit in the last place per unit of the exponent.
SLACK = {torch.float32: 32, torch.float64: 32, torch.float16: 1, torch.bfloat16: 1}
# Relative L2 error at which a peer no longer computes the same thing
PEER_LIMIT = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}


class Values(NamedTuple):
    """Results, and the gradient of the stored logits for a random upstream gradient."""

    results: tuple[Tensor, ...]
    gradient: Tensor

    def named(self) -> dict[str, Tensor]:
        """Each with a name for messages."""
        return {f"result {i}": x for i, x in enumerate(self.results)} | {"gradient": self.gradient}


def evaluate(function: Function, leaf: Tensor) -> Values:
    """Run a contender forward and backward."""
    leaf = leaf.detach().requires_grad_()
    results = as_tuple(function(leaf))
    (gradient,) = torch.autograd.grad(results, leaf, upstream_for(results))
    return Values(tuple(result.detach() for result in results), gradient)


def upstream_for(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random upstream gradients, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device) for x in results
    )


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One result or several as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def expected(case: Case, inputs: Inputs, *, mean: bool, exact: bool) -> Values:
    """The reference's values by PyTorch's autograd: in float64 if exact, else in their dtype."""

    def definition(leaf: Tensor) -> Outputs:
        logits = case.view(leaf)
        if inputs.target is None:
            return reference.dfl_decode(logits, None, case.dim)
        if case.op == "loss_and_decode":
            return reference.dfl_loss_and_decode(logits, inputs.target, None, case.dim, MARGIN)
        return reference.dfl_loss(
            logits, inputs.target, None, None, None, case.dim, MARGIN,
            "side_mean" if mean else "none",
        )  # fmt: skip

    return evaluate(definition, inputs.leaf.double() if exact else inputs.leaf)


def faults(case: Case, inputs: Inputs, contender: Contender) -> list[str]:
    """Why dflkern's values are wrong; empty if they are within the budget."""
    actual = evaluate(contender.function, inputs.leaf).named()
    peer = expected(case, inputs, mean=contender.mean, exact=False).named()
    exact = expected(case, inputs, mean=contender.mean, exact=True).named()
    return [
        f"{contender.label}: {name}: {fault}"
        for name in exact
        for fault in budget_faults(actual[name], peer[name], exact[name])
    ]


def peer_faults(actual: Values, exact: Values, dtype: torch.dtype) -> list[str]:
    """Why a peer does not do the same work: a ratio to it would mean nothing."""
    found = []
    for (name, value), truth in zip(actual.named().items(), exact.named().values(), strict=True):
        if value.numel() != truth.numel():
            found.append(f"{name}: shape {tuple(value.shape)}, not {tuple(truth.shape)}")
            continue
        error = float((value.double().view_as(truth) - truth).norm() / truth.norm())
        if not error <= PEER_LIMIT[dtype]:
            found.append(f"{name}: relative L2 error {error:.3g}")
    return found


def budget_faults(actual: Tensor, peer: Tensor, exact: Tensor) -> list[str]:
    """Why actual's error exceeds that of peer, PyTorch in the same dtype, by more than a term."""
    if actual.shape != exact.shape or actual.dtype != peer.dtype:
        return [f"{tuple(actual.shape)} {actual.dtype}, not {tuple(exact.shape)} {peer.dtype}"]
    if not actual.isfinite().all():
        return ["NaN or inf"]
    term = SLACK[actual.dtype] * torch.finfo(actual.dtype).eps
    a, p, e = (x.double().flatten() for x in (actual, peer, exact))
    error, peer_error = a - e, p - e
    size, scale = e.norm(), e.abs().max()
    checks = {
        "largest error": (error.abs().max(), peer_error.abs().max() + term * scale),
        "relative L2 error": (error.norm() / size, peer_error.norm() / size + term),
        "signed bias": (error.mean().abs(), peer_error.mean().abs() + term * e.abs().mean()),
    }
    return [
        f"{name} {float(value):.3g} above {float(bound):.3g}"
        for name, (value, bound) in checks.items()
        if not value <= bound
    ]
