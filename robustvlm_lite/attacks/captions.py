"""Attacks on models that write: token losses to maximize over pixels, and ways to hand them to any attack.

A token loss takes logits [B, T, V] and labels [B, T] and gives [B] with reduction "none" (`captioner.TokenLoss`), so the
loss that a defense was trained with is an objective as it stands. What no training uses is here. Targets stay the same in all
steps: the truth, or the model's own clean text; never what it says at the moment (specification of arXiv 2402.03627, section 3.3).
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..captioner import IGNORED, Captioner, TokenLoss, cross_entropy
from ..runtime import UserError
from .objectives import Objective

SURE = 8.0  # head start of the first class in `TwoClasses`
LEAST = -4.0  # loss below which float32 rounds the gradient of that head start away, at last to exactly 0


def on_texts(model: Captioner, targets: Sequence[str], prompt: Sequence[str] | None = None, loss: TokenLoss = cross_entropy) -> Objective:
    """The loss of fixed targets as an objective [B] of pixels, for `pgd`."""
    return lambda x: model.token_loss(x, targets, prompt, loss=loss, reduction="none")


def token_margin(logits: Tensor, labels: Tensor, reduction: str = "none", kappa: float = 0.0) -> Tensor:
    """-Σ_i relu(z_t - max of the others + κ) of each text, [B]: it rises while any target token still leads.

    Cross-entropy can be raised on tokens that are wrong already, and saturates where the model is sure; this does neither.
    """
    own = logits.gather(-1, labels.clamp(min=0)[..., None])
    others = logits.scatter(-1, labels.clamp(min=0)[..., None], -torch.inf).amax(-1)
    lead = (own[..., 0] - others + kappa).relu().masked_fill(labels == IGNORED, 0)
    return _reduced(-lead.sum(1), reduction)


class FirstRight:
    """Cross-entropy of the earliest content word that is still right, [B]; of the whole text where none is.

    A greedy text changes from its first changed word on, so all of the budget goes there. skip: token ids of words that say
    nothing of the image, such as articles. Each content word that is lost before counts ln V, the most that a leading word's
    own cross-entropy can be: the value never falls when a word is lost, or the best iterate would be one before that.
    """

    def __init__(self, skip: Collection[int] = ()):
        self.skip = tuple(skip)

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        known = labels.clamp(min=0)
        nll = -logits.log_softmax(-1).gather(-1, known[..., None])[..., 0]
        content = labels != IGNORED
        for token in self.skip:
            content = content & (labels != token)
        right = content & (logits.argmax(-1) == known)
        lost = (content & (right.cumsum(1) == 0)).sum(1)
        first = right.int().argmax(1, keepdim=True)
        picked = torch.where(right.any(1), nll.gather(1, first)[:, 0], cross_entropy(logits, labels, "none"))
        return _reduced(picked + lost.to(picked) * math.log(logits.shape[-1]), reduction)


class Centered:
    """A loss on logits less their mean at each position: offsets that change no probability reach no penalty."""

    def __init__(self, loss: TokenLoss):
        self.loss = loss

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        return self.loss(logits - logits.mean(-1, keepdim=True), labels, reduction)


class Scaled:
    """A loss on logits times a factor: below 1 it wakes a saturated softmax, above 1 it looks at the strongest rival alone."""

    def __init__(self, factor: float, loss: TokenLoss = cross_entropy):
        self.factor, self.loss = factor, loss

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        return self.loss(self.factor * logits, labels, reduction)


class TwoClasses(nn.Module):
    """A captioner with its targets as a classifier of two classes, so that attacks on classifiers run on texts.

    Logits [SURE - loss, 0]. With label 0 their cross-entropy is softplus(loss - SURE), which rises with the loss and calls an
    image done only where its mean token loss is SURE; sign steps, momentum and APGD's halving see the order of values, and that
    is the loss's own. Raises UserError for a loss below LEAST, such as the margin of a sure text: it would have no gradient left.
    """

    def __init__(self, model: Captioner, targets: Sequence[str], prompt: Sequence[str] | None = None, loss: TokenLoss = cross_entropy):
        super().__init__()
        self.model, self.objective = model, on_texts(model, targets, prompt, loss)

    def forward(self, x: Tensor) -> Tensor:
        loss = self.objective(x)
        if (least := loss.detach().amin().item()) < LEAST:
            raise UserError(f"expected a loss of at least {LEAST:g}, got {least:.1f}, where two classes have no gradient; use pgd")
        return torch.stack([SURE - loss, torch.zeros_like(loss)], dim=1)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return values if reduction == "none" else values.mean()
