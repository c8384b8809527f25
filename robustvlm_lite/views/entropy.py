"""Entropy of predictions over views: which views are sure, and how one prediction for all would be."""

import math

from torch import Tensor

from ..runtime import UserError


def entropy(logits: Tensor) -> Tensor:
    """Entropy [...] of softmax(logits [..., C]) in nats."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy [...] of the mean prediction over views, logits [..., V, C]; the mean of `entropy` plus how views differ."""
    log_p = logits.log_softmax(dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
    return -(log_p.exp() * log_p).sum(dim=-1)


def lowest_entropy(logits: Tensor, keep: int) -> Tensor:
    """Indices [I, keep] of the surest views of each image, surest first; logits [I, V, C].

    View 0, the image itself, competes like any other. TPT and its heirs keep 6 of 64.
    """
    n = logits.shape[-2]
    if not 1 <= keep <= n:
        raise UserError(f"expected to keep 1 to {n} of {n} views, got {keep}; draw more views or keep fewer")
    return entropy(logits).topk(keep, dim=-1, largest=False).indices
