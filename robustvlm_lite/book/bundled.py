"""What the cards of the bundled CLIPs say: how each was made, what it had learned when, what it knows.

`data_scripts/clip_card.py` writes a card beside the weights. A new model's card appears in every table by itself.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import yaml

from ..runtime import asset
from .markup import Html, table
from .tables import with_interval

NOISY = ("oxford_pets_3class",)  # a fiftieth of its 480 training rows is held back: too few for a curve
MEAN = "mean"


def model_cards() -> dict[str, dict]:
    """Name -> card of every bundled CLIP (assets/clip/*.card.json), the fewest parameters first."""
    paths = asset("clip").glob("*.card.json")
    cards = {path.name.removesuffix(".card.json"): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(cards.items(), key=lambda item: item[1]["parameters"]))


def learning_curves(card: Mapping) -> dict[str, tuple[list[float], list[float]]]:
    """Pack -> (millions of images seen, accuracy on training rows that were held back), and the mean of the packs."""
    points = card["validation_curve"]
    per_step = card["images_seen"] / card["recipe"]["steps"]
    seen = [point["step"] * per_step / 1e6 for point in points]
    packs = [name for name in points[0]["validation"] if name not in NOISY]
    curves = {name: (seen, [point["validation"][name] for point in points]) for name in packs}
    means = [sum(point["validation"][name] for name in packs) / len(packs) for point in points]
    return curves | {MEAN: (seen, means)}


def nearly_done(curve: tuple[Sequence[float], Sequence[float]], within: float = 0.01) -> float:
    """Where a curve (x, y) first comes within `within` of its highest value."""
    return next(x for x, y in zip(*curve, strict=True) if y >= max(curve[1]) - within)


def least_seconds(card: Mapping) -> float:
    """Seconds of the whole training if every step at an image side had gone as fast as the fastest stretch at that side.

    Elapsed time counts what else the machine did. A stretch lies between two points of the curve; a side without one takes
    the mean of the whole run.
    """
    recipe, paces = card["recipe"], {}
    for a, b in pairwise(card["validation_curve"]):
        if a["size"] == b["size"]:
            pace = (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
            paces[a["size"]] = min(pace, paces.get(a["size"], pace))
    mean = card["wall_s"] / recipe["steps"]
    return sum(share * recipe["steps"] * paces.get(side, mean) for side, share in recipe["sizes"])


def making_table(cards: Mapping[str, Mapping]) -> Html:
    """What each model is and what its training took: facts down, models across."""
    lines: dict[str, dict] = {}
    for name, card in cards.items():
        recipe = card["recipe"]
        sizes = ", ".join(f"{100 * share:.0f} % at {side}" for side, share in recipe["sizes"])
        facts = {
            "parameters, both towers": f"{card['parameters']:,}",
            "weights file": f"{card['bytes'] / 2**20:.1f} MiB, half precision",
            "training images": f"{card['train_images']:,}, and rendered scenes",
            "rendered share of a batch": f"{100 * recipe['rendered']:.0f} %",
            "steps": f"{recipe['steps']:,}, {recipe['procs']} × {recipe['batch']} images each",
            "images seen": f"{card['images_seen'] / 1e6:.2f} million",
            "image side by share of the steps": f"{sizes} pixels",
            "learning rates": f"Muon {recipe['lr_muon']:g} (block matrices), AdamW {recipe['lr_adamw']:g} (the rest)",
            "weight decay": f"Muon {recipe['weight_decay_muon']:g}, AdamW {recipe['weight_decay']:g}",
            "moving average": f"{recipe['ema']:g} a step",
            "took, beside other work": f"{card['wall_s'] / 3600:.1f} hours on {card['machine']}",
            "at the pace of its fastest stretches": f"{least_seconds(card) / 3600:.1f} hours",
        }
        for fact, value in facts.items():
            lines.setdefault(fact, {"": fact})[name] = value
    return table(list(lines.values()), caption="How the bundled models were made, from their cards.")


def known_table(cards: Mapping[str, Mapping]) -> Html:
    """Zero-shot accuracy on every whole test split: data sets down, models across, beside what guessing gives."""
    lines: dict[str, dict] = {}
    for name, card in cards.items():
        for data_set, found in card["zero_shot"].items():
            facts = {"data set": data_set, "classes": found["classes"], "images": found["n"]}
            line = lines.setdefault(data_set, facts | {"chance": 100 / found["classes"]})
            line[name] = with_interval(found["accuracy"], found["ci95"])
    caption = (
        "Zero-shot accuracy in percent on whole test splits, from the models' cards; in parentheses 95 % intervals."
    )
    return table(list(lines.values()), caption=caption, formats={"chance": ".1f"})


def notes_tables(section: str) -> list[Html]:
    """Notes on the making of the models (assets/clip/notes.yml): what was "tried", or its "memory"; one table a question."""
    notes = yaml.safe_load(asset("clip", "notes.yml").read_text(encoding="utf-8"))[section]
    return [
        table(
            [{"": name} | dict(zip(note["columns"], row, strict=True)) for name, row in note["rows"].items()],
            caption=" ".join(note[part] for part in ("question", "conditions")),
            formats=dict.fromkeys(note["columns"], ".1f"),
        )
        for note in notes
    ]
