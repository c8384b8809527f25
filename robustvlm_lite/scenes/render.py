"""Drawing: from object attributes to pixels and exact masks, vectorised over the batch.

Nothing here knows about tasks or words.  All work is float32 on a chunk of images that stays in cache; the random
numbers come from the caller's generator, in a fixed order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from robustvlm_lite.scenes.shapes import SHAPE_TABLE

PALETTE = {
    "red": (0.90, 0.08, 0.10),
    "orange": (1.00, 0.52, 0.02),
    "yellow": (0.99, 0.92, 0.12),
    "green": (0.10, 0.66, 0.16),
    "cyan": (0.15, 0.85, 0.92),
    "blue": (0.12, 0.22, 0.92),
    "purple": (0.62, 0.14, 0.76),
    "white": (0.97, 0.97, 0.97),
}
SOLID, STRIPED, DOTTED = range(3)
PAINTED, SKETCH = range(2)
CHUNK = 64
COARSE = 7  # knots per side of the smooth random fields that make the backgrounds
DARK_TONE = 0.42  # the second tone of a texture, as a fraction of the first
RIM_PX = 1.0  # at 64 pixels


@dataclass(frozen=True)
class Objects:
    """A flat list of M objects: which image each is in, what it is, where it lies (fractions of the image side)."""

    image: Tensor  # [M] int64
    shape: Tensor  # [M] int64
    color: Tensor  # [M] int64, -1 in sketches
    texture: Tensor  # [M] int64, -1 in sketches
    center: Tensor  # [M, 2] x right, y down
    radius: Tensor  # [M]
    rotation: Tensor  # [M] radians, counter-clockwise

    def take(self, index: Tensor) -> "Objects":
        return Objects(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def smooth_basis(size: int) -> Tensor:
    """Weights [size, COARSE] of linear interpolation from COARSE knots, one knot on each border."""
    position = torch.linspace(0, COARSE - 1, size)
    return (1 - (position[:, None] - torch.arange(COARSE)).abs()).clamp(min=0)


def draw_background(style: Tensor, size: int, generator: Generator) -> Tensor:
    """Backgrounds [B, 3, size, size]: gradient, soft blobs, two faint lines, grain; pale paper where style is SKETCH.

    Saturation stays low and painted backgrounds stay below white, so none of this can pass for a palette color.
    """
    n, basis = len(style), smooth_basis(size)
    paper = (style == SKETCH).float()
    calm = 1 - 0.7 * paper  # paper has the same clutter, fainter
    level = torch.lerp(uniform((n,), 0.18, 0.50, generator), uniform((n,), 0.84, 0.94, generator), paper)

    knots = torch.linspace(-1, 1, COARSE)
    slope = uniform((n, 2), -0.14, 0.14, generator) * calm[:, None]
    gradient = slope[:, 0, None, None] * knots + slope[:, 1, None, None] * knots[:, None]
    coarse = (
        level[:, None, None] + gradient + uniform((n, COARSE, COARSE), -0.07, 0.07, generator) * calm[:, None, None]
    )
    tint = uniform((n, 3, 1, 1), -0.05, 0.05, generator) + uniform((n, 3, COARSE, COARSE), -0.03, 0.03, generator)
    canvas = basis @ (coarse[:, None] + tint * (1 - 0.5 * paper[:, None, None, None])) @ basis.T

    blobs = basis @ uniform((n, COARSE, COARSE), -6.0, 6.0, generator) @ basis.T
    clutter = blobs.tanh_().mul_((uniform((n,), 0.0, 0.09, generator) * calm)[:, None, None])
    pixel = (torch.arange(size) + 0.5) / size - 0.5
    for _ in range(2):
        angle = uniform((n, 1, 1), 0, math.pi, generator)
        offset, contrast = uniform((n, 1, 1), -0.4, 0.4, generator), uniform((n, 1, 1), -0.12, 0.12, generator)
        distance = angle.cos() * pixel + (angle.sin() * pixel[:, None] - offset)
        line = (1.3 - distance.abs_().mul_(64.0)).clamp_(0, 1)
        clutter.addcmul_(line, contrast * calm[:, None, None])
    grain = torch.rand((n, size, size), generator=generator).sub_(0.5)
    clutter.addcmul_(grain, (uniform((n,), 0.0, 0.14, generator) * calm)[:, None, None])
    return canvas.add_(clutter[:, None])


def object_frame(objects: Objects, size: int) -> tuple[Tensor, Tensor]:
    """Pixel centers in each object's own frame: u, v [M, size, size], in radii, v up, rotation undone."""
    pixel = (torch.arange(size) + 0.5) / size
    dx = (pixel - objects.center[:, :1]) / objects.radius[:, None]
    dy = (objects.center[:, 1:] - pixel) / objects.radius[:, None]
    cos, sin = objects.rotation.cos()[:, None], objects.rotation.sin()[:, None]
    u = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]
    v = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]
    return u, v


def signed_distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Distance [M, H, W] to each object's outline, in radii; every implicit function sees only its own objects."""
    distance = torch.empty_like(u)
    for index, (function, _) in enumerate(SHAPE_TABLE.values()):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            distance[rows] = function(u[rows], v[rows])
    return distance


def shade(objects: Objects, u: Tensor, v: Tensor, distance_px: Tensor, size: int, generator: Generator) -> Tensor:
    """Brightness factor [M, H, W]: 1 on the first tone of the texture, DARK_TONE on the second.

    A rim in the first tone is left along the outline: without it a dark stripe bites into the shape on dark ground.
    """
    n, radius_px = len(objects.image), objects.radius * size
    # Stripes run across the long axis (within 45 degrees), else a thin bar could fall into one stripe.
    angle, phase = uniform((n,), -math.pi / 4, math.pi / 4, generator), torch.rand((n, 2), generator=generator)
    period_px = (radius_px * uniform((n,), 0.36, 0.46, generator)).clamp(min=5.0 * size / 64)
    scale = radius_px / period_px
    brightness = torch.ones_like(u)
    for texture in (STRIPED, DOTTED):
        rows = (objects.texture == texture).nonzero()[:, 0]
        if not len(rows):
            continue
        cos, sin = (angle.cos() * scale)[rows, None, None], (angle.sin() * scale)[rows, None, None]
        a = cos * u[rows] + (sin * v[rows] + phase[rows, 0, None, None])
        a = a.sub_(a.round()).abs_()  # distance to the nearest stripe or column of dots, in periods
        if texture == DOTTED:
            b = cos * v[rows] - (sin * u[rows] - phase[rows, 1, None, None])
            a = torch.hypot(a, b.sub_(b.round()))
        half_width = 0.25 if texture == STRIPED else 0.34
        dark = (half_width - a) * period_px[rows, None, None]
        dark = torch.minimum(dark, -distance_px[rows] - RIM_PX * size / 64).add_(0.5).clamp_(0, 1)
        brightness[rows] = 1 - (1 - DARK_TONE) * dark
    return brightness


def draw_chunk(style: Tensor, objects: Objects, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, size, size] and masks bool [B, size, size]; ``objects.image`` counts from 0 to B - 1."""
    canvas = draw_background(style, size, generator)
    masks = torch.zeros((len(style), size, size), dtype=torch.bool)
    u, v = object_frame(objects, size)
    distance = signed_distance(objects.shape, u, v)
    inside = distance < 0
    distance *= (objects.radius * size)[:, None, None]
    brightness = shade(objects, u, v, distance, size, generator)

    n = len(objects.image)
    palette = torch.tensor(list(PALETTE.values()))
    sketched = (style[objects.image] == SKETCH).nonzero()[:, 0]
    rgb = (palette[objects.color] * uniform((n, 1), 0.94, 1.0, generator)) + uniform((n, 3), -0.02, 0.02, generator)
    stroke_px = uniform((n, 1, 1), 0.7, 1.1, generator) * size / 64  # half the width of a pencil line
    rgb[sketched] = uniform((n, 1), 0.08, 0.25, generator)[sketched].expand(-1, 3)
    distance[sketched] = distance[sketched].abs() - stroke_px[sketched]
    coverage = (0.5 - distance).clamp_(0, 1)

    # Objects of one image are painted one after the other: the k-th object of every image that has k objects at once.
    first = torch.searchsorted(objects.image, torch.arange(len(style)))
    rank = torch.arange(n) - first[objects.image]
    for k in range(int(rank.max()) + 1):
        rows = (rank == k).nonzero()[:, 0]
        where = objects.image[rows]
        paint = rgb[rows, :, None, None] * brightness[rows, None]
        canvas[where] = torch.lerp(canvas[where], paint, coverage[rows, None])
        masks[where] |= inside[rows]
    return canvas.clamp_(0, 1).mul_(255).round_().to(torch.uint8), masks


def draw(style: Tensor, objects: Objects, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw N images, CHUNK at a time.

    style: [N] int64 (PAINTED or SKETCH).  objects: sorted by ``image``; every image has at least one.
    Returns images uint8 [N, 3, size, size] and masks bool [N, size, size], the union of each image's objects.
    """
    images = torch.empty((len(style), 3, size, size), dtype=torch.uint8)
    masks = torch.empty((len(style), size, size), dtype=torch.bool)
    for start in range(0, len(style), CHUNK):
        stop = min(start + CHUNK, len(style))
        chosen = objects.take(((objects.image >= start) & (objects.image < stop)).nonzero()[:, 0])
        chosen.image.sub_(start)
        images[start:stop], masks[start:stop] = draw_chunk(style[start:stop], chosen, size, generator)
    return images, masks
