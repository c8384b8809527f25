"""The views of a recipe: made, mixed under attention, and weighed by how calm their maps are."""

import torch
from torch import Tensor

from .. import attention, views
from ..clip import ZeroShotCLIP
from .recipe import CONTROLS, Evidence, Passes, Recipe


def make_views(
    clip: ZeroShotCLIP, recipe: Recipe, x: Tensor, generators: list[torch.Generator], text: Tensor, passes: Passes
) -> Evidence:
    """All views of images x [I, 3, S, S], the images first, with base and mask where they are mixed under attention.

    generators: one an image; base views draw first, then AugMix, then a random mask. text [C, D]: what attention reads.
    """
    if recipe.n_views == 1:
        return Evidence(x[:, None])
    base = views.base_views(x, generators, recipe.n_views - 1, recipe.base)
    if recipe.mixing == "none":
        return Evidence(views.with_anchor(x, base), base)
    drawn = views.augmix(base, generators)
    if recipe.mixing == "augmix":
        return Evidence(views.with_anchor(x, drawn.blended(base)), base)
    if recipe.guide == "uniform":  # the mean strength everywhere
        lam = recipe.r * recipe.lam_high + (1 - recipe.r) * recipe.lam_low
        mask = torch.zeros_like(base[:, :, 0], dtype=torch.bool)
        mixed = views.guided_mix(base, drawn.mix, mask, lam, lam)
    else:
        mask = _mask(clip, recipe, base.detach(), generators, text, passes)
        mixed = views.guided_mix(base, drawn.mix, mask, recipe.lam_high, recipe.lam_low)
    return Evidence(views.with_anchor(x, mixed), base, mask)


def _mask(clip, recipe: Recipe, base: Tensor, generators: list[torch.Generator], text: Tensor, passes: Passes) -> Tensor:
    """Which pixels of each base view are protected, [I, n, S, S] bool."""
    if recipe.guide == "random":
        cells = clip.grid**2
        maps = torch.stack([torch.rand(base.shape[1], cells, generator=g) for g in generators]).to(base)
        return views.protected(attention.guide_pixels(clip, maps), recipe.r)
    form = "paper" if recipe.guide in CONTROLS else recipe.guide
    if recipe.base == "flip_center":  # all bases are one of two pictures
        first, flipped = base[:, 0], (base != base[:, :1]).flatten(2).any(dim=2)
        both = torch.stack([first, first.flip(-1)], dim=1)
        pictures = attention.guide_pixels(clip, attention.guide(clip, both, text, form), form)
        pictures = torch.where(flipped[:, :, None, None], pictures[:, 1:], pictures[:, :1])
        seen = both
    else:
        pictures = attention.guide_pixels(clip, attention.guide(clip, base, text, form), form)
        seen = base
    passes.image_forwards += seen.shape[0] * seen.shape[1]
    passes.image_backwards += seen.shape[0] * seen.shape[1]
    if recipe.guide == "inverted":
        return views.protected(-pictures, recipe.r)
    return views.protected(pictures, recipe.r, quirk_quantile=recipe.quirk_quantile)


def calm_weights(clip: ZeroShotCLIP, recipe: Recipe, seen: Evidence, text: Tensor, passes: Passes) -> Tensor:
    """softmax(-TV / temperature) over the chosen views, 0 for the others, [I, V]; constants to a gradient."""
    form = "paper" if recipe.guide in CONTROLS else recipe.guide
    near = seen.views.detach().take_along_dim(seen.chosen[:, :, None, None, None], dim=1)
    maps = attention.guide(clip, near, text, form)
    passes.image_forwards += near.shape[0] * near.shape[1]
    passes.image_backwards += near.shape[0] * near.shape[1]
    weights = views.tv_weights(
        attention.total_variation(maps, recipe.tv_scale, clip.image_size), recipe.tv_temperature
    )
    return torch.zeros_like(seen.first[..., 0]).scatter(1, seen.chosen, weights.to(seen.first.dtype))
