"""What chapter 07 measures beside its main table: attackers that know more and more, AutoAttack's flags, another tower."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import evaluate
from ..attacks import Attack
from ..clip import load_clip
from ..data import ImageSet
from ..defenses import build_test_time
from ..defenses.recipe import Recipe
from ..records import Row
from ..stats import wilson
from .at_test_time import always_right, craft, measure_shown, without_state
from .markup import Html, table
from .spread import spread
from .tables import accuracy_table

TOGETHER = ("worst of all", "clean, as many draws")


class Fresh(nn.Module):
    """A random defense, without state, whose verdict on one attack has draws of its own: k attacks meet k draws, as k questions would."""

    def __init__(self, model: nn.Module, attack: str):
        super().__init__()
        self.model, self.attack = without_state(model), attack

    def keyed(self, keys: Sequence[tuple]) -> nn.Module:
        return self.model.keyed([(*key, self.attack) for key in keys])


def own_images(
    run, name: str, ways: Mapping[str, tuple[Attack, nn.Module]], data: ImageSet, eps_255: float, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rung -> attacked images [N, 3, S, S] made through the defense `name` by each of `ways` (attack, surface).

    known: images made elsewhere in the same way, which are not made again.
    """
    new = {rung: way for rung, way in ways.items() if rung not in known}
    made = {rung: craft(run, *way, data, eps_255, f"{rung}, {name}", batch=8) for rung, way in new.items()}
    return {rung: made[rung] if rung in made else known[rung] for rung in ways}


def on_another_tower(
    run,
    recipes_on: Callable[[ImageSet], Mapping[str, Recipe]],
    tests: Sequence[ImageSet],
    attack: Attack,
    *,
    model: str,
    n: int,
    eps_255: float,
) -> tuple[list[Row], list[ImageSet]]:
    """(rows, sets) of CLIP and defenses on the first n images, by class, of each set, attacked on that tower undefended.

    recipes_on: what a data set is defended with. model: a registered CLIP. Rows are named "R-TPT, <model>", so that no claim
    about the page's own tower reads them.
    """
    clip, rows, sets = load_clip(model, device=run.device), [], [d.balanced(min(n, len(d)), run.seed) for d in tests]
    for data in sets:
        built = {m: build_test_time(m, clip, recipe).classifier(data.class_names) for m, recipe in recipes_on(data).items()}
        bare = next(iter(built.values())).undefended()
        shown = {"none": data.pixels(), attack.name: craft(run, attack, bare.fast(), data, eps_255, f"{attack.name} on {model}")}
        named = {f"{m}, {model}": other for m, other in ({"CLIP": bare} | built).items()}
        rows += measure_shown(run, named, data, shown, eps_255)[0]
    return rows, sets


def climb(
    run, models: Mapping[str, nn.Module], data: ImageSet, shown: Mapping[str, Mapping[str, Tensor]], eps_255: float
) -> tuple[list[Row], dict[str, Row], dict[str, float]]:
    """(rows, worst case of each defense, share of clean images right in as many fresh draws); rows go into the card.

    shown: defense -> rung -> attacked images [N, 3, S, S] of `data`. The verdict on each rung has fresh draws.
    """

    def asked(name: str, rung: str) -> list[Row]:
        return measure_shown(run, {name: Fresh(models[name], rung)}, data, {rung: shown[name][rung]}, eps_255)[0]

    pairs = [(name, rung) for name, rungs in shown.items() for rung in rungs]
    rows = [row for found in spread(run, [partial(asked, *pair) for pair in pairs], "verdicts on the ladder") for row in found]
    run.card.add(rows)
    worst = {name: evaluate.worst_case([r for r in rows if r.method == name]) for name in shown}
    run.card.add(worst.values())
    controls = [partial(always_right, run, models[name], data, len(rungs)) for name, rungs in shown.items()]
    shares = [right.float().mean().item() for right in spread(run, controls, "clean images, as many draws")]
    return rows, worst, dict(zip(shown, shares, strict=True))


def rungs_of(
    rows: Sequence[Row], worst: Mapping[str, Row], control: Mapping[str, float]
) -> tuple[dict[str, dict[str, tuple[float, float, float]]], dict[str, list[str]]]:
    """({rung: {defense: (value, low, high)}}, {heading: rungs}) of what `climb` gave, for a figure; T0 … T5 name the rungs."""
    at = {r.attack: {} for r in rows} | {name: {} for name in TOGETHER}
    for r in rows:
        at[r.attack][r.method] = (r.value, *r.ci95)
    for name, r in worst.items():
        at[TOGETHER[0]][name] = (r.value, *r.ci95)
        at[TOGETHER[1]][name] = (control[name], *wilson(round(control[name] * r.n), r.n))
    kinds = {"knows CLIP alone": ("T0", "T1", "T5"), "knows of views": ("T2",), "attacks the defense": ("T3", "T4")}
    return at, {head: [k for k in at if k[:2] in kind] for head, kind in kinds.items()} | {"together": list(TOGETHER)}


def flags_table(run, model: nn.Module, others: Sequence[nn.Module], data: ImageSet) -> Html:
    """AutoAttack's flags of a defense at test time: random answers, and optimization inside the forward pass.

    others: further defenses, of which those that optimize are counted.
    """
    x = data.pixels(slice(0, 4)).to(run.device)
    fixed = evaluate.for_images(model, data, range(len(x)), run.seed)
    with torch.no_grad():
        free, keyed = [[m(x) for _ in range(2)] for m in (model, fixed)]
        for other in others:
            other(x[:1])
    tuned = sum(other.passes.text_backwards > 0 for other in others)
    raised = {
        "two calls differ: a random defense": not torch.equal(*free),
        "two calls with the same keys differ": not torch.equal(*keyed),
        f"gradients inside the forward pass (as in {tuned} of {len(others)} methods)": model.passes.text_backwards > 0,
    }
    lines = [{"flag": flag, "raised": "yes" if value else "no"} for flag, value in raised.items()]
    return table(lines, caption="AutoAttack's flags, asked of the released form.")


def accuracy_tables(rows: Sequence[Row], sets: Sequence[ImageSet], caption: str) -> list[Html]:
    """Clean and attacked accuracy of each set: one table, or one for each where that would be too wide."""
    heads = [
        {f"{metric.split('_')[0]}, {d.name.split(':')[0].split('/')[-1]}": {"dataset": d.name, "metric": metric} for d in sets}
        for metric in ("clean_acc", "robust_acc")
    ]
    wide = len(sets) > 3  # a table holds seven columns
    return [accuracy_table(rows, columns=columns, caption=caption) for columns in (heads if wide else [heads[0] | heads[1]])]
