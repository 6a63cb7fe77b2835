"""Scenes: several digits at several scales and sub-pixel positions, with clutter and true boxes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config
from .glyphs import GLYPH, Digits, clutter, extent, uniform, warp

ATTEMPTS = 40  # positions tried for a digit, each a little smaller than the one before
SHRINK = 0.95
MAX_OVERLAP = 0.1  # of two digits' boxes, as a share of the smaller one


class Scenes(NamedTuple):
    """A batch of scenes.

    images (B, 1, S, S) from 0 to 1; boxes (B, M, 4) as xyxy in pixels; labels (B, M); valid (B, M)
    says which of the M places hold a digit.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor


def compose(digits: Digits, count: int, config: Config, generator: torch.Generator) -> Scenes:
    """Draw `count` scenes; digits and generator live on the device that the scenes shall be on."""
    places, size, device = config.max_digits, config.image_size, generator.device
    index = torch.randint(len(digits.labels), (count * places,), generator=generator, device=device)
    glyphs = warp(
        digits.images[index],
        uniform((count * places,), -0.2, 0.2, generator),
        uniform((count * places,), -0.2, 0.2, generator),
    )
    inks = extent(glyphs).view(count, places, 4)
    boxes, valid = _place(inks, config, generator)
    ink = glyphs.view(count, places, GLYPH, GLYPH) * valid[..., None, None]

    canvas = _background(count, size, generator)
    if config.clutter:
        _paint_clutter(canvas, digits, config.clutter, generator)
    _paint(canvas, ink, inks, boxes, uniform((count, places), 0.6, 1, generator))
    inverted = uniform((count, 1, 1), 0, 1, generator) < 0.25
    canvas = torch.where(inverted, 1 - canvas, canvas)
    noise = torch.randn(canvas.shape, generator=generator, device=device)
    canvas = canvas + noise * uniform((count, 1, 1), 0.01, 0.06, generator)
    return Scenes(canvas.clamp(0, 1)[:, None], boxes, digits.labels[index].view(valid.shape), valid)


def render(glyphs: Tensor, inks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Glyphs (N, G, G) drawn on canvases (N, size, size) so that `inks` lands exactly on `boxes`.

    Both (N, 4) as xyxy, in pixels of glyph and canvas. Scaling and shifting act on rows and columns
    separately, so each is one small matrix of triangle weights, Y · glyph · Xᵀ: any sub-pixel
    position, and no aliasing where a glyph shrinks.
    """
    x = _resampling(inks[:, 0], inks[:, 2], boxes[:, 0], boxes[:, 2], glyphs.shape[2], size)
    y = _resampling(inks[:, 1], inks[:, 3], boxes[:, 1], boxes[:, 3], glyphs.shape[1], size)
    return y @ glyphs @ x.transpose(1, 2)


def _resampling(
    ink_low: Tensor, ink_high: Tensor, low: Tensor, high: Tensor, source: int, size: int
) -> Tensor:
    """Weights (N, size, source) of a glyph's samples in each pixel along one axis."""
    scale = ((ink_high - ink_low) / (high - low))[:, None, None]
    pixels = torch.arange(size, device=low.device) + 0.5
    samples = torch.arange(source, device=low.device) + 0.5
    position = ink_low[:, None, None] + (pixels[:, None] - low[:, None, None]) * scale
    reach = scale.clamp(min=1)
    return (1 - (position - samples).abs() / reach).clamp(min=0) / reach


def _place(inks: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes (B, M, 4) with the ink's aspect that hardly overlap, and which of them exist.

    The largest digit goes first. Later attempts are smaller, so that a crowded scene gets small
    digits instead of none.
    """
    count, places, size, device = *inks.shape[:2], config.image_size, generator.device
    log_low, log_high = math.log(config.min_height), math.log(config.max_height)
    height = uniform((count, places), log_low, log_high, generator).exp()
    height = height.sort(dim=1, descending=True).values
    aspect = (inks[..., 2] - inks[..., 0]) / (inks[..., 3] - inks[..., 1])
    aspect = aspect * uniform((count, places), 0.85, 1.2, generator)
    # Which places are filled is drawn independently of their order, hence of their size.
    wanted = torch.randint(
        config.min_digits, config.max_digits + 1, (count, 1), generator=generator, device=device
    )
    rank = torch.rand((count, places), generator=generator, device=device).argsort(1).argsort(1)
    wanted = rank < wanted

    attempt = torch.arange(ATTEMPTS, device=device)
    boxes = torch.zeros(count, places, 4, device=device)
    valid = torch.zeros(count, places, dtype=torch.bool, device=device)
    for place in range(places):
        h = (height[:, place, None] * SHRINK**attempt).clamp(min=config.min_height)
        extents = torch.stack((h * aspect[:, place, None], h), -1)
        extents = extents * (0.95 * size / extents.amax(-1, keepdim=True)).clamp(max=1)
        corner = torch.rand((count, ATTEMPTS, 2), generator=generator, device=device)
        corner = corner * (size - extents)
        tried = torch.cat((corner, corner + extents), -1)
        clash = _overlap(tried, boxes) * valid[:, None, :]
        free = clash.amax(-1) <= MAX_OVERLAP
        chosen = free.long().argmax(1)  # the first free one
        boxes[:, place] = tried[torch.arange(count, device=device), chosen]
        valid[:, place] = wanted[:, place] & free.any(1)
    return boxes, valid


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over the smaller area, for all pairs of (B, T, 4) and (B, M, 4)."""
    a, b = a[:, :, None], b[:, None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    return shared / torch.minimum(_area(a), _area(b)).clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _background(count: int, size: int, generator: torch.Generator) -> Tensor:
    """A slanted plane of grey in each scene."""
    line = torch.arange(size, device=generator.device) / size - 0.5
    slope_x, slope_y = uniform((2, count, 1, 1), -0.2, 0.2, generator).unbind()
    level = uniform((count, 1, 1), 0.05, 0.35, generator)
    return (level + slope_x * line + slope_y * line[:, None]).clamp(0, 1)


def _paint_clutter(canvas: Tensor, digits: Digits, layers: int, generator: torch.Generator) -> None:
    """Paint shapes that are no digits anywhere on the canvas (B, S, S), in place."""
    count, size = canvas.shape[:2]
    shapes = clutter(digits, count * layers, generator).view(count, layers, GLYPH, GLYPH)
    centre = uniform((count, layers, 2), 0, size, generator)
    half = uniform((count, layers, 2), math.log(5), math.log(size / 4), generator).exp()
    around = torch.cat((centre - half, centre + half), -1)
    whole = torch.tensor([0.0, 0.0, GLYPH, GLYPH], device=canvas.device).expand_as(around)
    _paint(canvas, shapes, whole, around, uniform((count, layers), 0.25, 0.75, generator))


def _paint(canvas: Tensor, glyphs: Tensor, inks: Tensor, boxes: Tensor, tones: Tensor) -> None:
    """Paint glyphs (B, N, G, G) over the canvas (B, S, S) in place, one layer after the other."""
    for layer in range(glyphs.shape[1]):
        ink = render(glyphs[:, layer], inks[:, layer], boxes[:, layer], canvas.shape[-1])
        canvas.lerp_(tones[:, layer, None, None].expand_as(canvas), ink)
