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
    points = _centers(height, width, levels) @ matrix[:, None, :, :2].mT + matrix[:, None, None, :, 2]  # [M, H, W, 2]
    size = torch.tensor([width, height], dtype=levels.dtype, device=levels.device)
    inside = ((points >= 0) & (points < size)).all(dim=-1)[:, None]
    value = _read(levels, points) * inside
    return straight_through(value, (value + LIFT).floor())


def resized_crops(levels: Tensor, boxes: Tensor, mirror: Tensor) -> Tensor:
    """n crops of each image in levels [I, 3, H, W], enlarged to its size and mirrored where asked, [I, n, 3, H, W].

    boxes [I, n, 4]: top, left, height, width in whole pixels; mirror [I, n] bool. Bilinear, as Pillow enlarges a crop:
    nothing outside of the box is read.
    """
    height, width = levels.shape[-2:]
    boxes = boxes.to(levels.dtype)[:, :, None, None]  # [I, n, 1, 1, 4]
    start, extent = boxes[..., [1, 0]], boxes[..., [3, 2]]  # x before y
    share = _centers(height, width, levels) / torch.tensor([width, height], dtype=levels.dtype, device=levels.device)
    share = torch.where(mirror[:, :, None, None, None], share * share.new_tensor([-1, 1]) + share.new_tensor([1, 0]), share)
    points = (start + extent * share).clamp(start + 0.5, start + extent - 0.5)  # [I, n, H, W, 2]
    value = _read(levels, points.flatten(1, 2)).unflatten(2, (-1, height)).transpose(1, 2)
    return straight_through(value, value.round())


def _centers(height: int, width: int, like: Tensor) -> Tensor:
    """Centers (x, y) of the pixels, [H, W, 2]."""
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5 for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)


def _read(levels: Tensor, points: Tensor) -> Tensor:
    """Levels [M, 3, H, W] interpolated at the points (x, y) [M, h, w, 2], the edge repeated; [M, 3, h, w]."""
    size = torch.tensor([levels.shape[-1], levels.shape[-2]], dtype=levels.dtype, device=levels.device)
    return F.grid_sample(levels, 2 * points / size - 1, mode="bilinear", padding_mode="border", align_corners=False)
