"""Attacks by name: `get_attack("pgd-20x5").run(model, x, y, threat, keys)`.

A name is FAMILY[-STEPS][xRESTARTS][-paper|-released]; "+" joins names into an ensemble.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..runtime import UserError, generator, near_miss
from ..threat import ThreatModel, check_images
from . import adapter, objectives
from .pgd import pgd
from .target import as_target

# Families with their default steps (queries for Square). torchattacks' own default is 10, inside AutoAttack too.
OWN = {"pgd": 20, "cw": 20, "noise": 0, "noise-corner": 0}
FIXED_STEP = {"fgsm": 1, "bim": 10, "mifgsm": 10, "ta-pgd": 20}
ADAPTIVE = {"cw-l2": 50, "apgd-ce": 100, "apgd-dlr": 100, "apgd-t": 100, "fab-t": 100, "square": 5000}
FAMILIES = OWN | FIXED_STEP | ADAPTIVE | {"autoattack": 100}
NAME = re.compile(r"(.*?)(?:-(\d+))?(?:x(\d+))?(?:-(paper|released))?", re.DOTALL)  # every string fits
VARIANTS = {"pgd": ("paper", "released"), "cw": ("paper",), "autoattack": ("released",)}


@dataclass(frozen=True)
class Attack:
    """A named attack on a classifier (pixels [B, 3, H, W] in [0, 1] to logits [B, C]).

    source: "own" or "torchattacks".  params: JSON values that say all there is to say, for captions and cards.
    """

    name: str
    source: str
    params: dict = field(default_factory=dict, hash=False)

    @property
    def n_steps(self) -> int:
        """Gradient steps of one start; queries for Square, 0 for noise, the components' sum for an ensemble."""
        return sum(part.n_steps for part in self.components) if self.components else self.params["n_steps"]

    @property
    def components(self) -> list["Attack"]:
        """The attacks that an ensemble runs, in order; empty for a single attack."""
        return [get_attack(name) for name in self.params.get("components", ())]

    def step_255(self, threat: ThreatModel) -> float | None:
        """Step size in 1/255 units, None where the attack has no fixed one."""
        share = self.params.get("step_share")
        return None if share is None else share * threat.eps_255

    @property
    def label(self) -> str:
        """The attack in words, for a caption."""
        p = self.params
        if self.components:
            return f"{self.name}: " + ", then ".join(part.label for part in self.components)
        if self.source == "torchattacks":
            steps = f"{p['n_steps']} {'queries' if p['method'] == 'square' else 'steps'}"
            targets = f" for each of up to {adapter.N_TARGETS} classes" if p["method"].endswith("-t") else ""
            return f"{p['method']} ({steps}{targets}, torchattacks)"
        restarts = f", {p['n_restarts']} restarts" if p["n_restarts"] > 1 else ""
        if not p["n_steps"]:
            where = "a corner" if p["start"] == "corner" else "uniform in the ball"
            return f"random noise ({where}, no gradient{restarts})"
        loss = p["objective"].replace("_", "-") + (" as a float16 batch mean" if p["quirk_fp16_mean"] else "")
        step = "ε" if p["step_share"] == 1 else f"ε/{1 / p['step_share']:g}"
        return f"PGD-{p['n_steps']} ({loss}, step {step}, {p['start']} start, {p['keep']} iterate{restarts})"

    def run(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, keys: Sequence[tuple]
    ) -> torch.Tensor:
        """Adversarial images for `x` [B, 3, H, W] with labels `y` [B]: same shape and dtype, detached.

        keys: one tuple per image, whose last entry names the image and the rest the run. All randomness of an image
        comes from `runtime.generator(*key)`, so neither batch nor order matters; but for a random model under an ensemble
        or one of torchattacks' adaptive attacks, which ask it again about those images of a batch that still stand: they take
        the draws of the first ones. The model is attacked in evaluation mode and given back as it was, whatever grad or
        autocast mode the caller is in.
        """
        check_images(x)
        n = len(x)
        if not isinstance(model, nn.Module):
            raise UserError(f"model: expected a torch module, pixels to logits, got {type(model).__name__}; wrap it")
        if y.shape != (n,) or y.dtype != torch.int64:
            raise UserError(f"y: expected {n} int64 labels, got {list(y.shape)} {y.dtype}; pass class indices")
        if len(keys) != n:
            raise UserError(f"keys: expected a tuple for each of {n} images, got {len(keys)}; end each with its index")
        if not n:
            return x.clone()
        with as_target(model, x, keys[0]):
            return self._run(model, x.detach(), y.to(x.device), threat, keys)

    def _run(self, model, x, y, threat, keys):
        p = dict(self.params)
        if self.components:
            return _ensemble(self.components, model, x, y, threat, keys)
        if self.source == "torchattacks":
            return adapter.run(p.pop("method"), model, x, y, threat, keys, **p)
        quirk = {"quirk_fp16_mean": True} if p.pop("quirk_fp16_mean") else {}
        objective = getattr(objectives, p.pop("objective"))(model, y, **quirk)
        del p["step_share"]
        return pgd(objective, x, threat, step_255=self.step_255(threat), generators=[generator(*k) for k in keys], **p)


def _ensemble(parts: Sequence[Attack], model, x, y, threat, keys) -> torch.Tensor:
    """Each part attacks what is still correct; per image, the candidate with the highest margin objective is kept."""

    @torch.no_grad()
    def margins_of(images, labels):
        return objectives.margin(model, labels)(images)

    x_adv, margins = x.clone(), margins_of(x, y)
    for part in parts:
        left = (margins <= 0).nonzero()[:, 0]
        if not len(left):
            break
        part_keys = [(*keys[i][:-1], part.name, keys[i][-1]) for i in left.tolist()]
        found = part._run(model, x[left], y[left], threat, part_keys)
        found_margins = margins_of(found, y[left])
        better = found_margins > margins[left]
        x_adv[left[better]], margins[left[better]] = found[better], found_margins[better]
    return x_adv


def get_attack(spec: str) -> Attack:
    """The attack that a name stands for. Raises UserError, with the nearest known name, if there is none.

    Own: "pgd-20" (cross-entropy, uniform start, step ε/4, best iterate); "cw-20", the same on the margin, as the
    papers use that name; "pgd-20x5" (5 restarts); "noise" and "noise-corner" (random control; "noisex10" keeps the
    worst of 10). "pgd-100-paper", "cw-100-paper": step ε, last iterate. "pgd-100-released": also a float16 batch mean.
    From torchattacks: "fgsm", "bim-10", "mifgsm-10", "ta-pgd-20", "cw-l2-50" (l2 only), "apgd-ce", "apgd-dlr",
    "apgd-t", "fab-t" (100 steps unless given), "square-200" (queries).
    Ensembles: "autoattack" is apgd-ce, apgd-t and fab-t of 100 steps, then square of 5000 queries; "autoattack-20" has
    20 steps and 1000 queries; "autoattack-released" is what the code of TGA-ZSR runs under that name, apgd-ce and
    apgd-dlr; others by "+", as in "apgd-ce-20+apgd-t-20".
    """
    if not isinstance(spec, str):
        raise UserError(f"attack: expected a name such as 'pgd-20', got {type(spec).__name__}; see get_attack")
    if "+" in spec:
        return _joined(spec, spec.split("+"))
    family, steps, restarts, variant = NAME.fullmatch(spec).groups()
    if family not in FAMILIES:
        raise UserError(f"unknown attack {spec!r}; {near_miss(family.lower(), FAMILIES)}")
    _check_suffixes(spec, family, steps, restarts, variant)
    n_steps = FAMILIES[family] if steps is None else int(steps)
    if family == "autoattack":
        parts = ("apgd-ce", "apgd-dlr") if variant else ("apgd-ce", "apgd-t", "fab-t")
        square = () if variant else (f"square-{50 * n_steps}",)  # AutoAttack's ratio: 5000 queries to 100 steps
        return _joined(spec, [*(f"{part}-{n_steps}" for part in parts), *square])
    if family in ADAPTIVE:
        return Attack(spec, "torchattacks", {"method": family, "n_steps": n_steps})
    if family in FIXED_STEP:
        share = 1.0 if family == "fgsm" else 0.25
        return Attack(spec, "torchattacks", {"method": family, "n_steps": n_steps, "step_share": share})
    noise = family.startswith("noise")
    params = {
        "objective": "margin" if family == "cw" else "cross_entropy",
        "n_steps": n_steps,
        "step_share": None if noise else 1.0 if variant else 0.25,
        "start": "corner" if family == "noise-corner" else "uniform",
        "keep": "last" if noise or variant else "best",
        "n_restarts": int(restarts or 1),
        "quirk_fp16_mean": variant == "released",
    }
    return Attack(spec, "own", params)


def _joined(name: str, components: Sequence[str]) -> Attack:
    sources = {get_attack(part).source for part in components}
    return Attack(name, "own" if "own" in sources else "torchattacks", {"components": list(components)})


def _check_suffixes(spec, family, steps, restarts, variant) -> None:
    """Refuses a suffix that the family does not have, instead of ignoring it."""
    if steps is not None and (FAMILIES[family] < 2 or int(steps) < 1):
        wanted = "no number of steps" if FAMILIES[family] < 2 else "at least 1 step"
        raise UserError(f"attack {spec!r}: expected {wanted} for {family!r}, got {steps}; change '-{steps}'")
    if restarts is not None and (family not in OWN or int(restarts) < 1):
        known = ", ".join(OWN)
        raise UserError(f"attack {spec!r}: expected at least 1 restart, for {known} only; drop 'x{restarts}'")
    if variant is not None and variant not in VARIANTS.get(family, ()):
        known = ", ".join(f"{f}-{v}" for f, vs in VARIANTS.items() for v in vs)
        raise UserError(f"attack {spec!r}: expected a variant among {known}, got {family}-{variant}; drop '-{variant}'")


@dataclass(frozen=True)
class ObjectiveAttack(Attack):
    """PGD-`n_steps` on an objective of one's own: how a chapter writes an adaptive attack.

    make(model, x, y) returns the objective to maximize [B]; `name` and params["objective"] say what it is.
    """

    make: Callable | None = field(default=None, compare=False)

    def _run(self, model, x, y, threat, keys):
        generators = [generator(*k) for k in keys]
        return pgd(self.make(model, x, y), x, threat, n_steps=self.n_steps, generators=generators)


def attack_on(make: Callable, name: str, n_steps: int = 20) -> ObjectiveAttack:
    """An attack called `name` that runs own PGD (step ε/4, uniform start, best iterate) on make(model, x, y)."""
    params = {"objective": make.__name__, "n_steps": n_steps, "step_share": 0.25, "start": "uniform", "keep": "best"}
    return ObjectiveAttack(name, "own", params | {"n_restarts": 1, "quirk_fp16_mean": False}, make)
