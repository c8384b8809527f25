"""Tune prompts inside a run and sum up few-shot scenarios: what a chapter on prompt tuning shares with the next."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from .. import attacks, defenses
from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..defenses import Defense, PromptTraining
from ..defenses.prompt_files import load_prompts, prompt_facts, save_prompts
from ..fewshot import Scenario, Summary
from ..records import Row
from ..runtime import weights_sha256
from ..threat import ThreatModel
from .markup import Html, table
from .measure import measure


def backbone(run) -> ZeroShotCLIP:
    """The CLIP that carries the prompts: the profile's, with the image tower of the defense that it names, "none" for its own."""
    return defenses.load_defense(run.sizes.backbone, run.load_clip()).clip


def plan(run, name: str, train: ImageSet) -> PromptTraining:
    """The paper's training of a method, or the profile's short one: its steps and batch, its factor on the paper's rate."""
    style, short = defenses.PROMPT_METHODS[name].style, getattr(run.sizes, "tuning", None)
    if not short:
        return style.training(train, run.sizes.shots)
    return style.short(train, **short | {"steps": run.parameters.get("steps", 0) or short["steps"]})


def tune(
    run, name: str, carrier: ZeroShotCLIP, train: ImageSet, seed: int, *, label: str = "", spec=None, config=None, teacher=None
) -> Defense:
    """A prompt-tuned defense, trained at the run's budget on `train`; a killed run finds it again.

    "HEP" is the carrier itself with its hand-written templates. label: what the card calls it, where spec, config or the
    teacher of CAPT are not the method's own.
    """
    if name == "HEP":
        defense = Defense(carrier)
        defense.name = name
        return defense
    listens = {} if teacher is None else {"teacher": teacher}
    defense = defenses.build_prompts(name, carrier, train.class_names, spec=spec, config=config, **listens)
    training, style, budget = plan(run, name, train), defenses.PROMPT_METHODS[name].style, run.parameters["eps_255"]
    eps, options = style.attack(budget)
    key = {"training": asdict(training) | {"precision": str(training.precision)}, "seed": seed, "eps_255": eps}
    key |= {"data": train.sha256, "choices": defense.choices()}
    key |= {"teacher": weights_sha256(teacher.visual)} if teacher else {}
    key = json.loads(json.dumps(key))
    stem = f"{label or name} {train.name} {len(train)} {seed}".replace("/", "-").replace(":", "-")
    path = run.out / "trained" / f"{stem}.safetensors"
    if path.exists() and prompt_facts(path).get("key") == key:
        load_prompts(defense, path)
        defense.history, defense.step_seconds = defense.facts["history"], defense.facts["step_seconds"]
    else:
        attack = partial(attacks.pgd, threat=ThreatModel(eps), **options)
        defense.fit(train, attack=attack, training=training, seed=seed, progress=False)
        told = {"key": key, "history": defense.history, "step_seconds": defense.step_seconds}
        save_prompts(defense, path, backbone=run.sizes.backbone, **told)
    defense.name = label or name
    return defense


def measure_scenario(run, scenario: Scenario, tuned: Mapping[int, Sequence[Defense]], attack, eps_255: float) -> list[Row]:
    """Clean and attacked accuracy of each seed's defenses on every part of a scenario, added to the card."""
    pair = (attack, ThreatModel(eps_255))
    return [
        row
        for seed, models in tuned.items()
        for defense in models
        for part in scenario.tests.values()
        for row in measure(run, defense, part, [pair], seed=seed)
    ]


def marked(tuned: Mapping[int, Sequence[Defense]], n_classes: int) -> set[tuple[str, int]]:
    """(method, seed) of the runs whose training collapsed."""
    return {
        (d.name, seed) for seed, models in tuned.items() for d in models
        if hasattr(d, "collapsed") and d.collapsed(n_classes) is not None
    }  # fmt: skip


def scenario_table(summaries: Sequence[Summary], *, caption: str) -> Html:
    """Methods down; natural and robust accuracy of every part in percent, mean ± sd over seeds, and collapsed runs.

    With two parts or more the harmonic mean of all of them (H4 for base and new) stands beside.
    """
    lines = []
    for s in summaries:
        line = {"method": s.method}
        for part in s.natural:
            line |= {f"{part}, natural": _spread(s.natural[part]), f"{part}, robust": _spread(s.robust[part])}
        line |= {"harmonic mean": _spread(s.h4)} if len(s.natural) > 1 else {}
        lines.append(line | {"collapsed": f"{s.collapsed} of {s.seeds}"})
    return table(lines, caption=f"{caption} Percent, mean ± standard deviation over seeds.", card_link=True)


def _spread(value: tuple[float, float]) -> str:
    mean, sd = (100 * v for v in value)
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f}\u00a0±\u00a0{sd:.1f}"
