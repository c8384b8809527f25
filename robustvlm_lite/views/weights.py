"""How much each view counts in the final prediction."""

from torch import Tensor

from ..runtime import UserError


def neighbor_weights(
    features: Tensor, n_neighbors: int = 20, temperature: float = 0.01, *, quirk_self: bool = False
) -> Tensor:
    """softmax(mean cosine to the nearest other views / temperature), [I, V] (R-TPT; released A-TPT).

    features [I, V, D], unit. quirk_self: a view is kept from counting as its own neighbor by `cosine >= 1`, as released,
    which rounding decides; otherwise by its index.
    """
    n = features.shape[-2]
    if not 1 <= n_neighbors < n:
        raise UserError(f"expected 1 to {n - 1} neighbors among {n} views, got {n_neighbors}; draw more views")
    cosines = features @ features.mT
    if quirk_self:
        cosines = cosines.masked_fill(cosines >= 1, -float("inf"))
    else:
        cosines = cosines.diagonal_scatter(cosines.new_full(cosines.shape[:-1], -float("inf")), dim1=-2, dim2=-1)
    return (cosines.topk(n_neighbors, dim=-1).values.mean(dim=-1) / temperature).softmax(dim=-1)


def tv_weights(variation: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(-TV / temperature) over the views, [I, V]: calm maps count more (A-TPT, paper)."""
    return (-variation / temperature).softmax(dim=-1)


def effective_views(weights: Tensor) -> Tensor:
    """1 / sum of squares of weights [I, V] of sum 1: how many views really take part, 1 to V. [I]."""
    return 1 / weights.square().sum(dim=-1)
