"""Is the evaluation sound? Cheap checks that a masked gradient, a random model or a broken attack fails.

After Carlini et al., "On Evaluating Adversarial Robustness" (2019), and Athalye et al. (2018). A failed check does not
say that a model is weak: it says that a robust accuracy measured on it in this way means nothing yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .attacks import Attack, cross_entropy, get_attack, zero_gradient_share
from .data.imageset import ImageSet
from .evaluate import evaluate, paired
from .records import Row
from .runtime import UserError
from .threat import ThreatModel

LARGE_255 = 64.0  # a quarter of the pixel range: no classifier survives it
CANARY_255, CANARY_MAX = 8.0, 0.05
ZERO_MAX = 0.1  # share of pixels that may lack a gradient
DOUBLED_MAX = 0.05  # accuracy that twice the steps may still take
LOGIT_TOLERANCE = 1e-3  # of the largest logit: what another batch shape may change by rounding


@dataclass(frozen=True)
class Check:
    """One line of the battery: what was asked, whether it held, its number, and what the number means."""

    name: str
    passed: bool
    value: str
    why: str

    @property
    def mark(self) -> str:
        """✓ or ✗."""
        return "✓" if self.passed else "✗"


def battery(
    model: nn.Module,
    data: ImageSet,
    *,
    surface: nn.Module | None = None,
    eps_255: float = 1.0,
    n_steps: int = 10,
    n: int = 32,
    undefended: nn.Module | None = None,
    transfer_from: nn.Module | None = None,
    rows: Iterable[Row] = (),
    seed: int = 0,
    batch_size: int = 64,
) -> list[Check]:
    """The checks on `n` class-balanced images of `data`, with PGD-`n_steps` at `eps_255`; about 9 n n_steps gradients.

    model: pixels -> logits, in the mode (train or eval) in which you use it. surface: what the attacker differentiates,
    where that is not the model itself; give what your evaluation gives. undefended: plain CLIP on the same task,
    on which the same attack must succeed. transfer_from: another model whose adversarial images are tried on `model`.
    rows: of a finished evaluation, for the order of AutoAttack, PGD and CW. What is not given is not checked.
    A model through which no gradient flows at all gets the checks that need no attack.
    """
    data = data.balanced(min(n, len(data)), seed)
    surface = model if surface is None else surface
    checks = [_repeated_forward(model, data), _batch_composition(model, data), _gradient(surface, data)]
    if rows := list(rows):
        checks.append(attack_order(rows))
    if checks[2].value == NO_GRADIENT:
        return checks
    run = _Runner(data, n_steps, {"seed": seed, "batch_size": batch_size, "progress": False})
    checks += _attack_checks(model, surface, run, eps_255, transfer_from)
    if undefended is not None:
        checks.append(_canary(undefended, run))
    return checks


def attack_order(rows: Iterable[Row]) -> Check:
    """AutoAttack (or APGD) must leave no more accuracy than PGD and CW on the same model, images and ε."""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.metric == "robust_acc":
            key = (row.method, row.dataset, row.eps_255, row.extra["seed"], row.extra["norm"])
            cells.setdefault(key, {})[row.attack] = row
    told, passed = [], True
    for (method, dataset, eps_255, *_), attacks in cells.items():
        strong = [row for name, row in attacks.items() if name.startswith(("autoattack", "apgd"))]
        weak = [row for name, row in attacks.items() if name.startswith(("pgd", "cw"))]
        for aa in strong if weak else ():
            least = min(weak, key=lambda row: row.value)
            passed &= not _above(aa, least)
            numbers = f"{aa.attack} {_percent(aa)}, {least.attack} {_percent(least)}"
            told.append(f"{method} on {dataset} at {eps_255:g}/255: {numbers}")
    if not told:
        raise UserError("expected rows of AutoAttack or APGD beside PGD or CW at the same ε; evaluate both")
    why = "The stronger attack must not leave more accuracy; where it does, one of them is broken or met another model."
    return Check("AutoAttack ≤ min(PGD, CW)", passed, "; ".join(told), why)


# ---- checks on the model alone

NO_GRADIENT = "no gradient reaches the image"


@torch.no_grad()
def _repeated_forward(model: nn.Module, data: ImageSet) -> Check:
    x = _pixels(model, data)
    first, second = model(x), model(x)
    change = _relative(first, second)
    why = "The same images must give the same logits; a random model needs attacks that average over its randomness."
    return Check("repeated forward", change <= 1e-6, f"largest change {change:.1e} of the largest logit", why)


@torch.no_grad()
def _batch_composition(model: nn.Module, data: ImageSet) -> Check:
    x = _pixels(model, data)[:8]
    whole = model(x)
    alone = torch.cat([model(image) for image in x.split(1)])
    turned = model(x.flip(0)).flip(0)
    change = max(_relative(whole, alone), _relative(whole, turned))
    why = "An image's logits must not depend on its neighbors in the batch, else attack and verdict see two models."
    told = f"largest change {change:.1e} of the largest logit"
    return Check("batch composition", change <= LOGIT_TOLERANCE, told, why)


def _gradient(model: nn.Module, data: ImageSet) -> Check:
    name = "gradient is not zero"
    why = "Where the gradient is exactly zero a gradient attack stands still, and accuracy under it is no robustness."
    y = data.labels.to(_device(model))
    try:
        share = zero_gradient_share(cross_entropy(model, y), _pixels(model, data)).mean().item()
    except (UserError, RuntimeError) as error:  # autograd: the images are not part of the graph
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return Check(name, False, NO_GRADIENT, why)
    return Check(name, share <= ZERO_MAX, f"{100 * share:.1f} % of pixels without one", why)


# ---- checks by attacking


@dataclass(frozen=True)
class _Runner:
    """Attacks models on the same images with the same settings."""

    data: ImageSet
    n_steps: int
    options: dict

    def attack(self, model: nn.Module, attacks: list[tuple[Attack, float]], **options) -> list[Row]:
        """The clean row, then one robust_acc row per (attack, ε)."""
        planned = [(attack, ThreatModel(eps_255)) for attack, eps_255 in attacks]
        rows = evaluate(model, self.data, planned, method="checked", **self.options, **options)
        return [row for row in rows if row.metric != "robust_acc_8bit"]

    @property
    def pgd(self) -> Attack:
        return get_attack(f"pgd-{self.n_steps}")


SINGLE_STEP = {"n_steps": 1, "step_share": 1.0, "start": "zero", "keep": "last"}


def _attack_checks(model: nn.Module, surface: nn.Module, run: _Runner, eps_255: float, source) -> list[Check]:
    budgets = sorted({min(eps_255 * factor, 255.0) for factor in (0.5, 1, 2, 4)} | {LARGE_255})
    single = replace(run.pgd, name="single-step", params=run.pgd.params | SINGLE_STEP)
    others = [single, get_attack("noise"), get_attack(f"pgd-{2 * run.n_steps}")]
    clean, *rows = run.attack(model, [(run.pgd, b) for b in budgets] + [(attack, eps_255) for attack in others], surface=surface)
    curve, (one_step, noise, doubled) = rows[: len(budgets)], rows[len(budgets) :]
    at = dict(zip(budgets, curve, strict=True))
    checks = [_monotone(curve), _reaches_chance(at[LARGE_255], 1 / len(run.data.class_names))]
    pgd, told = at[eps_255], f"{run.pgd.name} leaves {_percent(at[eps_255])}"

    def not_above(name, weaker, text, why):
        checks.append(Check(name, not _above(pgd, weaker), f"{told}, {text} {_percent(weaker)} (n = {pgd.n})", why))

    why = "Many small steps must hurt at least as much as a large one; if not, the gradient misleads."
    not_above("iterative ≥ single step", one_step, "one step", why)
    why = "Random noise of the same size must not beat a gradient attack."
    not_above("noise does less", noise, f"clean images {_percent(clean)}, noise", why)
    if source is not None:
        transfer = run.attack(model, [(run.pgd, eps_255)], surface=source)[1]
        why = "Images made against another model must not fool this one more often than images made against itself."
        not_above("transfer does less", transfer, "images made on another model", why)
    stable = pgd.value - doubled.value <= max(DOUBLED_MAX, 1.5 / pgd.n)
    why = "If more steps keep winning, the attack has not converged, and its number is only an upper bound."
    value = f"{told}, {doubled.attack} {_percent(doubled)} (n = {pgd.n})"
    return [*checks, Check("twice the steps change little", stable, value, why)]


def _monotone(curve: list[Row]) -> Check:
    rises = [f"{b.eps_255:g}/255" for a, b in zip(curve, curve[1:], strict=False) if _above(b, a)]
    value = ", ".join(f"{_percent(row)} at {row.eps_255:g}" for row in curve) + "".join(
        f"; rises at {r}" for r in rises
    )
    why = "A larger budget contains the smaller one, so accuracy can only fall (within the paired interval)."
    return Check("more ε never raises accuracy", not rises, value, why)


def _reaches_chance(large: Row, chance: float) -> Check:
    value = f"{_percent(large)} at {LARGE_255:g}/255, chance {100 * chance:.1f} % (n = {large.n})"
    why = "A budget that can redraw the image must win; where it does not, the attack is at fault."
    return Check("large ε reaches chance", large.ci95[0] <= chance, value, why)


def _canary(undefended: nn.Module, run: _Runner) -> Check:
    clean, attacked = run.attack(undefended, [(run.pgd, CANARY_255)])
    return Check(
        "undefended model falls",
        attacked.value <= CANARY_MAX,
        f"clean {_percent(clean)}, {run.pgd.name} at {CANARY_255:g}/255 leaves {_percent(attacked)} (n = {clean.n})",
        "The attack that measures the defense must break a model that has none.",
    )


# ---- small helpers


def _above(a: Row, b: Row) -> bool:
    """Is more left under attack a than under b, beyond the paired 95 % interval?"""
    return paired(a.records, b.records)[1] > 0


def _percent(row: Row) -> str:
    return f"{100 * row.value:.1f} %"


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _pixels(model: nn.Module, data: ImageSet) -> torch.Tensor:
    return data.pixels().to(_device(model))
