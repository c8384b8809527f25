"""Does a map show what the decision rests on? Patches are deleted, or inserted, in the map's order and the model is asked.

Deletion and insertion after RISE (Petsiuk et al., 2018), on the patches of the tower: a faithful map makes the probability
of its class fall fast when its highest patches go first, and rise fast when they come first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime import UserError

WAYS = ("deletion", "insertion")


@torch.no_grad()
def patch_curve(
    model: Callable[[Tensor], Tensor], x: Tensor, classes: Tensor, maps: Tensor, way: str = "deletion", n_steps: int = 8
) -> Tensor:
    """Probability [B, n_steps + 1] of the classes [B] as patches change in the order of maps [B, N], highest first.

    model: pixels to logits. "deletion" begins with x [B, 3, H, W] and ends without any patch, "insertion" the other way
    round. A patch that is not there has the image's mean color.
    """
    grid = round(maps.shape[1] ** 0.5)
    if way not in WAYS or grid * grid != maps.shape[1] or x.shape[-1] % grid:
        raise UserError(
            f"expected 'deletion' or 'insertion' and maps of a square grid that divides {x.shape[-1]} pixels, got {way!r} and "
            f"{list(maps.shape)}; take the maps of this tower"
        )
    blank = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    rank = maps.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is changed first
    curve = []
    for step in range(n_steps + 1):
        changed = rank < round(maps.shape[1] * step / n_steps)
        mask = changed.view(-1, 1, grid, grid).repeat_interleave(x.shape[-1] // grid, 2).repeat_interleave(x.shape[-1] // grid, 3)
        shown = torch.where(mask, blank, x) if way == "deletion" else torch.where(mask, x, blank)
        curve.append(model(shown).softmax(dim=1).gather(1, classes[:, None])[:, 0])
    return torch.stack(curve, dim=1)


def area(curve: Tensor) -> Tensor:
    """Area under curves [B, S + 1] over [0, 1], by trapezoids, [B]."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(dim=1)
