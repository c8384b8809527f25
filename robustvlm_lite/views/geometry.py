"""Geometry as Pillow does it on 8-bit images: affine maps and resized crops, each one `grid_sample`.

Pillow reads a pixel at its center, (x + 1/2, y + 1/2), repeats the edge within half a pixel of it and paints black beyond.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import straight_through

LIFT = 0.01  # levels; float32 may leave an interpolated value just below the whole level that it stands for


def affine(levels: Tensor, matrix: Tensor) -> Tensor:
    """Image.transform(AFFINE, BILINEAR) of levels [M, 3, H, W]; matrix [M, 2, 3] leads from new pixels to old ones.

    Pillow cuts the interpolated value off to a whole level, it does not round.
    """
    height, width = levels.shape[-2:]
    x, y = _centers(width, levels), _centers(height, levels)[:, None]
    old_x, old_y = (a * x + b * y + c for a, b, c in (row.T[..., None, None] for row in matrix.unbind(1)))  # [M, H, W]
    inside = (old_x >= 0) & (old_x < width) & (old_y >= 0) & (old_y < height)
    value = _read(levels, old_x, old_y) * inside[:, None]
    return straight_through(value, (value + LIFT).floor())


def resized_crops(levels: Tensor, boxes: Tensor, mirror: Tensor) -> Tensor:
    """n crops of each image in levels [I, 3, H, W], enlarged to its size and mirrored where asked, [I, n, 3, H, W].

    boxes [I, n, 4]: top, left, height, width in whole pixels; mirror [I, n] bool. Bilinear, as Pillow enlarges a crop:
    nothing outside of the box is read.
    """
    height, width = levels.shape[-2:]
    top, left, tall, wide = boxes.to(levels.dtype)[..., None].unbind(2)  # [I, n, 1] each
    x = _centers(width, levels) / width
    x = left + wide * torch.where(mirror[..., None], 1 - x, x)  # [I, n, W]
    y = top + tall * (_centers(height, levels) / height)
    x, y = x.clamp(left + 0.5, left + wide - 0.5), y.clamp(top + 0.5, top + tall - 0.5)
    x, y = torch.broadcast_tensors(x[:, :, None], y[..., None])  # [I, n, H, W]
    value = _read(levels, x.flatten(1, 2), y.flatten(1, 2)).unflatten(2, (-1, height)).transpose(1, 2)
    return straight_through(value, value.round())


def _centers(n: int, like: Tensor) -> Tensor:
    """Centers of n pixels in a row."""
    return torch.arange(n, dtype=like.dtype, device=like.device) + 0.5


def _read(levels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Levels [M, 3, H, W] interpolated at the points (x, y), each [M, h, w], the edge repeated; [M, 3, h, w]."""
    height, width = levels.shape[-2:]
    points = torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=-1)
    return F.grid_sample(levels, points, mode="bilinear", padding_mode="border", align_corners=False)
