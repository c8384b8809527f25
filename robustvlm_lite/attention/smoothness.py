"""How restless a map is: total variation, by which A-TPT weighs its views."""

from torch import Tensor

from ..runtime import UserError, near_miss
from .scaling import minmax, upsample

SCALES = ("minmax_grid", "minmax_full", "l1_grid")


def total_variation(maps: Tensor, scale: str = "minmax_grid", side: int = 224) -> Tensor:
    """Anisotropic total variation [...] of maps [..., N]: sum of |differences| between neighbors, both ways.

    The paper gives no scale, and the scale decides what softmax(-TV) does. "minmax_grid": stretched to [0, 1] on the
    grid (weights nearly one-hot); "minmax_full": then enlarged to side x side (one-hot); "l1_grid": sum 1 on the grid
    (weights nearly uniform). Values grow with the grid: temperatures do not carry over to another backbone.
    """
    if scale not in SCALES:
        raise UserError(f"unknown scale of total variation {scale!r}; {near_miss(scale, SCALES)}")
    if scale == "l1_grid":
        maps = maps / maps.sum(dim=-1, keepdim=True).clamp_min(1e-8)
    else:
        maps = minmax(maps, 1e-8)
    grid = round(maps.shape[-1] ** 0.5)
    m = upsample(maps, side) if scale == "minmax_full" else maps.unflatten(-1, (grid, grid))
    return m.diff(dim=-2).abs().sum((-2, -1)) + m.diff(dim=-1).abs().sum((-2, -1))
