"""Open choices of the chapters on prompt tuning, tried one at a time where those chapters tune: same tower, shots, budget, rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

from .. import runtime
from ..attacks import Attack, get_attack
from ..clip import ZeroShotCLIP
from ..defenses import Defense
from ..fewshot import Scenario, base_to_new, in_distribution
from ..records import Row
from .markup import Html, table
from .measure import images
from .tables import points
from .tuning import backbone, measure_scenario, paired_over_seeds, tune_each

METRICS = {"clean": "clean_acc", "attacked": "robust_acc"}


@dataclass(frozen=True)
class Home:
    """A chapter's protocol on one data set. `run` tunes as that chapter does; rows belong to the page's own run, `page`."""

    page: object
    run: object
    carrier: ZeroShotCLIP
    scenario: Scenario
    pgd: Attack

    @property
    def eps_255(self) -> float:
        return self.run.parameters["eps_255"]

    def at(self, eps_255: float) -> "Home":
        """The same, tuned and tested at another budget."""
        return replace(self, run=replace(self.run, parameters=self.run.parameters | {"eps_255": eps_255}))

    def unsearched(self, rate: float) -> "Home":
        """The same with one factor on each paper's learning rate, for methods that the chapter's search left out."""
        sizes = SimpleNamespace(**vars(self.run.sizes) | {"tuning": self.run.sizes.tuning | {"rate": rate}})
        return replace(self, run=replace(self.run, sizes=sizes))

    def tune(self, variants: Sequence[Mapping], seeds: Sequence[int]) -> dict[int, list[Defense]]:
        """seed -> what `tune` gives for each variant ("name", "label" and options) on the shots that the seed draws."""
        return {seed: tune_each(self.run, self.carrier, self.scenario.train(seed), seed, variants) for seed in seeds}

    def measure(self, tuned: Mapping[int, Sequence[Defense]]) -> list[Row]:
        """Clean and attacked accuracy on every part of the scenario; rows go into the page's card."""
        return measure_scenario(self.page, self.scenario, tuned, self.pgd, self.eps_255)

    def asked(self) -> str:
        """The conditions of a table or figure, in words."""
        parts = " and ".join(f"{len(part)} of {part.name}" for part in self.scenario.tests.values())
        return f"n = {parts}; {self.pgd.label} at ε = {self.eps_255:g}/255"


def home(run, chapter: str, name: str, n: int) -> Home:
    """The protocol of chapter 05 or 06 under the run's profile, on the set `name` with n test images.

    Chapter 05 tunes on all classes of a set and tests on them; 06 tunes on half of them and tests on either half.
    """
    sizes = runtime.profile(chapter, run.profile)
    pool, test = run.load(name, "train", n=dict(sizes.train)[name]), images(run, (name, n))
    asked = run.parameters | {"eps_255": sizes.eps_255}
    inside = replace(run, chapter=chapter, sizes=sizes, parameters=asked)
    kind = base_to_new if chapter == "06_cba_fapt" else in_distribution
    return Home(run, inside, backbone(inside), kind(pool, test, sizes.shots), get_attack(sizes.pgd))


def effects(at: Home, rows: Sequence[Row], reference: str) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """Choice -> (part, "clean" or "attacked") -> its accuracy less the reference's, paired over images, seeds averaged."""
    names = [name for name in dict.fromkeys(row.method for row in rows) if name != reference]
    keys = [(part, head) for part in at.scenario.tests for head in METRICS]
    return {
        name: {(part, head): paired_over_seeds(rows, name, reference, METRICS[head], at.scenario.tests[part].name) for part, head in keys}
        for name in names
    }


def effects_table(found: Mapping[str, Mapping], rows: Sequence[Row], at: Home, reference: str, *, caption: str) -> Html:
    """The reference's accuracies in percent, then what each choice changes, in points with 95 % intervals."""
    keys = list(next(iter(found.values())))
    heads = {key: key[1] if len(at.scenario.tests) == 1 else f"{key[0]}, {key[1]}" for key in keys}
    first = {"choice": f"{reference}, percent"}
    for part, head in keys:
        same = [r.value for r in rows if (r.method, r.dataset, r.metric) == (reference, at.scenario.tests[part].name, METRICS[head])]
        first[heads[part, head]] = f"{100 * sum(same) / len(same):.1f}"
    lines = [{"choice": name} | {heads[key]: points(diff) for key, diff in of.items()} for name, of in found.items()]
    told = f"{caption} Below the first line: points more or less than it, with 95 % paired intervals over images. {at.asked()}."
    return table([first, *lines], caption=told, card_link=True)


def sure(found: Mapping[str, Mapping], head: str) -> list[str]:
    """The choices whose interval excludes zero in `head`, "clean" or "attacked", in any part."""
    return [name for name, of in found.items() if any(key[1] == head and (d[1] > 0 or d[2] < 0) for key, d in of.items())]
