"""Attacks in pixel space: own PGD over any objective, torchattacks behind one contract, a random-noise control."""

from .adaptive import expectation, renamed, without_labels
from .objectives import Objective, cross_entropy, margin, value_and_grad, zero_gradient_share
from .pgd import pgd
from .registry import Attack, attack_on, get_attack

__all__ = [
    "Attack",
    "Objective",
    "attack_on",
    "cross_entropy",
    "expectation",
    "get_attack",
    "margin",
    "pgd",
    "renamed",
    "value_and_grad",
    "without_labels",
    "zero_gradient_share",
]
