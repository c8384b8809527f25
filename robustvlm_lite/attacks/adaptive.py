"""Attacks on classifiers that draw random numbers or adapt at test time: averages over draws, and guesses for labels.

A defense hands out what can be differentiated (a module with `keyed`, such as `defenses.Keyed`); what it does inside is its
own affair. After Athalye et al. 2018 (EOT, BPDA) and Croce et al. 2022 (adaptive test-time defenses).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from ..runtime import UserError, generator
from . import objectives
from .pgd import pgd
from .registry import Attack


@dataclass(frozen=True)
class ExpectationAttack(Attack):
    """PGD on the mean of an objective over fresh draws of the model in every step (EOT); step ε/4, last iterate.

    The draws are keyed by image, step and draw, and by the name of the attack: none of them is one of a verdict's, and
    neither batch nor order matters.
    """

    make: Callable | None = field(default=None, compare=False)

    def _run(self, model, x, y, threat, keys):
        if not hasattr(model, "keyed"):
            raise UserError(f"{self.name}: expected a classifier with draws of its own, got {type(model).__name__}; use pgd")
        step, draws = count(), self.params["draws"]

        def objective(x_adv):
            k = next(step)
            values = [
                self.make(model.keyed([(*key, "draw", k, d) for key in keys]), y)(x_adv) for d in range(draws)
            ]
            return torch.stack(values).mean(dim=0)

        generators = [generator(*k) for k in keys]
        return pgd(objective, x, threat, n_steps=self.n_steps, keep="last", generators=generators)


def expectation(n_steps: int = 20, draws: int = 1, objective: str = "cross_entropy", name: str = "") -> ExpectationAttack:
    """EOT-PGD of `n_steps`, each with `draws` fresh draws of the model. objective: of `attacks`, "cross_entropy" or "margin".

    Raises UserError for fewer than one draw or an unknown objective.
    """
    if draws < 1 or n_steps < 1:
        raise UserError(f"expected at least 1 step and 1 draw, got {n_steps} and {draws}; 20 and 1 are a beginning")
    if objective not in ("cross_entropy", "margin"):
        raise UserError(f"unknown objective {objective!r}; known: cross_entropy, margin")
    params = {"objective": f"{objective}, mean over {draws} draws a step", "n_steps": n_steps, "step_share": 0.25}
    params |= {"start": "uniform", "keep": "last", "n_restarts": 1, "quirk_fp16_mean": False, "draws": draws}
    return ExpectationAttack(name or f"eot-{n_steps}x{draws}", "own", params, getattr(objectives, objective))


@dataclass(frozen=True)
class GuessedLabels(Attack):
    """Another attack that is not told the labels: it goes away from what the model says of the clean image.

    A control against label leakage. An attack that knows the label moves every image away from its true class, which a
    defense may read off; away from the model's own guess tells it nothing.
    """

    inner: Attack | None = field(default=None, compare=False)

    def _run(self, model, x, y, threat, keys):
        with torch.no_grad():
            guess = model(x).argmax(dim=1)
        return self.inner._run(model, x, guess, threat, keys)


def without_labels(attack: Attack) -> GuessedLabels:
    """`attack` against the model's own guesses, called "<name>-guessed"."""
    return GuessedLabels(f"{attack.name}-guessed", attack.source, attack.params, attack)


def renamed(attack: Attack, name: str) -> Attack:
    """The same attack under another name, so that a table can hold it against several surfaces."""
    return replace(attack, name=name)
