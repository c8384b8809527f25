"""A map's range and size: stretched to [0, 1], enlarged to the pixels of an image."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def minmax(m: Tensor, eps: float = 1e-6) -> Tensor:
    """Each map of m [..., N] stretched to [0, 1]; a constant map becomes 0, not NaN."""
    low, high = m.amin(dim=-1, keepdim=True), m.amax(dim=-1, keepdim=True)
    return (m - low) / (high - low).clamp_min(eps)


def clip_top(m: Tensor, share: float = 0.99) -> Tensor:
    """Maps [..., N] cut off at their own quantile, so that one outlier does not set the scale (A-TPT, released)."""
    return m.minimum(m.quantile(share, dim=-1, keepdim=True))


def is_flat(m: Tensor) -> Tensor:
    """Which maps of m [..., N] are constant and so say nothing; bool [...]."""
    return m.amax(dim=-1) == m.amin(dim=-1)


@lru_cache
def upsampling(grid: int, side: int) -> Tensor:
    """U [side^2, grid^2]: bilinear upsampling (align_corners=False) of a grid x grid map, as the matrix that it is."""
    return upsample(torch.eye(grid * grid), side).flatten(1).T.contiguous()


def upsample(m: Tensor, side: int) -> Tensor:
    """Maps [..., N] as pictures [..., side, side], bilinear (align_corners=False)."""
    grid = round(m.shape[-1] ** 0.5)
    pictures = F.interpolate(m.reshape(-1, 1, grid, grid), size=(side, side), mode="bilinear", align_corners=False)
    return pictures.view(*m.shape[:-1], side, side)
