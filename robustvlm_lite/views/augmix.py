"""AugMix (Hendrycks et al. 2020) on the device: three chains of one to three operations, mixed with random weights.

Settings of TPT, R-TPT and A-TPT: severity 1, weights from Dirichlet(1, 1, 1), blending with the image from Beta(1, 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import one_each
from .levels import to_levels
from .operations import OPERATIONS, amount

CHAINS, DEPTH, WEAKEST = 3, 3, 0.1


class AugMix(NamedTuple):
    """mix [I, n, 3, S, S] in [0, 1]: the weighted sum of the chains alone; blend [I, n]: the share that the base keeps."""

    mix: Tensor
    blend: Tensor

    def blended(self, base: Tensor) -> Tensor:
        """The views of TPT and R-TPT, [I, n, 3, S, S]: `blend` of the base, the rest of the chains."""
        share = self.blend[..., None, None, None].to(base.dtype)
        return share * base + (1 - share) * self.mix


class _Chains(NamedTuple):
    """Random numbers of n views, on the CPU."""

    operation: Tensor  # [n, 3 chains, 3 steps], an index of OPERATIONS, -1 after the chain's end
    strength: Tensor  # [n, 3, 3]
    sign: Tensor  # [n, 3, 3]
    weight: Tensor  # [n, 3], sum 1
    blend: Tensor  # [n]


def augmix(base: Tensor, generators: Sequence[torch.Generator]) -> AugMix:
    """AugMix of base views [I, n, 3, S, S] in [0, 1], n draws from each image's own generator.

    Images are whole 8-bit levels between operations, the mixture is not rounded. The work takes about four times the
    memory of `base`.
    """
    views = [_draw(g, base.shape[1]) for g in one_each(generators, base)]
    draw = _Chains(*(torch.cat(t) for t in zip(*views, strict=True)))
    levels, mix = to_levels(base.flatten(0, 1)), 0
    for c in range(CHAINS):
        chain = levels
        for step in range(DEPTH):
            chain = _step(chain, draw.operation[:, c, step], draw.strength[:, c, step], draw.sign[:, c, step])
        mix = mix + draw.weight[:, c, None, None, None].to(chain) * chain
    blend = draw.blend.to(base.device).view(base.shape[:2])
    return AugMix((mix / 255).view(base.shape).to(base.dtype), blend)


def _step(levels: Tensor, operation: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Each image of [M, 3, S, S] through its own operation; all images of one operation at once."""
    out = levels.clone()
    for k, (name, function) in enumerate(OPERATIONS.items()):
        rows = (operation == k).nonzero()[:, 0]
        if len(rows):
            much = amount(name, strength[rows], sign[rows], levels.shape[-1]).to(levels.device)
            rows = rows.to(levels.device)
            out[rows] = function(levels[rows], much)
    return out


def _draw(g: torch.Generator, n: int) -> _Chains:
    length = torch.randint(1, DEPTH + 1, (n, CHAINS, 1), generator=g)
    operation = torch.randint(len(OPERATIONS), (n, CHAINS, DEPTH), generator=g)
    strength = torch.empty(n, CHAINS, DEPTH).uniform_(WEAKEST, 1, generator=g)
    sign = 2.0 * torch.randint(2, (n, CHAINS, DEPTH), generator=g) - 1
    weight = torch.empty(n, CHAINS).exponential_(generator=g)  # shares of exponentials are Dirichlet(1, 1, 1)
    blend = torch.rand(n, generator=g)  # Beta(1, 1)
    operation = operation.where(torch.arange(DEPTH) < length, -1)
    return _Chains(operation, strength, sign, weight / weight.sum(dim=1, keepdim=True), blend)
