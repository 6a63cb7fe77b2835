"""Derives the polynomials of csrc/common: minimax fits with rounded coefficients.

    python tests/cpu/fit_polynomials.py          # needs numpy, scipy, mpmath

A fit is a linear programme: minimise the largest weighted error over Chebyshev points. Coefficients
are then rounded to the type one at a time, lowest power first, each time refitting the rest, so
that the later ones make up for the rounding of the earlier ones.

exp(r) is fitted on |r| <= ln 2 / 2 for relative error, with exp(0) = 1 fixed. log uses
log((1 + q) / (1 - q)) = q (2 + q^2 c(q^2)) with q = f / (2 + f), |q| <= 3 - 2 sqrt 2; c is fitted.
atan(u) = u (1 + u^2 c(u^2)) on 0 <= u <= 1; c is fitted for relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mpmath as mp
import numpy as np
from scipy.optimize import linprog

mp.mp.dps = 50


def fit(
    function: Callable,
    weight: Callable,
    powers: Iterable[int],
    low: float,
    high: float,
    rounder: Callable,
    fixed: dict[int, float] | None = None,
    bits: int = 30,
    points: int = 600,
) -> tuple[dict[int, mp.mpf], mp.mpf]:
    """Coefficients by power, and the largest weighted error with them.

    `bits` scales the residuals for the double precision of the linear programme.
    """
    angles = [mp.pi * i / points for i in range(points + 1)]
    xs = [(mp.mpf(low) + high) / 2 + (mp.mpf(high) - low) / 2 * mp.cos(a) for a in angles]
    done = {p: mp.mpf(v) for p, v in (fixed or {}).items()}
    free = [p for p in powers if p not in done]
    scale = mp.mpf(max(abs(low), abs(high)))
    while True:
        rest = [weight(x) * (function(x) - sum(c * x**p for p, c in done.items())) for x in xs]
        if not free:
            return done, max(abs(r) for r in rest)
        basis = np.array([[float(weight(x) * (x / scale) ** p) for p in free] for x in xs])
        start = np.linalg.lstsq(basis, np.array([float(r) for r in rest]), rcond=None)[0]
        start = [mp.mpf(c) / scale**p for c, p in zip(start, free, strict=True)]
        residual = np.array(
            [
                float((r - sum(c * weight(x) * x**p for c, p in zip(start, free, strict=True)))
                      * 2**bits)
                for r, x in zip(rest, xs, strict=True)
            ]
        )  # fmt: skip
        ones = np.ones((len(xs), 1))
        solution = linprog(
            [0] * len(free) + [1],
            A_ub=np.vstack([np.hstack([-basis, -ones]), np.hstack([basis, -ones])]),
            b_ub=np.concatenate([-residual, residual]),
            bounds=[(None, None)] * len(free) + [(0, None)],
            method="highs",
        ).x
        power = free.pop(0)
        coefficient = start[0] + mp.mpf(solution[0]) / 2**bits / scale**power
        done[power] = mp.mpf(float(rounder(float(coefficient))))


def log_core(z: mp.mpf) -> mp.mpf:
    """(log((1 + q) / (1 - q)) / q - 2) / q^2 at z = q^2."""
    if z < mp.mpf("1e-14"):
        return mp.mpf(2) / 3 + 2 * z / 5
    q = mp.sqrt(z)
    return (2 * mp.atanh(q) / q - 2) / z


def atan_core(z: mp.mpf) -> mp.mpf:
    """(atan(u) / u - 1) / u^2 at z = u^2."""
    if z < mp.mpf("1e-14"):
        return -mp.mpf(1) / 3 + z / 5
    u = mp.sqrt(z)
    return (mp.atan(u) / u - 1) / z


def main() -> None:
    """Print the coefficients and errors of all fits."""
    half = float(mp.log(2) / 2) * 1.0005
    square = float((3 - 2 * mp.sqrt(2)) ** 2) * 1.001

    def inverse_exp(x: mp.mpf) -> mp.mpf:
        return mp.exp(-x)

    def of_log(z: mp.mpf) -> mp.mpf:  # the error of q^3 c relative to log = 2 q
        return z / 2

    def of_atan(z: mp.mpf) -> mp.mpf:  # the error of u^3 c relative to atan
        return z / (1 + z * atan_core(z))

    fits = {
        "exp float": (mp.exp, inverse_exp, range(6), -half, half, np.float32, {0: 1}, 30, 24),
        "log float": (log_core, of_log, range(3), 0, square, np.float32, None, 30, 24),
        "atan float": (atan_core, of_atan, range(8), 0, 1, np.float32, None, 30, 24),
        "exp double": (mp.exp, inverse_exp, range(12), -half, half, float, {0: 1, 1: 1}, 52, 53),
        "log double": (log_core, of_log, range(7), 0, square, float, None, 54, 53),
    }
    for name, (*arguments, digits) in fits.items():
        coefficients, error = fit(*arguments)
        print(f"{name}: error {mp.nstr(error * 2**digits, 4)} * 2^-{digits}")
        print("  " + ", ".join(float(c).hex() for _, c in sorted(coefficients.items())))


if __name__ == "__main__":
    main()
