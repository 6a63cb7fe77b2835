"""Run one case and say what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dflkern

from .bounds import PRECISIONS, Bounded
from .cases import Case, build
from .making import Whole
from .specs import Spec
from .tensors import DTYPES, bits, memory

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Registered(TorchDispatchMode):
    """Under a dispatch mode, calls go through the registered operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _served_as(spec: Spec) -> Iterator[None]:
    name = "cpu" if spec.backend == "registered" else spec.backend
    mode = _Registered() if spec.backend == "registered" else contextlib.nullcontext()
    with dflkern.use_backend(name), mode:
        yield


def check(spec: Spec, product: Any = dflkern) -> list[str]:
    """What is wrong with a case; nothing if it is right."""
    threads = torch.get_num_threads()
    try:
        case = build(spec)
        torch.set_num_threads(spec.threads)
        with _served_as(spec), np.errstate(all="ignore"):
            return _check(spec, case, product)
    finally:
        torch.set_num_threads(threads)


def _check(spec: Spec, case: Case, product: Any) -> list[str]:
    inputs = {
        name: tensor
        for name, tensor in [*case.arguments.items(), case.leaf]
        if isinstance(tensor, Tensor)
    }
    before = {name: memory(tensor).clone() for name, tensor in inputs.items()}
    if case.raises is not None:
        return _expect_error(case, product)
    try:
        results, gradient = _run(case, product)
    except Exception as error:  # whatever comes is a finding
        return [f"raised {type(error).__name__}: {str(error)[:200]}"]
    faults = []
    for i, (actual, expected) in enumerate(zip(results, case.results, strict=True)):
        faults += _compare(f"result {i}", actual, expected)
        if case.ordered and not _in_order(actual, spec):
            faults.append(
                f"result {i} of shape {tuple(actual.shape)} has strides {actual.stride()}"
            )
    if gradient is not None:
        assert case.gradient is not None
        leaf = case.leaf[1]
        faults += _compare("gradient", gradient, case.gradient, NAMES[leaf.dtype])
        wanted = torch.empty_like(leaf).stride()
        if case.ordered and gradient.stride() != wanted:
            faults.append(f"the gradient has strides {gradient.stride()}, not {wanted}")
    faults += _repeat(spec, case, product, results, gradient)
    faults += [
        f"{name} was written to"
        for name, tensor in inputs.items()
        if not torch.equal(memory(tensor), before[name])
    ]
    return faults


def _run(case: Case, product: Any) -> tuple[list[Tensor], Tensor | None]:
    leaf = case.leaf[1]
    if case.gradient is None:
        return list(case.call(product, leaf)), None
    leaf = leaf.detach().requires_grad_()
    results = case.call(product, leaf)
    taken = [(r, g) for r, g in zip(results, case.upstream, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad(
        [result for result, _ in taken], leaf, [upstream for _, upstream in taken]
    )
    return [result.detach() for result in results], gradient


def _repeat(
    spec: Spec, case: Case, product: Any, results: list[Tensor], gradient: Tensor | None
) -> list[str]:
    """Whether a second call gives the same bits."""
    if spec.repeat == "threads" and spec.backend != "reference":
        torch.set_num_threads(3 - spec.threads)
    if spec.repeat == "no grad":
        with torch.no_grad():
            again, gradient_again = list(case.call(product, case.leaf[1])), gradient
    else:
        again, gradient_again = _run(case, product)
    same = all(torch.equal(bits(a), bits(b)) for a, b in zip(results, again, strict=True))
    if gradient is not None and gradient_again is not None:
        same = same and torch.equal(bits(gradient), bits(gradient_again))
    return [] if same else [f"a second call ({spec.repeat}) gives other bits"]


def _in_order(result: Tensor, spec: Spec) -> bool:
    """Whether the strides are those of a new tensor, but along axes of size 1."""
    by_pytorch = spec.weight or spec.reduction != "none"
    if by_pytorch and result.numel() == 0:
        return True  # PyTorch's own operations choose any strides for no elements
    pairs = zip(result.shape, result.stride(), torch.empty(result.shape).stride(), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in pairs)


def _expect_error(case: Case, product: Any) -> list[str]:
    assert case.raises is not None
    try:
        case.call(product, case.leaf[1])
    except case.raises:
        return []
    except Exception as error:
        return [f"raised {type(error).__name__}, not {case.raises.__name__}: {error}"]
    return [f"did not raise {case.raises.__name__}"]


def _compare(
    name: str, actual: Tensor, expected: Bounded | Whole, dtype: str | None = None
) -> list[str]:
    """A result of the arithmetic's type, or one rounded to another, against the model's."""
    if isinstance(expected, Whole):
        return _compare_whole(name, actual, expected)
    for known, precision in PRECISIONS.items():
        if precision is expected.precision:
            dtype = dtype or known
    assert dtype is not None
    if actual.dtype != DTYPES[dtype] or tuple(actual.shape) != expected.value.shape:
        shape = expected.value.shape
        return [f"{name} is {actual.dtype} {tuple(actual.shape)}, not {DTYPES[dtype]} {shape}"]
    values = actual.detach().double().numpy()
    expected = expected.narrowed(PRECISIONS[dtype])
    wrong = expected.rejects(values)
    if not wrong.any():
        return []
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return [
        f"{name}: {int(wrong.sum())} of {wrong.size} are wrong; at {first} {values[first]!r}, "
        f"expected {expected.value[first]!r} within {4 * expected.bound[first]:.3g}"
    ]


def _compare_whole(name: str, actual: Tensor, expected: Whole) -> list[str]:
    if actual.dtype != expected.dtype or tuple(actual.shape) != expected.value.shape:
        shape = expected.value.shape
        return [f"{name} is {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {shape}"]
    wrong = (actual.numpy() != expected.value) & expected.known
    if not wrong.any():
        return []
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return [
        f"{name}: {int(wrong.sum())} of {wrong.size} are wrong; at {first} {int(actual[first])}, "
        f"expected {int(expected.value[first])}"
    ]
