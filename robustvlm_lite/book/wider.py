"""Few-shot scenarios beyond the main one: other sets, other numbers of shots. What chapters 05 and 06 share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..attacks import Attack
from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..fewshot import Scenario, Summary, in_distribution, summarize
from ..records import Row, column
from .markup import Html, table
from .tuning import _spread, marked, measure_scenario, tune_scenario


def measured(run, scenario: Scenario, models: Mapping[int, Sequence], attack: Attack, eps_255: float) -> tuple[list[Row], list[Summary]]:
    """(rows, a summary a method) of defenses tuned on a scenario, seed -> defenses; rows go into the card."""
    rows = measure_scenario(run, scenario, models, attack, eps_255)
    marks = marked(models, len(scenario.train(next(iter(models))).class_names))
    return rows, summarize(rows, scenario, attack=attack.name, eps_255=eps_255, marked=marks)


def largest_class_share(rows: Sequence[Row], method: str, metric: str = "robust_acc") -> float:
    """Of the images that a method names rightly, in all its rows of a metric, the share of the class that it keeps best; 0 of none."""
    of_method = [row.records for row in rows if (row.method, row.metric) == (method, metric)]
    kept = np.concatenate([column(records, "label")[column(records, "correct").astype(bool)] for records in of_method])
    return np.bincount(kept).max().item() / len(kept) if len(kept) else 0.0


def tune_and_measure(
    run, carrier: ZeroShotCLIP, scenario: Scenario, methods: Sequence[str], seeds: Sequence[int], attack: Attack, eps_255: float
) -> list[Summary]:
    """A summary of each method, tuned once a seed on the scenario's shots and measured on its parts."""
    return measured(run, scenario, tune_scenario(run, carrier, scenario, methods, seeds), attack, eps_255)[1]


def with_shots(scenario: Scenario, shots: int) -> Scenario:
    """The scenario with its parts named "<set>:<part>, <shots> shots", so that no claim about the main number of shots reads them."""
    named = {part: replace(images, name=f"{images.name}, {shots} shots") for part, images in scenario.tests.items()}
    return Scenario(scenario.name, scenario.train, named)


def other_sets(pools: Sequence[ImageSet], tests: Sequence[ImageSet], shots: Sequence[int]) -> dict[str, Scenario]:
    """"<set>, <shots> shots" -> in-distribution scenario, for every set and number of shots but the first of both."""
    found = {}
    for k in shots:
        for pool, test in zip(pools, tests, strict=True):
            scenario = in_distribution(pool, test, k)
            found[f"{test.name}, {k} shots"] = scenario if k == shots[0] else with_shots(scenario, k)
    return dict(list(found.items())[1:])


def sets_table(found: Mapping[str, Sequence[Summary]], *, caption: str) -> Html:
    """Scenarios of one part down, methods across: natural / robust accuracy in percent, and collapsed runs of all."""
    lines = []
    for head, summaries in found.items():
        line = {"set": head}
        for s in summaries:
            (part,) = s.natural
            line[s.method] = f"{_spread(s.natural[part])} / {_spread(s.robust[part])}"
        lines.append(line | {"collapsed": f"{sum(s.collapsed for s in summaries)} of {sum(s.seeds for s in summaries)}"})
    return table(lines, caption=f"{caption} Natural / robust accuracy, percent.", card_link=True)
