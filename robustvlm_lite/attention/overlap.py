"""How well a map covers an object, and the references that any map has to beat."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scaling import minmax, upsample


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [...] of masks [..., H, W] (bool); 0 where both are empty."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)


def map_iou(m: Tensor, masks: Tensor) -> Tensor:
    """Overlap [B] of a map [B, N] with object masks [B, H, W] (bool): the map's highest pixels, as many as the mask has."""
    pixels = upsample(m, masks.shape[-1]).flatten(1)
    rank = pixels.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # among equals the first
    chosen = rank < masks.sum((1, 2))[:, None]
    return iou(chosen.view(masks.shape), masks)


def center_prior(grid: int, n: int = 1) -> Tensor:
    """A map [n, N] that looks at nothing but the middle: what any map has to beat."""
    axis = torch.linspace(-1, 1, grid)
    return minmax(-(axis[:, None] ** 2 + axis[None] ** 2).flatten().expand(n, -1))


def random_map(grid: int, n: int, generator: torch.Generator) -> Tensor:
    """Maps [n, N] that know nothing, a fresh draw for each image."""
    return torch.rand(n, grid * grid, generator=generator)


def mask_map(masks: Tensor, grid: int) -> Tensor:
    """Object masks [B, H, W] averaged over the patches, [B, N]: about what a map of this grid can reach at best."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)
