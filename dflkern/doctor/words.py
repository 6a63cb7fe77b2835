"""Numbers as the doctor's sentences have them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def percent(share: float) -> str:
    """A share from 0 to 1, with as many digits as it needs to be neither 0 % nor 100 %."""
    for digits in (0, 1, 2):
        text = f"{100 * share:.{digits}f}"
        if float(text) not in (0, 100) or share in (0, 1):
            return f"{text} %"
    return "under 0.01 %" if share < 0.5 else "over 99.99 %"


def number(value: float) -> str:
    """Four digits that matter, without an exponent where that can be avoided."""
    return f"{value:.4g}" if abs(value) < 1e4 or abs(value) >= 1e9 else f"{value:.0f}"


def row(values: Tensor | Iterable[float]) -> str:
    """A few numbers in brackets."""
    items = values.flatten().tolist() if isinstance(values, Tensor) else values
    return f"[{', '.join(number(value) for value in items)}]"
