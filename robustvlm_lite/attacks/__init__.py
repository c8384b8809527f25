"""Attacks in pixel space: own PGD over any objective, torchattacks behind one contract, a random-noise control."""

from .objectives import Objective, cross_entropy, margin, value_and_grad, zero_gradient_share
from .pgd import pgd
from .registry import Attack, attack_on, get_attack

__all__ = [
    "Attack",
    "Objective",
    "attack_on",
    "cross_entropy",
    "get_attack",
    "margin",
    "pgd",
    "value_and_grad",
    "zero_gradient_share",
]
