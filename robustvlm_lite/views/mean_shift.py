"""MTA: the densest place among the features of an image's views, found by mean shift with a weight on each view."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST = 0.3  # share of the other views by which a view's bandwidth is measured
LAMBDA_Q, LAMBDA_Y = 4.0, 0.2
ROUNDS, INNER, TOLERANCE = 5, 5, 1e-6


def mean_shift(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mode [I, D], unit; inlierness [I, V], sum 1) of views with unit features [I, V, D] and logits [I, V, C].

    MTA (Zanella and Ben Ayed 2024), without training. Views that predict alike pull each other's inlierness up; the mode
    starts at view 0, the image itself. The fixed points are unrolled, so gradients pass through them; an image whose
    values have settled stands still while others go on, so that the batch does not matter.
    """
    n = features.shape[1]
    nearest = max(1, int(NEAREST * (n - 1)))
    distance = torch.cdist(features, features).square()
    apart = distance.diagonal_scatter(distance.new_full(distance.shape[:-1], torch.inf), dim1=-2, dim2=-1)
    bandwidth = apart.topk(nearest, dim=-1, largest=False).values.mean(dim=-1) / 2  # h^2, [I, V]
    bandwidth = bandwidth.clamp_min(1e-12)
    p = logits.softmax(dim=-1)
    affinity = p @ p.mT
    y, mode = features.new_full(features.shape[:2], 1 / n), features[:, 0]

    def kernel(m: Tensor) -> Tensor:
        return (-(features - m[:, None]).square().sum(dim=-1) / (2 * bandwidth)).exp()

    def inliers(y: Tensor) -> Tensor:
        return ((kernel(mode) + LAMBDA_Q * (affinity @ y[..., None])[..., 0]) / LAMBDA_Y).softmax(dim=-1)

    def shifted(m: Tensor) -> Tensor:
        weight = kernel(m) * y
        return F.normalize((weight[..., None] * features).sum(dim=1), dim=-1)

    for _ in range(ROUNDS):
        y = _settle(inliers, y)
        mode = _settle(shifted, mode)
    return mode, y


def _settle(update, value: Tensor) -> Tensor:
    """Up to INNER updates of [I, ...]; an image stops once it moves by less than the tolerance."""
    moving = torch.ones(len(value), dtype=torch.bool, device=value.device)
    for _ in range(INNER):
        new = update(value)
        settled = (new - value).flatten(1).norm(dim=1) < TOLERANCE
        value = torch.where(moving[:, None], new, value)
        moving = moving & ~settled
    return value
