"""Every CLIP defense as one kind of candidate: what judges an image, what an attacker may go through, and what an answer costs."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import attacks, defenses, evaluate
from ..attacks import Attack, renamed
from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..defenses import Defense, Recipe
from ..records import Row, column
from ..stats import bootstrap_mean, paired_shares
from .at_test_time import always_right, craft, without_state
from .markup import Html, table
from .measure import measure_images
from .memory import peak_bytes
from .spread import spread
from .tables import points

PLAIN = ("a photo of a {}.",)  # the template of every defense at test time, and of learned prompts


@dataclass(frozen=True)
class Candidate:
    """A defended classifier of one data set.

    model: pixels [B, 3, S, S] in [0, 1] to logits [B, C]; it judges. ways: name of an attack -> (the attack, what it
    differentiates), all that an attacker who knows this defense tries.
    """

    name: str
    kind: str
    model: nn.Module
    ways: Mapping[str, tuple[Attack, nn.Module]] = field(default_factory=dict)


def static(name: str, kind: str, defense: Defense, data: ImageSet, specs: Sequence[str]) -> Candidate:
    """A model that answers alike whenever asked: each attack of `specs` goes straight through it."""
    model = defense.classifier(data.class_names, data.templates)
    surface = defense.attack_surface(model)
    return Candidate(name, kind, model, {spec: (attacks.get_attack(spec), surface) for spec in specs})


def at_test_time(
    name: str, kind: str, clip: ZeroShotCLIP, method: str, data: ImageSet, *,
    n_views: int, few: int, specs: Sequence[str], long_steps: int, short_steps: int, short: Sequence[str],
) -> Candidate:  # fmt: skip
    """A method of `defenses.TEST_TIME` in front of a CLIP, fine-tuned or not, answering from `n_views` views.

    Each of `specs` attacks the tower behind it alone. "long" goes through `few` views of the defense itself, new ones in each of
    its steps (EOT). short: further attacks through it, of fewer steps: "margin", and "step", which gives the sign in the step
    of a tuned prompt a slope. The attacker's copy carries nothing from image to image.
    """
    recipe = defenses.TEST_TIME[method]
    whole = recipe and _fewer(recipe, n_views)
    model = defenses.build_test_time(method, clip, whole).classifier(data.class_names, PLAIN)
    target, tower = model, clip.classifier(data.class_names, PLAIN).fast()
    if isinstance(whole, Recipe):
        forgets = replace(_fewer(whole, few), quirk_leak=False)
        target = defenses.build_test_time(method, clip, forgets).classifier(data.class_names, PLAIN).fast()
    ways = {f"{spec} on its tower": (attacks.get_attack(spec), tower) for spec in specs}
    ways["long"] = (attacks.expectation(long_steps), target)
    if "margin" in short:
        ways["margin"] = (attacks.expectation(short_steps, objective="margin"), target)
    if "step" in short and isinstance(recipe, Recipe) and recipe.loss:
        ways["step"] = (attacks.expectation(short_steps), target.smooth())
    return Candidate(name, kind, model, ways)


def _fewer(recipe: Recipe, n_views: int) -> Recipe:
    """A recipe of so many views, of which at least two are chosen where any are: a view alone would tune on itself."""
    small = recipe.fewer(n_views)
    return replace(small, chosen=max(2, small.chosen)) if recipe.loss else small


def crafted(run, attack: Attack, surface: nn.Module, data: ImageSet, eps_255: float, name: str, batch: int = 16) -> Tensor:
    """As `craft`: attacked images [N, 3, S, S] on the 8-bit grid; those of an interrupted run are found again in its folder."""
    key = repr((run.seed, data.sha256, eps_255, name, attack.params, attack.n_steps, evaluate.weights_sha256(surface)))
    key += getattr(surface, "settings", "")
    path = run.out / "crafted" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["images"].float() / 255
    images = craft(run, attack, surface, data, eps_255, name, batch)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    save_file({"images": (255 * images).round().to(torch.uint8)}, part)
    part.replace(path)
    return load_file(path)["images"].float() / 255


def made_through(run, candidate: Candidate, way: str, data: ImageSet, eps_255: float) -> Tensor:
    """The images that one of its own attacks makes against a candidate."""
    attack, surface = candidate.ways[way]
    return crafted(run, renamed(attack, way), surface, data, eps_255, f"{way}, {candidate.name}")


def besieged(run, candidate: Candidate, data: ImageSet, shared: Mapping[str, Tensor], eps_255: float) -> tuple[list[Row], Row]:
    """(rows, worst case) of a candidate: clean, on the images that everybody is shown, and on those made against it.

    The worst case counts an image as lost if any attack takes it, or if it is wrong unchanged: an attacker may do nothing.
    A random model answers with one draw an image throughout, which no attack has seen, so k attacks are not k chances; every
    measurement begins without state. An attack of its own that everybody is shown already is not counted twice.
    """

    def judged(images: Tensor, attack: str, eps: float) -> Row:
        return measure_images(run, candidate.name, without_state(candidate.model), data, images, attack, eps)

    shown = dict(shared)
    for way in candidate.ways:
        images = made_through(run, candidate, way, data, eps_255)
        if not any(torch.equal(images, other) for other in shared.values()):
            shown[way] = images
    rows = [judged(data.pixels(), "none", 0.0), *(judged(x_adv, way, eps_255) for way, x_adv in shown.items())]
    rows.append(_unchanged(rows[0], eps_255))
    worst = evaluate.worst_case(rows)
    run.card.add([rows[-1], worst])
    return rows, worst


def besieged_each(
    run, candidates: Sequence[Candidate], data: ImageSet, shared: Mapping[str, Tensor], eps_255: float
) -> tuple[dict[str, list[Row]], dict[str, Row]]:
    """(rows, worst case) of `besieged` by the name of each candidate, on all cores at once."""
    found = spread(run, [partial(besieged, run, c, data, shared, eps_255) for c in candidates], "siege")
    run.card.add(row for rows, worst in found for row in (*rows, worst))
    return tuple({c.name: pair[k] for c, pair in zip(candidates, found, strict=True)} for k in (0, 1))


def stages(rows: Sequence[Row], worst: Row, oblivious: str) -> dict[str, Row]:
    """What a reader compares of a method: clean, under the attack that does not know it, and in the worst case."""
    return {"clean": rows[0], "attack on CLIP": next(row for row in rows if row.attack == oblivious), "worst case": worst}


def intervals(heads: Mapping[str, Row]) -> dict[str, tuple[float, float, float]]:
    """(value, low, high) of each row, as figures take them."""
    return {head: (row.value, *row.ci95) for head, row in heads.items()}


def _unchanged(clean: Row, eps_255: float) -> Row:
    """The clean verdicts as those of an attacker who does nothing, in a row and records of their own."""
    records = clean.records
    for name, value in (("attack", "unchanged"), ("eps_255", eps_255)):
        at = records.schema.get_field_index(name)
        kind = records.schema.field(at).type
        records = records.set_column(at, name, pa.array([value] * len(records), type=kind))
    return replace(clean, metric="robust_acc", attack="unchanged", eps_255=eps_255, records=records)


def chance_alone(run, candidate: Candidate, data: ImageSet, rows: Sequence[Row], worst: Row) -> tuple[dict, tuple[float, float, float]]:
    """(a line of a table, worst case - control, paired) of a random model: the control asks clean images as often, draws anew,
    and counts an image that is right in each draw."""
    asked = len(rows) - 1  # the unchanged row is the clean one again
    right = always_right(run, candidate.model, data, asked).numpy()
    diff = paired_shares(column(worst.records.sort_by("index"), "correct"), right)
    shares = {"clean, one draw": rows[0].value, "clean, right in all": right.mean().item(), "worst case": worst.value}
    line = {"method": candidate.name, "draws": asked} | {head: 100 * share for head, share in shares.items()}
    return line | {"worst case less that": points(diff)}, diff


def chances_alone(
    run, candidates: Sequence[Candidate], data: ImageSet, rows: Mapping[str, Sequence[Row]], worst: Mapping[str, Row]
) -> dict[str, tuple[dict, tuple[float, float, float]]]:
    """`chance_alone` of each random model among the candidates by its name, on all cores at once."""
    asked = [c for c in candidates if hasattr(c.model, "keyed")]
    found = spread(run, [partial(chance_alone, run, c, data, rows[c.name], worst[c.name]) for c in asked], "chance alone")
    return {c.name: pair for c, pair in zip(asked, found, strict=True)}


# ---- the price of an answer


@dataclass(frozen=True)
class Price:
    """Of one clean image: seconds (mean, low, high over rounds), MiB held when asked alone, and passes through the towers."""

    seconds: tuple[float, float, float]
    mebibytes: float
    forwards: float
    backwards: float
    texts: float


def prices(run, candidates: Sequence[Candidate], data: ImageSet, *, rounds: int = 9) -> dict[str, Price]:
    """Each candidate asked about all images of `data`, one after the other in every round; rows go into the card.

    Seconds are per image of the batch; memory and passes are those of the first image, asked alone.
    """
    x, index, n = data.pixels().to(run.device), range(len(data)), len(data)
    asked = {c.name: evaluate.for_images(c.model, data, index, run.seed) for c in candidates}
    seconds, found = {name: [] for name in asked}, {}
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first round warms up
            for name, model in asked.items():
                began = time.perf_counter()
                model(x)
                if run.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - began) / n)
        for c in candidates:
            model = without_state(c.model)  # class texts are kept from its first call on
            alone = evaluate.for_images(model, data, range(1), run.seed)
            alone(x[:1])
            before = _passes(model)
            held = peak_bytes(lambda alone=alone: alone(x[:1])) / 2**20
            spent = [float(b - a) for a, b in zip(before, _passes(model), strict=True)]
            kept = np.array(seconds[c.name][1:])
            mean, interval = kept.mean().item(), bootstrap_mean(kept)
            forwards, backwards, texts = spent if hasattr(c.model, "passes") else (1.0, 0.0, 0.0)
            found[c.name] = Price((mean, *interval), held, forwards, backwards, texts)
            where = (c.name, data.name, "none", 0.0)
            run.card.add(Row(*where, "image_s", rounds, mean, interval, extra={"seed": run.seed}))
            run.card.add(Row(*where, "image_mib", 1, held, (held, held), extra={"seed": run.seed}))
    return found


def _passes(model: nn.Module) -> list[int]:
    passes = getattr(model, "passes", None)
    return [passes.image_forwards, passes.image_backwards, passes.text_forwards] if passes else [0, 0, 0]


def price_table(priced: Mapping[str, Price], *, caption: str) -> Html:
    """One line a candidate."""
    heads = ("image passes", "backward", "class texts", "ms an image", "MiB, one image")
    lines = []
    for name, p in priced.items():
        shown = (f"{p.forwards:.0f}", f"{p.backwards:.0f}", f"{p.texts:.0f}", f"{1000 * p.seconds[0]:.1f}", f"{p.mebibytes:.1f}")
        lines.append({"method": name} | dict(zip(heads, shown, strict=True)))
    return table(lines, caption=caption)


# ---- orders


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, gain) that no other beats: none is at most as costly and better, or cheaper and as good."""

    def beaten(cost: float, gain: float) -> bool:
        others = points.values()
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in others)

    kept = [name for name, point in points.items() if not beaten(*point)]
    return sorted(kept, key=lambda name: points[name][0])


def order_kept(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[int, int, int]:
    """(kept, tied, reversed) of the pairs that either tells apart: ordered alike, a tie in one of the two, the other way round."""
    names, counts = list(a), [0, 0, 0]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            signs = [np.sign(v[first] - v[second]) for v in (a, b)]
            if any(signs):
                counts[0 if signs[0] == signs[1] else 2 if all(signs) else 1] += 1
    return tuple(counts)


def leaders(values: Mapping[str, float]) -> list[str]:
    """All names that share the highest value."""
    return [name for name, value in values.items() if value == max(values.values())]


def listed(names: Sequence[str], none: str = "no method") -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = names or [none]
    return f"{', '.join(most)} and {last}" if most else last
