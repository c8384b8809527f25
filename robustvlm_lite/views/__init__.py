"""Views of an image at test time: how they are made, mixed under attention, chosen and weighed.

Batches of images have views as their second axis, [I, V, 3, S, S], in [0, 1]. Views are computed on 8-bit levels, as
Pillow would, and gradients flow through every step. Random numbers come from one generator an image
(`runtime.generator(seed, dataset, index)`), always drawn in the same order: `base_views`, then `augmix`.

What A-TPT and R-TPT are built from (`hai2026atpt` and `sheng2025rtpt` in book/references.bib).
"""

from .augmix import AugMix, augmix
from .base import KINDS, base_views, with_anchor
from .entropy import entropy, lowest_entropy, marginal_entropy
from .levels import straight_through, truncated
from .mean_shift import mean_shift
from .mixing import guided_mix, protected
from .operations import OPERATIONS, amount
from .weights import effective_views, neighbor_weights, tv_weights

__all__ = [
    "KINDS",
    "OPERATIONS",
    "AugMix",
    "amount",
    "augmix",
    "base_views",
    "effective_views",
    "entropy",
    "guided_mix",
    "lowest_entropy",
    "marginal_entropy",
    "mean_shift",
    "neighbor_weights",
    "protected",
    "straight_through",
    "truncated",
    "tv_weights",
    "with_anchor",
]
