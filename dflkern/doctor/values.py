"""Tensors and numbers in the form that the checks compute with, or a sentence why they are not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES

Numbers: TypeAlias = Sequence[float] | Tensor  # losses or norms over the steps
# Kinds of tensors without plain values: their name, how to tell, and what to pass instead.
UNSUITED: tuple[tuple[str, Callable[[Tensor], bool], str], ...] = (
    ("nested", lambda value: value.is_nested, "torch.cat({name}.unbind())"),
    ("meta", lambda value: value.is_meta, "the tensor of a training step, which has values"),
    ("sparse", lambda value: value.layout is not torch.strided, "{name}.to_dense()"),
    ("quantized", lambda value: value.is_quantized, "{name}.dequantize()"),
    ("complex", lambda value: value.is_complex(), "{name}.real"),
)


def tensor(name: str, value: object) -> Tensor:
    """On the CPU, in a floating-point dtype.

    Raises:
        TypeError: for what is no tensor, or one without plain real values.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"examine: {name} is a {type(value).__name__}; a torch.Tensor is needed. Convert it "
            f"with torch.as_tensor({name})."
        )
    for kind, is_kind, instead in UNSUITED:
        if is_kind(value):
            raise TypeError(
                f"examine: {name} is a {kind} tensor; plain real numbers are needed. Pass "
                f"{instead.format(name=name)}."
            )
    value = value.detach().cpu()
    try:
        return value if value.dtype in FLOAT_DTYPES else value.float()
    except RuntimeError as error:  # dtypes that only store bits
        raise TypeError(
            f"examine: {name} has dtype {value.dtype}, which PyTorch cannot convert to float. "
            "Pass fp32, fp16 or bf16."
        ) from error


def numbers(name: str, values: Numbers | float) -> Tensor:
    """A flat fp64 tensor of a tensor, a number, or a sequence of numbers.

    Raises:
        TypeError: for anything else.
    """
    try:
        if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
            values = [float(value) for value in values]
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"examine: {name} is a {type(values).__name__}; a tensor or a sequence of numbers is "
            f"needed. Convert it with [float(x) for x in {name}]."
        ) from error
    return tensor(name, values).double().flatten()


def whole(name: str, value: object) -> int:
    """An integer of any type but bool.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    given = repr(value) if isinstance(value, (bool, float)) else f"a {type(value).__name__}"
    raise TypeError(f"examine: {name} is {given}; a whole number is needed.")
