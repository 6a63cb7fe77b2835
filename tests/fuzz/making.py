"""What a case is, and the tensors of a specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bounds import PRECISIONS, Bounded
from .specs import Spec
from .tensors import DTYPES, LAYOUTS, exact, lay_out, numbers


@dataclass
class Whole:
    """An expected result of whole numbers; where it is not known, any will do."""

    value: np.ndarray
    dtype: torch.dtype
    known: np.ndarray


@dataclass
class Case:
    """A call, and what must come of it.

    Attributes:
        function: the name of the function.
        arguments: its arguments by name, without the one that takes a gradient.
        leaf: that argument, as (name, tensor).
        results: the expected results.
        upstream: the gradient by each result; None for a result that takes no part.
        gradient: the expected gradient of the leaf, or None where none is checked.
        ordered: results are contiguous, the gradient has the strides of torch.empty_like(leaf).
        raises: the error that the call must raise instead.
    """

    function: str
    arguments: dict[str, Any]
    leaf: tuple[str, Tensor]
    results: Sequence[Bounded | Whole]
    upstream: list[Tensor | None] = field(default_factory=list)
    gradient: Bounded | None = None
    ordered: bool = True
    raises: type[Exception] | None = None

    def call(self, product: Any, leaf: Tensor) -> tuple[Tensor, ...]:
        found = getattr(product, self.function)(**{self.leaf[0]: leaf}, **self.arguments)
        return found if isinstance(found, tuple) else (found,)


class Maker:
    """Makes the tensors of a specification; each has a random generator of its own."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.arithmetic = np.float64 if spec.dtype == "float64" else np.float32
        self.compute = DTYPES["float64" if spec.dtype == "float64" else "float32"]
        self.precision = PRECISIONS["float64" if spec.dtype == "float64" else "float32"]

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng((*self.spec.seed, *name.encode()))

    def logits(self, shape: tuple[int, ...]) -> Tensor:
        spec, rng = self.spec, self.rng("logits")
        fill = lambda size: numbers(rng, size, spec.values)  # noqa: E731
        return lay_out(rng, fill, shape, DTYPES[spec.dtype], spec.layout)

    def other(
        self, name: str, shape: tuple[int, ...], fill: Callable[..., Any], dtype: Any = None
    ) -> Tensor:
        """A tensor beside the logits; fill(rng, size) gives its numbers."""
        rng = self.rng(name)
        dtype = dtype or DTYPES[self.spec.other_dtype]
        layout = self.spec.other_layout
        return lay_out(rng, lambda size: fill(rng, size), shape, dtype, layout)

    def upstream(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        kind = self.spec.upstream
        if kind in ("first", "second"):
            if kind != name and self.spec.op == "dfl_loss_and_decode":
                return None
            kind = "normal"
        rng = self.rng("upstream " + name)
        fill = lambda size: numbers(rng, size, kind, 1.0)  # noqa: E731
        layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
        return lay_out(rng, fill, shape, self.compute, layout)

    def project(self) -> tuple[Any, np.ndarray | None]:
        """As the function takes it, and its values, or None for 0, 1, …, K − 1."""
        spec, rng = self.spec, self.rng("project")
        if spec.project is None:
            return None, None
        if spec.project == "default":
            return [float(k) for k in range(spec.bins)], None
        steps = rng.uniform(0.5, 2.0, spec.bins)
        positions = np.cumsum(steps) - steps[0] + rng.choice([0.0, -1.5, -spec.bins / 2, 7.0])
        if spec.project == "descending":
            return [float(w) for w in positions[::-1]], None
        if spec.project == "list":
            return [float(w) for w in positions], positions
        if spec.project == "unsorted":
            positions = numbers(rng, spec.bins, rng.choice(["normal", "zero", "special"]))
        elif spec.project == "half":
            positions = np.arange(spec.bins) - 2.0  # which bf16 holds exactly
        dtype = {"double": torch.float64, "half": torch.bfloat16}.get(spec.project, self.compute)
        tensor = lay_out(rng, lambda size: positions[:size], (spec.bins,), dtype, "contiguous")
        return tensor, exact(tensor)

    def target(self, shape: tuple[int, ...], positions: np.ndarray | None) -> Tensor:
        spec = self.spec
        w = np.arange(spec.bins) if positions is None else positions
        low, high = np.clip(np.nan_to_num([w.min(), w.max()]), -1e30, 1e30)

        def fill(rng: np.random.Generator, size: int) -> np.ndarray:
            if spec.target == "edges":
                edges = [*w, high - spec.margin, low, high, high + 1, low - 1]
                return rng.choice(edges, size)
            if spec.target in ("special", "wide"):
                return numbers(rng, size, spec.target) + low
            return rng.uniform(low - 1, high + 1, size)

        return self.other("target", shape, fill)


def weights(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """Weights of which no sum is almost 0: the order of a sum then decides nothing."""
    if kind == "signed":
        return rng.integers(-8, 9, size) / 4
    if kind in ("ones", "zeros"):
        return np.full(size, float(kind == "ones"))
    positive = rng.uniform(0.1, 1.0, size)
    if kind == "some zeros":
        return np.where(rng.random(size) < 0.5, 0.0, positive)
    if kind == "special":
        return np.where(rng.random(size) < 0.05, rng.choice([np.nan, np.inf, 1e30], size), positive)
    return positive


def broadcasting(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to this one."""
    shape = tuple(n if rng.random() < 0.7 else 1 for n in shape)
    return shape[int(rng.integers(0, len(shape) + 1)) :] if rng.random() < 0.3 else shape
