"""Base views: copies of an image that are mirrored, or cropped and mirrored, from random numbers of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import UserError, near_miss
from ..threat import check_images
from .geometry import resized_crops
from .levels import to_levels

KINDS = ("flip_center", "rrc_flip")
AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of torchvision's RandomResizedCrop


def base_views(x: Tensor, generators: Sequence[torch.Generator], n: int = 63, kind: str = "flip_center") -> Tensor:
    """n views of each image of x [I, 3, S, S], without the image itself; [I, n, 3, S, S] on the 8-bit grid.

    generators: one an image, so that the views depend neither on the batch nor on the order. kind: "flip_center" mirrors
    half of the views (A-TPT, paper; images come cut to their center, so there are two views in all); "rrc_flip" draws a
    resized crop before it (released).
    """
    check_images(x)
    if kind not in KINDS:
        raise UserError(f"unknown base view {kind!r}; {near_miss(kind, KINDS)}")
    if x.shape[-1] != x.shape[-2]:
        raise UserError(f"expected square images, got {x.shape[-2]}x{x.shape[-1]}; cut them to their center")
    if n < 1:
        raise UserError(f"expected at least 1 view besides the image itself, got {n}; A-TPT draws 63")
    boxes, mirror = (torch.stack(t).to(x.device) for t in zip(*(
        _draw(g, n, x.shape[-1], kind) for g in one_each(generators, x)
    ), strict=True))  # fmt: skip
    return (resized_crops(to_levels(x), boxes, mirror) / 255).to(x.dtype)


def with_anchor(x: Tensor, views: Tensor) -> Tensor:
    """The images [I, 3, S, S] themselves as view 0 before their views [I, n, 3, S, S]."""
    return torch.cat([x[:, None], views], dim=1)


def one_each(generators: Sequence[torch.Generator], x: Tensor) -> Sequence[torch.Generator]:
    """The generators, if there is one for each image."""
    if isinstance(generators, torch.Generator) or len(generators) != len(x):
        got = "a single one" if isinstance(generators, torch.Generator) else len(generators)
        raise UserError(f"expected one generator per image, got {got} for {len(x)} images; pass a list")
    return generators


def _draw(g: torch.Generator, n: int, side: int, kind: str) -> tuple[Tensor, Tensor]:
    """Boxes [n, 4] (top, left, height, width) and which views are mirrored [n]."""
    mirror = torch.rand(n, generator=g) < 0.5
    if kind == "flip_center":
        return torch.tensor([0, 0, side, side]).expand(n, -1), mirror
    area = side**2 * torch.empty(n, ATTEMPTS).uniform_(*AREA, generator=g)
    ratio = torch.empty(n, ATTEMPTS).uniform_(*map(math.log, RATIO), generator=g).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= side) & (height <= side)
    first = fits.byte().argmax(dim=1, keepdim=True)
    size = torch.cat([height.gather(1, first), width.gather(1, first)], dim=1)
    size = torch.where(fits.any(dim=1, keepdim=True), size, side)  # ten misses: the whole image
    corner = (torch.rand(n, 2, generator=g) * (side - size + 1)).floor()
    return torch.cat([corner, size], dim=1).long(), mirror
