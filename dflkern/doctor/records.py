"""What a watch keeps: samples, losses and gradient norms, each in one buffer of fixed size.

Many small tensors that live on between a training's large ones would fragment the heap, and the
process would grow with every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import Rows, has_values, kind, thinned

ROWS = 256  # anchors kept of a call
MAX_ROWS = 100 * ROWS  # anchors kept of all calls
MAX_NUMBERS = 10_000  # losses, normalizers, or backward passes


class Series:
    """Numbers over the steps, up to `MAX_NUMBERS`."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor | float | None) -> None:
        """A number, or an even sample of several."""
        if value is None or (isinstance(value, Tensor) and not has_values(value)):
            return
        with torch.no_grad():
            values = torch.as_tensor(value).detach().flatten()
            values = values[:: -(-len(values) // ROWS) or 1][: MAX_NUMBERS - self._count]
            if self._values is None:
                self._values = buffer((MAX_NUMBERS,), torch.float32, values.device)
            self._values[self._count : self._count + len(values)].copy_(values)
            self._count += len(values)

    def values(self) -> Tensor | None:
        """(N,) in fp32; None before the first number."""
        return None if self._values is None else self._values[: self._count].clone()


class Samples:
    """Rows of anchors, as many of each call that those of all calls fit into `MAX_ROWS`."""

    def __init__(self, calls: int) -> None:
        self._calls = min(calls, MAX_ROWS)
        self._each = min(ROWS, MAX_ROWS // max(1, self._calls))
        self._buffers: Rows = {}
        self._kind: tuple[object, ...] = ()
        self._count = 0

    def full(self) -> bool:
        """No further call is wanted."""
        return self._calls <= 0

    def thin(self, rows: Rows) -> Rows:
        """Copies of what is kept of a call."""
        return thinned(rows, self._each)

    def add(self, rows: Rows) -> None:
        """Keep a call's rows, if they are of the same kind as those of the first call."""
        if self.full():
            return
        if not self._buffers:
            self._kind = kind(rows)
            self._buffers = {
                name: buffer((self._each * self._calls, *values.shape[1:]), values.dtype,
                             values.device)
                for name, values in rows.items()
            }  # fmt: skip
        self._calls -= 1
        if kind(rows) == self._kind:
            count = self._count + len(next(iter(rows.values())))
            for name, values in rows.items():
                self._buffers[name][self._count : count].copy_(values)
            self._count = count

    def rows(self) -> Rows:
        """All rows; empty before the first call."""
        return {name: values[: self._count].clone() for name, values in self._buffers.items()}


class GradientNorms:
    """The norm of each parameter's gradient in each backward pass."""

    def __init__(self, passes: int) -> None:
        self._passes = min(passes, MAX_NUMBERS)
        self._names: list[str] = []
        self._norms: Tensor | None = None  # (passes, parameters), -1 where there was none
        self._seen: set[int] = set()
        self._row = 0

    def name(self, name: str) -> int:
        """The column of another parameter."""
        self._names.append(name)
        return len(self._names) - 1

    def add(self, column: int, gradient: Tensor) -> None:
        """A parameter's gradient; a second one of the same parameter begins another pass."""
        if column in self._seen:
            self.end_pass()
        if self._row >= self._passes:
            return
        if self._norms is None:
            shape = (self._passes, len(self._names))
            self._norms = buffer(shape, torch.float32, gradient.device).fill_(-1)
        self._seen.add(column)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._norms[self._row, column].copy_(norm)

    def end_pass(self) -> None:
        """Whatever comes next belongs to another backward pass."""
        self._row += bool(self._seen)
        self._seen.clear()

    def by_layer(self) -> dict[str, list[float]]:
        """The norms of all parameters together as "", then of each layer's weight."""
        if self._norms is None or not self._row:
            return {}
        norms = self._norms[: self._row].double().cpu()
        together = torch.where(norms == -1, 0, norms).norm(dim=1)
        layers = {
            name: values[values != -1].tolist()
            for name, values in zip(self._names, norms.unbind(1), strict=True)
            if name.endswith("weight")
        }
        return {"": together.tolist()} | {name: each for name, each in layers.items() if each}


def buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor that can be written to later, whatever mode it is made in."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
