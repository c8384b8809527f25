"""What the chapter on defenses at test time repeats: images made once and shown to everyone, fresh draws, passes and seconds."""

import time
from collections.abc import Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from .. import attention, evaluate
from ..attacks import Attack
from ..data import ImageSet
from ..records import Row
from ..threat import ThreatModel, audit, to_8bit
from .markup import Html, table
from .measure import measure_images, measure_maps
from .spread import spread

TEXTS = 8000  # prompts in memory at once, with what their gradient needs


def without_state(model: nn.Module) -> nn.Module:
    """The same classifier without what the images before left in it, as released A-TPT keeps it; any other as it is."""
    recipe = getattr(model, "recipe", None)
    return model.fewer(recipe.n_views) if recipe is not None and recipe.quirk_leak else model


def craft(run, attack: Attack, surface: nn.Module, data: ImageSet, eps_255: float, name: str = "", batch: int = 32) -> Tensor:
    """Attacked images [N, 3, S, S] of all of `data`, audited, on the 8-bit grid and inside the budget; on the CPU.

    surface: what the attacker differentiates; every batch meets it without state, whichever process takes it. name: of what
    is attacked, where the attack's own name does not say it; all random numbers depend on it.
    """
    threat = ThreatModel(eps_255)

    def attacked(index: Tensor) -> Tensor:
        x, y = data.pixels(index).to(run.device), data.labels[index].to(run.device)
        keys = [(run.seed, data.name, name or attack.name, eps_255, int(i)) for i in index]
        seen = without_state(surface)
        seen = seen.streaming(keys) if hasattr(seen, "streaming") else seen
        x_adv = attack.run(seen, x, y, threat, keys)
        audit(x, x_adv, threat)
        return to_8bit(x_adv, x, threat).cpu()

    parts = torch.arange(len(data)).split(batch)
    return torch.cat(spread(run, [partial(attacked, index) for index in parts], f"{name or attack.name} on {data.name}"))


def measure_shown(
    run, models: Mapping[str, nn.Module], data: ImageSet, shown: Mapping[str, Tensor], eps_255: float
) -> tuple[list[Row], dict[str, float]]:
    """(rows, seconds an image of the first set) of every model on images that were made elsewhere; rows go into the card.

    shown: attack -> images [N, 3, S, S] of `data`; "none" are the clean ones. As many images are asked at once as keep to
    TEXTS prompts, since each has a prompt of its own for every class. Every question begins without state, as in a process of its own.
    """
    batch = max(1, min(128, TEXTS // len(data.class_names)))

    def asked(method: str, attack: str) -> tuple[Row, float]:
        began = time.perf_counter()
        eps = 0.0 if attack == "none" else eps_255
        row = measure_images(run, method, without_state(models[method]), data, shown[attack], attack, eps, batch=batch)
        return row, (time.perf_counter() - began) / len(data)

    found = spread(run, [partial(asked, *pair) for pair in product(models, shown)], f"verdicts on {data.name}")
    run.card.add(row for row, _ in found)
    seconds = {}
    for row, took in found:
        seconds.setdefault(row.method, took)
    return [row for row, _ in found], seconds


def always_right(run, model: nn.Module, data: ImageSet, draws: int) -> Tensor:
    """[N] bool, on the CPU: clean images that a random model names rightly in each of `draws` fresh draws; what chance alone leaves."""
    right = torch.ones(len(data), dtype=torch.bool)
    for k in range(draws):
        keys = [(run.seed, data.name, "fresh", k, i) for i in range(len(data))]
        with torch.no_grad():
            right &= without_state(model).keyed(keys)(data.pixels().to(run.device)).argmax(dim=1).cpu() == data.labels
    return right


def passes_table(run, models: Mapping[str, nn.Module], data: ImageSet, seconds: Mapping[str, float], *, caption: str) -> Html:
    """Passes of an image through both towers, counted on the first four images, and seconds; models without a counter take one pass."""
    lines = []
    for method, model in models.items():
        passes = [1, 0, 0, 0]
        if hasattr(model, "passes"):
            before = list(vars(model.passes).values())
            few = range(min(4, len(data)))
            with torch.no_grad():
                evaluate.for_images(model, data, few, run.seed)(data.pixels(slice(len(few))).to(run.device))
            passes = [(b - a) / len(few) for a, b in zip(before, vars(model.passes).values(), strict=True)]
        heads = ("image passes", "backward", "class texts", "backward, text")
        counts = {head: f"{p:.0f}" for head, p in zip(heads, passes, strict=True)}
        lines.append({"method": method} | counts | {"s an image": f"{seconds[method]:.3f}"})
    return table(lines, caption=caption)


def maps_table(
    run, data: ImageSet, maps: Mapping[str, tuple[Tensor, Tensor]], prior: Tensor, attack: str, eps_255: float, *, r: float, caption: str
) -> tuple[dict[str, float], Html]:
    """({glue name: value}, table) of maps on clean and attacked scenes against exact masks and a center prior.

    maps: name -> (clean, attacked), each [N, patches]. Of its top share r, a map and its attacked self share a part.
    """
    clean = {"center prior": prior} | {name: pair[0] for name, pair in maps.items()}
    rows = measure_maps(run, "CLIP", data, clean, "none", 0.0, against="center prior")
    moved = {row.extra["map"]: row for row in measure_maps(run, "CLIP", data, {k: p[1] for k, p in maps.items()}, attack, eps_255)}
    facts, lines = {"iou-prior": rows[0].value}, []
    for row in rows:
        name, line = row.extra["map"], {"map": row.extra["map"], "IoU, clean": f"{row.value:.3f}"}
        line |= {"95 % interval": f"{row.ci95[0]:.3f} to {row.ci95[1]:.3f}", "IoU, attacked": "same", "kept": "all"}
        if name in maps:
            top = [m > m.quantile(1 - r, dim=1, keepdim=True) for m in maps[name]]
            kept = attention.iou(*top).mean().item()
            line |= {"IoU, attacked": f"{moved[name].value:.3f}", "kept": f"{kept:.2f}"}
            facts |= {f"iou-{name}": row.value, f"iou-adv-{name}": moved[name].value, f"kept-{name}": kept}
        lines.append(line)
    return facts, table(lines, caption=caption)
