"""Tune prompts inside a run and sum up few-shot scenarios: what a chapter on prompt tuning shares with the next."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from .. import attacks, defenses
from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..defenses import Defense, PromptTraining
from ..defenses.prompt_files import load_prompts, prompt_facts, save_prompts
from ..fewshot import Scenario, Summary
from ..records import Row, column
from ..runtime import UserError, weights_sha256
from ..stats import paired_bootstrap
from ..threat import ThreatModel
from .markup import Html, table
from .measure import measure
from .spread import beforehand


def backbone(run) -> ZeroShotCLIP:
    """The CLIP that carries the prompts: the profile's, with the image tower of the defense that it names, "none" for its own."""
    return defenses.load_defense(run.sizes.backbone, run.load_clip()).clip


def protocol(run) -> str:
    """What a search of learning rates is filed under: "05_capt-tiny", the chapter whose protocol it is and the profile."""
    return f"{run.chapter}-{run.profile}"


def factor(run, name: str) -> float:
    """On the paper's learning rate of a method: the profile's, or the one that was searched for it; 1 in a full training."""
    rate = getattr(run.sizes, "tuning", {"rate": 1.0})["rate"]
    return defenses.searched_rate(run.sizes.model, protocol(run), name) if rate == defenses.SEARCHED else rate


def plan(run, name: str, train: ImageSet) -> PromptTraining:
    """The paper's training of a method, or the profile's short one: its steps and batch, its factor on the paper's rate.

    The run's parameter steps takes the place of either's; a tenth of the steps is then an epoch of the schedule.
    """
    style, short, steps = defenses.PROMPT_METHODS[name].style, getattr(run.sizes, "tuning", None), run.parameters.get("steps", 0)
    if not short:
        whole = style.training(train, run.sizes.shots)
        return replace(whole, steps=steps, epoch=max(steps // 10, 1)) if steps else whole
    return style.short(train, **short | {"steps": steps or short["steps"], "rate": factor(run, name)})


def factors_table(run, methods: Sequence[str]) -> Html:
    """The factor on each method's paper rate in this run and, where it was searched, what the held-back images said."""
    if getattr(run.sizes, "tuning", {}).get("rate") != defenses.SEARCHED:
        lines = [{"method": m, "factor": f"{factor(run, m):g}"} for m in methods]
        return table(lines, caption="Factor on each paper's learning rate: one for all methods, not searched under this profile.")
    found = defenses.rate_search(run.sizes.model, protocol(run))
    if "untuned" not in found or any(10.0 not in defenses.scores(found, m) for m in methods):
        raise UserError(f"no finished search of learning rates for {protocol(run)}; run data_scripts/train_prompts.py --search")
    lines = [{"method": "hand-written prompts", "tried": "–", "taken": "–"} | _held(found["untuned"])]
    for m in methods:
        scored = defenses.scores(found, m)
        best, at = defenses.winner(scored), {f"{rate:g}": _held(s) for rate, s in scored.items()}
        lines.append({"method": m, "tried": ", ".join(at), "taken": f"{best:g}"} | at[f"{best:g}"] | {"score of 10": at["10"]["score"]})
    images, seeds = f"n = {found['held']} held-back training images of {found['set']}", f"tunings a factor: {len(found['seeds'])}"
    how = f"clean and {found['attack']} at ε = {found['eps_255']:g}/255, in percent, {seeds}; the score is the mean of both"
    return table(lines, caption=f"Factors on each paper's learning rate, tried on {images}: {how}.")


def _held(accuracy: Mapping[str, float]) -> dict[str, str]:
    clean, robust = accuracy["clean"], accuracy["robust"]
    return {name: f"{100 * v:.1f}" for name, v in (("clean", clean), ("robust", robust), ("score", (clean + robust) / 2))}


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


def tune_each(run, carrier: ZeroShotCLIP, train: ImageSet, seed: int, variants: Sequence[Mapping]) -> list[Defense]:
    """What `tune` gives for each of several variants, which name their method and options; trained on all cores at once."""
    jobs = [partial(tune, run, carrier=carrier, train=train, seed=seed, **options) for options in variants]
    beforehand(run, jobs, "tuning")
    return [job() for job in jobs]


def tune_scenario(
    run, carrier: ZeroShotCLIP, scenario: Scenario, methods: Sequence[str], seeds: Sequence[int]
) -> dict[int, list[Defense]]:
    """seed -> each method, tuned on the shots that the scenario draws by that seed."""
    shots = {seed: scenario.train(seed) for seed in seeds}
    jobs = {seed: [partial(tune, run, m, carrier, shots[seed], seed) for m in methods] for seed in seeds}
    beforehand(run, [job for of_seed in jobs.values() for job in of_seed], "tuning")
    return {seed: [job() for job in of_seed] for seed, of_seed in jobs.items()}


def measure_scenario(run, scenario: Scenario, tuned: Mapping[int, Sequence[Defense]], attack, eps_255: float) -> list[Row]:
    """Clean and attacked accuracy of each seed's defenses on every part of a scenario, added to the card."""
    pairs, parts = [(attack, ThreatModel(eps_255))], scenario.tests.values()
    jobs = [partial(measure, run, d, part, pairs, seed=s) for s, models in tuned.items() for d in models for part in parts]
    beforehand(run, jobs, "measuring")
    return [row for job in jobs for row in job()]


def marked(tuned: Mapping[int, Sequence[Defense]], n_classes: int) -> set[tuple[str, int]]:
    """(method, seed) of the runs whose training collapsed."""
    return {
        (d.name, seed) for seed, models in tuned.items() for d in models
        if hasattr(d, "collapsed") and d.collapsed(n_classes) is not None
    }  # fmt: skip


def paired_over_seeds(rows: Sequence[Row], method: str, reference: str, metric: str, dataset: str) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of two methods' accuracies over all seeds of a scenario's rows, as the rules of claims see it.

    Each image's verdicts are averaged over the seeds first, and images are resampled: the answers of several tunings to one
    image are not several images.
    """
    sides = []
    for name in (method, reference):
        chosen = [row for row in rows if (row.method, row.metric, row.dataset) == (name, metric, dataset)]
        parts = [row.records.sort_by("index") for row in sorted(chosen, key=lambda row: row.extra["seed"])]
        sides.append(([row.extra["seed"] for row in chosen], [column(p, "index") for p in parts], [column(p, "correct") for p in parts]))
    (seeds, index, a), (others, index_b, b) = sides
    same = seeds and sorted(seeds) == sorted(others) and all(np.array_equal(index[0], i) for i in (*index, *index_b))
    if not same:
        raise UserError(f"expected {method} and {reference} on the same images and seeds, got seeds {seeds} and {others}")
    return paired_bootstrap(np.mean(a, axis=0), np.mean(b, axis=0))


def scenario_table(summaries: Sequence[Summary], *, caption: str) -> Html:
    """Methods down; natural and robust accuracy of every part in percent, mean ± sd over seeds, and collapsed runs.

    With two parts or more the harmonic mean of all of them (H4 for base and new) stands beside. More than two parts do not
    fit with two columns each: then one holds natural / robust.
    """
    lines, wide = [], len(summaries[0].natural) > 2
    for s in summaries:
        line = {"method": s.method}
        for part in s.natural:
            natural, robust = _spread(s.natural[part]), _spread(s.robust[part])
            line |= {part: f"{natural} / {robust}"} if wide else {f"{part}, natural": natural, f"{part}, robust": robust}
        line |= {"harmonic mean": _spread(s.h4)} if len(s.natural) > 1 else {}
        lines.append(line | {"collapsed": f"{s.collapsed} of {s.seeds}"})
    told = "Natural / robust accuracy, percent" if wide else "Percent"
    told += ", mean ± standard deviation over seeds" if summaries[0].seeds > 1 else ""
    return table(lines, caption=f"{caption} {told}.", card_link=True)


def _spread(value: tuple[float, float]) -> str:
    mean, sd = (100 * v for v in value)
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f}\u00a0±\u00a0{sd:.1f}"
