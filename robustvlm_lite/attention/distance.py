"""Distances between maps, measured on the enlarged maps without enlarging them."""

from functools import lru_cache

import torch
from torch import Tensor

from ..runtime import UserError, near_miss
from .scaling import upsampling

METRICS = ("l2", "l2_sq", "l1", "cosine")


@lru_cache
def gram(grid: int, side: int = 224) -> Tensor:
    """G = U^T U [N, N], so that |U d|_2 = sqrt(d^T G d): distances of upsampled maps without upsampling."""
    u = upsampling(grid, side).double()
    return (u.T @ u).float()


def map_distance(a: Tensor, b: Tensor, metric: str = "l2", side: int = 224) -> Tensor:
    """Distance [B] between maps a, b [B, N], measured on maps upsampled to side x side as in the paper.

    "l2": unsquared Euclidean norm over pixels (the paper's); "l2_sq": its square; "l1": mean absolute difference;
    "cosine": one minus the cosine over pixels. Their scales differ by orders of magnitude; see the chapter.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; {near_miss(metric, METRICS)}")
    grid = round(a.shape[1] ** 0.5)
    g = gram(grid, side).to(a.device)
    if metric == "l1":
        return ((a - b) @ upsampling(grid, side).to(a.device).T).abs().mean(dim=1)
    if metric == "cosine":
        ab, aa, bb = ((p @ g * q).sum(1) for p, q in ((a, b), (a, a), (b, b)))
        return 1 - ab / (aa * bb).clamp_min(1e-12).sqrt()
    squared = ((a - b) @ g * (a - b)).sum(1)
    if metric == "l2_sq":
        return squared
    # Where the maps agree (always at the first step) the root has no slope; its gradient is defined as zero, not NaN.
    safe = torch.where(squared > 1e-12, squared, torch.ones_like(squared))
    return torch.where(squared > 1e-12, safe.sqrt(), torch.zeros_like(squared))
