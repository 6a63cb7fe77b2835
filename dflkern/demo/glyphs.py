"""Small ink images: scanned digits, turned and sheared, and the clutter that is no digit.

A glyph is a (GLYPH, GLYPH) square of ink from 0 to 1, smooth enough to be resampled at any scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GLYPH = 40
ZOOM_OUT = 1.5  # room around the 8×8 scan, so that a turned digit keeps its corners
INK_LOW, INK_HIGH = 0.25, 0.75  # grey levels of a scan where its strokes begin and are full


class Digits(NamedTuple):
    """Scanned digits: images (N, 8, 8) with grey levels from 0 to 1, labels (N,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: str) -> Digits:
        """The same digits on another device."""
        return Digits(self.images.to(device), self.labels.to(device))


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """The bundled scans of scikit-learn as (train, validation): three quarters and the rest.

    No digit is in both: what validation measures is reading digits that were never trained on.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, validation = order.tensor_split([len(order) * 3 // 4])
    return Digits(images[train], labels[train]), Digits(images[validation], labels[validation])


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Random numbers between low and high, on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def warp(images: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Glyphs (N, GLYPH, GLYPH) from scans (N, 8, 8), turned by angle (radians) and sheared."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (
        torch.stack((cos, shear * cos - sin, zero), -1),
        torch.stack((sin, shear * sin + cos, zero), -1),
    )
    theta = ZOOM_OUT * torch.stack(rows, 1)
    grid = F.affine_grid(theta, [len(images), 1, GLYPH, GLYPH], align_corners=False)
    grey = F.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    level = ((grey - INK_LOW) / (INK_HIGH - INK_LOW)).clamp(0, 1)
    return level * level * (3 - 2 * level)  # smoothstep: a scan this coarse has no sharp edges


def extent(glyphs: Tensor, threshold: float = 0.5) -> Tensor:
    """Where the ink of each glyph (N, H, W) begins and ends, as xyxy (N, 4) in its own pixels.

    The edges lie where the ink crosses the threshold between two pixel centres, so they are
    continuous; a glyph without ink gives an arbitrary box.
    """
    low_x, high_x = _crossings(glyphs.amax(1), threshold)
    low_y, high_y = _crossings(glyphs.amax(2), threshold)
    return torch.stack((low_x, low_y, high_x, high_y), -1)


def _crossings(profile: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return (
        _first_crossing(profile, threshold),
        profile.shape[-1] - _first_crossing(profile.flip(-1), threshold),
    )


def _first_crossing(profile: Tensor, threshold: float) -> Tensor:
    padded = F.pad(profile, (1, 0))
    index = (profile >= threshold).long().argmax(-1, keepdim=True)
    before, after = padded.gather(-1, index), padded.gather(-1, index + 1)
    step = (after - before).clamp(min=1e-6)
    return (index - 0.5 + (threshold - before) / step)[..., 0]


def clutter(digits: Digits, count: int, generator: torch.Generator) -> Tensor:
    """Glyphs (count, GLYPH, GLYPH) that are not digits: arcs, blobs and fragments, a third each."""
    device = generator.device
    line = (torch.arange(GLYPH, device=device) + 0.5) / GLYPH * 2 - 1
    y, x = line[:, None], line[None, :]

    def pick(low: float, high: float) -> Tensor:
        return uniform((count, 1, 1), low, high, generator)

    direction = pick(-math.pi, math.pi)
    along = x * direction.cos() + y * direction.sin()
    across = y * direction.cos() - x * direction.sin()

    # From a tight curl to nearly a straight line; cut off by a disc, so that it has two ends.
    radius, thickness = pick(0.25, 0.74).reciprocal() - 0.8, pick(0.04, 0.12)
    from_arc = (((across + radius) ** 2 + along**2).sqrt() - radius).abs()
    arcs = _edge(thickness - from_arc) * _edge(0.85 - (x * x + y * y).sqrt())

    blobs = torch.exp(-4 * (along**2 + (across * pick(1, 2.5)) ** 2))

    index = torch.randint(len(digits.images), (count,), generator=generator, device=device)
    whole = warp(
        digits.images[index],
        uniform((count,), -math.pi, math.pi, generator),
        torch.zeros(count, device=device),
    )
    fragments = whole * _edge(along - pick(0.0, 0.15))  # less than half of a digit

    kind = torch.randint(3, (count, 1, 1), generator=generator, device=device)
    return torch.where(kind == 0, arcs, torch.where(kind == 1, blobs, fragments))


def _edge(distance: Tensor) -> Tensor:
    """Ink that fades over two pixels around distance 0, in units of half a glyph."""
    return (distance * (GLYPH / 4) + 0.5).clamp(0, 1)
