"""Rivals of PRSL: losses of tokens that also keep a model from being too sure, each with one weight.

All take logits [B, T, V] and labels [B, T] (IGNORED where nothing is predicted) and give a scalar, or [B] with
reduction "none"; what they add to cross-entropy is a mean over positions, so that a weight means one thing for every batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..captioner import IGNORED, cross_entropy
from ..runtime import UserError


@dataclass(frozen=True)
class _Weighted:
    weight: float

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"expected a finite weight >= 0, got {self.weight}")

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return cross_entropy(logits, labels, reduction) + self.weight * _mean(self.term(logits, labels), labels, reduction)

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is added at each position, [B, T]."""
        raise TypeError(f"{type(self).__name__} adds nothing")


class LabelSmoothing(_Weighted):
    """The target takes 1 - weight, and all V tokens share the weight (Szegedy et al., CVPR 2016, section 7)."""

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise UserError(f"expected a weight in [0, 1], which the target gives away, got {self.weight}")

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = _wide(logits).log_softmax(-1)
        own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return own - log_p.mean(-1)


class ConfidencePenalty(_Weighted):
    """Minus the entropy of the answer (Pereyra et al., ICLR workshop 2017, arXiv 1701.06548)."""

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = _wide(logits).log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)


class LogitSqueezing(_Weighted):
    """Mean square of the logits (Kannan et al., 2018, arXiv 1803.06373, there as a norm), which also holds offsets down."""

    def term(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _wide(logits).square().mean(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(values: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Over all positions, or over each text's."""
    there = labels != IGNORED
    kept = values.masked_fill(~there, 0)
    if reduction == "none":
        return kept.sum(1) / there.sum(1).clamp(min=1)
    return kept.sum() / there.sum().clamp(min=1)
