"""Attention-guided mixing (A-TPT): pixels that the image was recognized by keep more of the base view."""

import math

from torch import Tensor

from ..attention import is_flat
from ..runtime import UserError


def protected(pictures: Tensor, r: float = 0.2, *, quirk_quantile: bool = False) -> Tensor:
    """Mask [..., H, W] (bool) of the highest ceil(r H W) pixels of each attention map; among equals the first.

    A flat map, in which no token added to the logit, protects nothing. quirk_quantile: pixels strictly above the 1 - r
    quantile instead, as released, which protects fewer where values tie.
    """
    if not 0 < r < 1:
        raise UserError(f"r: expected a share of pixels between 0 and 1, got {r!r}; A-TPT's code uses 0.2")
    flat = pictures.flatten(-2)
    if quirk_quantile:
        return (flat > _quantile(flat, 1 - r)).view(pictures.shape)
    count = math.ceil(r * flat.shape[-1])
    least = flat.kthvalue(flat.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, level = flat > least, flat == least
    fill = level & (level.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True))
    return ((above | fill) & ~is_flat(flat)[..., None]).view(pictures.shape)


def guided_mix(base: Tensor, mix: Tensor, mask: Tensor, lam_high: float = 0.2, lam_low: float = 0.8) -> Tensor:
    """(1 - λ) base + λ mix, with λ = lam_high where the mask protects and lam_low elsewhere. [..., 3, H, W].

    base, mix [..., 3, H, W]; mask [..., H, W]. The released code names shares of the base: its m_high 0.8 is
    lam_high 0.2 here.
    """
    if not 0 <= lam_high <= lam_low <= 1:
        got = f"lam_high {lam_high!r} and lam_low {lam_low!r}"
        raise UserError(f"expected 0 <= lam_high <= lam_low <= 1 (protected pixels are mixed less), got {got}; swap them")
    lam = (lam_low - (lam_low - lam_high) * mask.to(base.dtype)).unsqueeze(-3)
    return (1 - lam) * base + lam * mix


def _quantile(flat: Tensor, q: float) -> Tensor:
    """torch.quantile over the last axis (kept), without its limit of 16 million values."""
    place = q * (flat.shape[-1] - 1)
    low = flat.kthvalue(math.floor(place) + 1, dim=-1, keepdim=True).values
    high = flat.kthvalue(math.ceil(place) + 1, dim=-1, keepdim=True).values
    return low.lerp(high, place - math.floor(place))
