"""Few-shot tuning as the prompt papers measure it: what a method learns on, what it is then asked, what several seeds say.

A scenario is one training set and named test sets. A method is tuned once a seed, which draws the shots, the start of the
prompts and the order of the batches; all seeds meet the same test images. A collapsed run stays in every mean and is
counted beside it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .data import ImageSet, base_and_new, few_shot, leave_out
from .records import Row, column
from .runtime import UserError
from .stats import harmonic_mean, seed_spread, wilson


@dataclass(frozen=True)
class Scenario:
    """train(seed) draws the shots; tests: part -> test set, each with the class names that compete in it."""

    name: str
    train: Callable[[int], ImageSet]
    tests: Mapping[str, ImageSet]


def in_distribution(train: ImageSet, test: ImageSet, shots: int) -> Scenario:
    """Shots of every class, then the test split of the same set. shots = 0 takes all images."""
    _same_classes(train, test)
    whole = replace(test, name=f"{test.name}:all")
    return Scenario("in-distribution", lambda seed: few_shot(train, shots, seed), {"all": whole})


def base_to_new(train: ImageSet, test: ImageSet, shots: int) -> Scenario:
    """Shots of the first half of the classes; the test images of either half, among that half's names alone."""
    _same_classes(train, test)
    halves = dict(zip(("base", "new"), base_and_new(test), strict=True))
    tests = {part: replace(half, name=f"{test.name}:{part}") for part, half in halves.items()}
    return Scenario("base to new", lambda seed: base_and_new(few_shot(train, shots, seed))[0], tests)


def across(train: ImageSet, test: ImageSet, others: Sequence[ImageSet], shots: int) -> Scenario:
    """Shots of one set, then its own test split and other sets, whose class names replace its own."""
    _same_classes(train, test)
    tests = {"source": replace(test, name=f"{test.name}:source")}
    tests |= {other.name: replace(other, name=f"{other.name}:across") for other in others}
    return Scenario("across data sets", lambda seed: few_shot(train, shots, seed), tests)


def domain_out(train: ImageSet, test: ImageSet, domain: str, shots: int) -> Scenario:
    """Shots from all domains but one; the test images of the others and of the one that was left out."""
    _same_classes(train, test)
    seen, unseen = leave_out(test, domain)
    tests = {"other domains": replace(seen, name=f"{test.name}:not {domain}")}
    tests |= {domain: replace(unseen, name=f"{test.name}:{domain}")}
    return Scenario(f"without {domain}", lambda seed: few_shot(leave_out(train, domain)[0], shots, seed), tests)


@dataclass(frozen=True)
class Summary:
    """One method over its seeds. natural, robust: part -> (mean, sd), sd NaN for a single seed.

    hm_natural, hm_robust: harmonic means over the parts, h4 over parts and both kinds; each (mean, sd) of the seeds'
    values. collapsed: how many of `seeds` runs gave nearly every image one answer.
    """

    method: str
    seeds: int
    natural: dict[str, tuple[float, float]]
    robust: dict[str, tuple[float, float]]
    hm_natural: tuple[float, float]
    hm_robust: tuple[float, float]
    h4: tuple[float, float]
    collapsed: int


def summarize(
    rows: Iterable[Row], scenario: Scenario, *, attack: str, eps_255: float, marked: Collection[tuple[str, int]] = ()
) -> list[Summary]:
    """A summary a method of the rows that `evaluate` gave for the scenario's tests.

    attack, eps_255: of the robust rows to take. marked: (method, seed) of runs that collapsed in training; those whose
    clean answers have (`has_collapsed`) are found here. Raises UserError if a method, part or seed lacks a row.
    """
    found: dict[tuple, Row] = {}
    for row in rows:
        if row.metric == "clean_acc" or (row.metric, row.attack, row.eps_255) == ("robust_acc", attack, eps_255):
            found[row.method, row.dataset, row.metric, row.extra["seed"]] = row
    methods = list(dict.fromkeys(key[0] for key in found))
    seeds = sorted({key[3] for key in found})

    def value(*key) -> float:
        if key not in found:
            raise UserError(f"expected a row for each method, part and seed, got none for {key}; evaluate it, too")
        return found[key].value

    summaries = []
    for m in methods:
        table = {
            (part, metric): [value(m, test.name, metric, seed) for seed in seeds]
            for part, test in scenario.tests.items()
            for metric in ("clean_acc", "robust_acc")
        }
        natural, robust = ({p: v for (p, metric), v in table.items() if metric == k} for k in ("clean_acc", "robust_acc"))
        broken = {s for s in seeds if (m, s) in marked}
        broken |= {
            s for s in seeds for test in scenario.tests.values()
            if has_collapsed(found[m, test.name, "clean_acc", s], len(test.class_names))
        }  # fmt: skip
        spreads = [{part: seed_spread(v)[:2] for part, v in kind.items()} for kind in (natural, robust)]
        means = [_hm(kind.values()) for kind in (natural, robust, table)]
        summaries.append(Summary(m, len(seeds), *spreads, *means, len(broken)))
    return summaries


def has_collapsed(clean: Row, n_classes: int) -> bool:
    """Does one class take more than half of the answers, while the accuracy is not above that of giving it always?"""
    labels, answers = (column(clean.records, name) for name in ("label", "prediction"))
    given = np.bincount(answers, minlength=n_classes)
    guessing = max((labels == given.argmax()).mean(), 1 / n_classes)
    return bool(given.max() > clean.n / 2 and wilson(round(clean.value * clean.n), clean.n)[0] <= guessing)


def _hm(values: Iterable[Sequence[float]]) -> tuple[float, float]:
    """(mean, sd) over seeds of the harmonic mean of what each seed reached."""
    return seed_spread([harmonic_mean(*each) for each in zip(*values, strict=True)])[:2]


def _same_classes(train: ImageSet, test: ImageSet) -> None:
    if train.class_names != test.class_names:
        raise UserError(
            f"expected one list of classes in training and test, got {len(train.class_names)} and {len(test.class_names)} "
            f"of {train.name} and {test.name}; load both splits of one set"
        )
