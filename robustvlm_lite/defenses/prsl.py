"""PRSL: cross-entropy and a penalty on the strongest competitors of each target token (arXiv 2402.03627).

The paper's text could not be obtained beyond its abstract, and its released loss is not what the abstract's words say. So all
readings of the specification (section 1.3) are here: R1 is the released one, R3 and R6 are what the words would mean.

Logits z [B, T, V] and labels [B, T], which are IGNORED where nothing is predicted. For a position with target t, its
competitors are its logits without z_t, in descending order; the window [start, end) of their ranks is S, K = end - start,
mu the mean of z over S, N the number of positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..captioner import IGNORED, cross_entropy
from ..runtime import UserError, near_miss

READINGS = {
    "token_axis": "R1, released: -Σ_i ln softmax over positions (mu)_i",
    "token_axis_mean": "R2: R1 / N",
    "topk_variance": "R3: mean over positions of Σ_S (z - mu)²",
    "topk_uniform": "R4: mean of KL(uniform || softmax within S)",
    "topk_vocab": "R5: mean of -ln p over S, p over the vocabulary",
    "topk_mass": "R6: mean of the probability on S",
    "drsl_full": "R7: Σ_i Σ_{j≠t} (z_j - mean of the others)², no window",
    "legacy_rank": "R8: R1 after dropping the largest logit in place of the target",
}
SCOPES = ("batch", "sequence")


@dataclass(frozen=True)
class PrslConfig:
    """a · cross-entropy + b · penalty, which is itself a token loss; defaults are the release's for captioning.

    scope: over what the penalties that are no mean over positions (R1, R2, R7, R8) run: all positions of the batch, as
    released, or each text's own, averaged. On several devices the release runs over those of one; in one process
    that is the batch. With reduction "none", as an attack on single images asks, every text is on its own.
    quirk_drsl_mean: R7 divides the sum of V - 1 logits by V, as the predecessor's fast version does.
    Whether padding is predicted is the captioner's switch (`quirk_train_on_padding`): it makes the labels.
    """

    reading: str = "token_axis"
    start: int = 0
    end: int = 4
    a: float = 1.0
    b: float = 1e-5
    scope: str = "batch"
    quirk_drsl_mean: bool = False

    def __post_init__(self):
        if self.reading not in READINGS:
            raise UserError(f"unknown reading {self.reading!r}; {near_miss(self.reading, READINGS)}")
        if self.scope not in SCOPES:
            raise UserError(f"unknown scope {self.scope!r}; {near_miss(self.scope, SCOPES)}")
        if not 0 <= self.start < self.end:
            raise UserError(f"expected ranks 0 <= start < end, got [{self.start}, {self.end}); K = end - start is at least 1")
        if not (0 <= self.b < float("inf") and 0 <= self.a < float("inf")):
            raise UserError(f"expected finite weights a >= 0 and b >= 0, got a={self.a}, b={self.b}")

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The loss: a scalar, or [B] with reduction "none". b = 0 is cross-entropy to the bit."""
        loss = cross_entropy(logits, labels, reduction)
        loss = loss if self.a == 1 else self.a * loss
        return loss + self.b * self.penalty(logits, labels, reduction) if self.b else loss

    def penalty(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """P of the reading, in float32 or wider: a scalar, or [B] with reduction "none"; 0 where nothing is predicted."""
        if reduction == "mean" and self.scope == "batch":
            return self._of_texts(logits.flatten(0, 1)[None], labels.flatten()[None])[0]
        each = self._of_texts(logits, labels)
        return each if reduction == "none" else each.sum() / (labels != IGNORED).any(1).sum().clamp(min=1)

    def _of_texts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """P of each text [B], over its own positions."""
        there = labels != IGNORED
        z, targets = logits[there].to(torch.promote_types(logits.dtype, torch.float32)), labels[there]
        n = there.sum(dim=1)
        if not len(z):  # a sum of no entries: 0 with a graph, whatever the logits are, where 0 times their sum may be NaN
            return logits.flatten(1)[:, :0].sum(1, dtype=z.dtype)
        values = self._of_positions(z, targets)
        if self.reading in ("token_axis", "token_axis_mean", "legacy_rank"):
            mu = values.new_full(there.shape, -torch.inf).masked_scatter(there, values)
            mu = mu.masked_fill((n == 0)[:, None], 0)  # a softmax over nothing would be NaN
            # not N·LSE - Σ mu, which is the same but a difference of two large numbers: offsets of logits cost it its digits
            total = -mu.log_softmax(dim=1).masked_fill(~there, 0).sum(dim=1)
            return total / n.clamp(min=1) if self.reading == "token_axis_mean" else total
        total = values.new_zeros(there.shape).masked_scatter(there, values).sum(dim=1)
        return total if self.reading == "drsl_full" else total / n.clamp(min=1)

    def _of_positions(self, z: Tensor, targets: Tensor) -> Tensor:
        """Of each position [N] what its text sums or compares: mu for R1, R2 and R8, else its term of P."""
        if self.reading == "drsl_full":
            others = z.scatter(1, targets[:, None], 0)
            mean = others.sum(1, keepdim=True) / (z.shape[1] - (0 if self.quirk_drsl_mean else 1))
            return (z - mean).square().scatter(1, targets[:, None], 0).sum(1)
        dropped = z.argmax(dim=1) if self.reading == "legacy_rank" else targets
        top, index = competitors(z, dropped, self.start, self.end)
        match self.reading:
            case "topk_variance":
                return (top - top.mean(1, keepdim=True)).square().sum(1)
            case "topk_uniform":
                return -top.log_softmax(1).mean(1) - math.log(top.shape[1])
            case "topk_vocab":
                return -z.log_softmax(1).gather(1, index).mean(1)
            case "topk_mass":
                return z.softmax(1).gather(1, index).sum(1)
        return top.mean(1)


def competitors(z: Tensor, targets: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Logits and token ids [N, K] of the competitors of ranks [start, end) in z [N, V]: a `topk`, no sort of the vocabulary.

    Raises UserError for a window with no rank in it, or wider than the V - 1 competitors.
    """
    last = z.shape[1] - 1
    if not 0 <= start < end <= last:
        raise UserError(f"expected ranks 0 <= start < end <= {last}, the competitors among {last + 1} tokens, got [{start}, {end})")
    top = z.scatter(1, targets[:, None], -torch.inf).topk(end, dim=1)
    return top.values[:, start:], top.indices[:, start:]


@torch.no_grad()
def competitor_spread(logits: Tensor, labels: Tensor, start: int = 0, end: int = 4) -> tuple[float, float]:
    """Standard deviation of mu over positions: as it is, and after subtracting each position's mean logit.

    Adding a number to all logits of a position changes no probability, but it changes mu. If training lowers only the first
    spread, the penalty was paid in such offsets (specification 1.3). Raises UserError where fewer than two positions are predicted.
    """
    z, targets = predicted(logits, labels, at_least=2)
    mu = competitors(z, targets, start, end)[0].mean(1)
    return mu.std().item(), (mu - z.mean(1)).std().item()


@torch.no_grad()
def wrong_mass(logits: Tensor, labels: Tensor) -> float:
    """Mean probability of all tokens but the target. Raises UserError where nothing is predicted."""
    z, targets = predicted(logits, labels, at_least=1)
    return (1 - z.softmax(1).gather(1, targets[:, None])).mean().item()


def predicted(logits: Tensor, labels: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in float64 and targets [N] of the positions with a target."""
    there = labels != IGNORED
    if there.sum() < at_least:
        raise UserError(f"expected at least {at_least} positions with a target, got {int(there.sum())}; give more texts")
    return logits[there].double(), labels[there]
