"""What a run would cost before anybody pays for it: passes counted on a committed card, carried over to another profile
by its sizes, times the arithmetic of one pass.

Nothing here is measured on a GPU. A card counts images through the image tower; a profile says how many images, steps,
budgets and training steps there are; a backbone's configuration says what one image costs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .attacks import get_attack
from .runtime import PROFILES, UserError, asset, profile

SUSTAINED = 10e12  # FLOP/s that a GPU is taken to keep up, about a third of the float32 peak of an RTX 3090
MLP_RATIO = 4.0  # CLIP's, unless a configuration says otherwise
# Matrix products in a backward pass, in forwards: an attack needs the gradient of activations, training that of weights too.
ATTACK_BACKWARD, TRAINING_BACKWARD = 1, 2
MATCHED = ("clean_acc", "robust_acc")  # one row a cell; worst cases and 8-bit verdicts repeat its passes


@dataclass(frozen=True)
class Tower:
    """FLOPs (two for each multiply-add) of one image and of one text, forward."""

    image: float
    text: float


def architecture(model: str) -> dict:
    """The open_clip configuration of a bundled model or of one that open_clip knows; nothing is imported or loaded."""
    folders = [asset("clip")]
    if spec := find_spec("open_clip"):
        folders.append(Path(spec.submodule_search_locations[0]) / "model_configs")
    for folder in folders:
        if (path := folder / f"{model}.json").is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise UserError(f"expected a bundled CLIP or an architecture of open_clip, got {model!r}; check the name")


def tower(model: str) -> Tower:
    """The arithmetic of a CLIP with vision transformer, in closed form.

    A block of width W on T tokens takes T (4 + 2 r) W² + 2 T² W multiply-adds: four projections, a perceptron of ratio
    r, and attention's two products. Patches and the final projection are added; norms and biases are not.
    """
    config = architecture(model)
    vision, text, joint = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    if not isinstance(vision.get("layers"), int) or "patch_size" not in vision:
        raise UserError(f"expected a vision transformer, got {model!r}; its arithmetic has no closed form here")
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = _blocks(vision, patches + 1) + patches * 3 * vision["patch_size"] ** 2 * vision["width"]
    words = _blocks(text, text["context_length"])
    return Tower(2 * (image + vision["width"] * joint), 2 * (words + text["width"] * joint))


def _blocks(config: Mapping, tokens: int) -> float:
    """Multiply-adds of all blocks."""
    width, ratio = config["width"], config.get("mlp_ratio", MLP_RATIO)
    return config["layers"] * tokens * ((4 + 2 * ratio) * width**2 + 2 * tokens * width)


# ---- passes


@dataclass(frozen=True)
class Passes:
    """Images through the image tower, forward and backward."""

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)

    def times(self, factor: float) -> "Passes":
        return Passes(factor * self.forwards, factor * self.backwards)

    def flops(self, image: float, backward: int = ATTACK_BACKWARD) -> float:
        """Of a tower that takes `image` FLOPs for a forward pass."""
        return image * (self.forwards + backward * self.backwards)


def evaluation(card: Mapping) -> Passes:
    """What the accuracies of a card cost, as it counted."""
    return sum((_passes(row) for row in _cells(card)), Passes())


def carried(card: Mapping, to: str) -> Passes:
    """What the accuracies of a card would cost under the profile `to`.

    A cell (method, data set, attack, ε) is multiplied by the images of the data set that stands in its place in the
    other profile's list, by the steps of the attack that stands in its place, and, where it lies on a curve over ε, by
    the number of budgets. Data sets past the end of the shorter list cost what the last one does. Methods that the
    other profile neither trains nor finds trained are left out.
    """
    return sum((passes for _, passes in _carried_cells(card, to)), Passes())


def _carried_cells(card: Mapping, to: str) -> Iterator[tuple[dict, Passes]]:
    here, there = (vars(profile(card["chapter"], name)) for name in (card["profile"], to))
    budgets = _ratio(len(there.get("eps_grid", ())), len(here.get("eps_grid", ())))
    curves = _curves(card)
    for row in _cells(card):
        if _is_run(row["method"], card, there):
            factor = _images_factor(row["dataset"], here, there) * _steps_factor(row["attack"], here, there)
            yield row, _passes(row).times(factor * (budgets if _curve(row) in curves else 1.0))


def training(card: Mapping, to: str) -> Passes | None:
    """What training the methods of the profile `to` would cost; None where the card counted no training step.

    A row of metric train_s counts the passes of one step over `extra["batch"]` images.
    """
    there = vars(profile(card["chapter"], to))
    steps = {row["method"]: row for row in card["rows"] if row["metric"] == "train_s" and row["image_forwards"]}
    if "training" not in there or not steps:
        return None
    images = there["training"]["steps"] * there["training"]["batch"]
    trained = [steps[method] for method in there.get("train_live", steps) if method in steps]
    return sum((_passes(row).times(images / row["extra"]["batch"]) for row in trained), Passes())


def _cells(card: Mapping) -> list[dict]:
    return [row for row in card["rows"] if row["metric"] in MATCHED]


def _passes(row: Mapping) -> Passes:
    return Passes(row["image_forwards"], row["image_backwards"])


def _curve(row: Mapping) -> tuple:
    return row["method"], row["dataset"], row["attack"]


def _curves(card: Mapping) -> set[tuple]:
    """(method, data set, attack) of cells that were measured at several ε."""
    budgets: dict[tuple, set] = {}
    for row in _cells(card):
        budgets.setdefault(_curve(row), set()).add(row["eps_255"])
    return {curve for curve, found in budgets.items() if len(found) > 1}


def _is_run(method: str, card: Mapping, there: Mapping) -> bool:
    """A model that is not bundled has no bundled defenses: what is not trained for it is not there."""
    trainable = {row["method"] for row in card["rows"] if row["metric"] == "train_s"}
    bundled = asset("clip", f"{there.get('model', '')}.safetensors").exists()
    return bundled or method not in trainable or method in there.get("train_live", trainable)


def _places(sizes: Mapping) -> dict[str, list[list]]:
    """Field -> [name, n] of each data set that a profile evaluates on, in order."""
    return {
        field: value
        for field, value in sizes.items()
        if field != "train" and isinstance(value, list) and value and all(_is_place(v) for v in value)
    }


def _is_place(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _images_factor(dataset: str, here: Mapping, there: Mapping) -> float:
    """Images of the data set's place, there over here; 1 for a data set that no list names."""
    name, first, _ = dataset.partition("[")  # "photos/caltech[:100]" is the first images of a set

    def images(sizes: Mapping, place: list) -> float:
        return sizes.get("attacked", place[1]) if first else place[1]

    for field, places in _places(here).items():
        names = [place[0] for place in places]
        if name in names and field in _places(there):
            i, others = names.index(name), _places(there)[field]
            stands_for = others[i:] if i == len(names) - 1 else others[i : i + 1]
            own, wanted = images(here, places[i]), [images(there, place) for place in stands_for]
            if wanted == [own]:
                return 1.0
            if not all([own, *wanted]):
                raise UserError(f"expected a number of images for every data set of {field}, got 0, which takes all of them")
            return sum(wanted) / own
    return 1.0


def _steps_factor(attack: str, here: Mapping, there: Mapping) -> float:
    """Steps of the attack in the place of this one, there over here; an attack of as many steps follows that one."""
    steps = re.search(r"-(\d+)", attack)
    for field, spec in here.items():
        if _is_attack(spec) and _is_attack(there.get(field)):
            now = get_attack(spec).n_steps
            if attack == spec or (steps and int(steps[1]) == now):
                return get_attack(there[field]).n_steps / now
    return 1.0


def _is_attack(spec) -> bool:
    try:
        return isinstance(spec, str) and get_attack(spec).n_steps > 0
    except UserError:
        return False


def _ratio(a: float, b: float) -> float:
    return a / b if a and b else 1.0


# ---- what it comes to


@dataclass(frozen=True)
class Estimate:
    """The cost of one run of a chapter under a profile, from a committed card of another profile.

    evaluation, training: passes (training None: not counted). image: FLOPs of one forward pass of the backbone.
    """

    chapter: str
    profile: str
    model: str
    evaluation: Passes
    training: Passes | None
    image: float

    @property
    def evaluation_hours(self) -> float:
        """GPU hours at SUSTAINED."""
        return self.evaluation.flops(self.image) / SUSTAINED / 3600

    @property
    def training_hours(self) -> float:
        """GPU hours at SUSTAINED; 0 where nothing was counted."""
        return self.training.flops(self.image, TRAINING_BACKWARD) / SUSTAINED / 3600 if self.training else 0.0

    @property
    def hours(self) -> float:
        """Evaluation and training."""
        return self.evaluation_hours + self.training_hours


def estimate(card: Mapping, to: str = "paper") -> Estimate:
    """The cost of the chapter of `card` under the profile `to`. Raises UserError for a backbone without a closed form."""
    model = backbone(card["chapter"], to)
    return Estimate(card["chapter"], to, model, carried(card, to), training(card, to), tower(model).image)


def backbone(chapter: str, to: str = "paper") -> str:
    """The CLIP of a profile. Raises UserError where it has none."""
    model = getattr(profile(chapter, to), "model", "")
    if not model:
        raise UserError(f"expected a CLIP under model in the profile {to} of {chapter}, got none; it has no estimate")
    return model


def uncounted(chapter: str, to: str = "paper") -> str:
    """What a run of the profile does beside what the cards count, in words; empty if nothing."""
    there = vars(profile(chapter, to))
    if "views" in there:
        return f"every image is asked about in up to {there['views']} views"
    return "prompts are tuned for every set, method and seed" if "shots" in there else ""


def nearest(cards: Mapping[str, dict], chapter: str) -> dict | None:
    """The card of a chapter to carry over: of the largest profile below `paper`; None if there is none."""
    own = [c for c in cards.values() if c["chapter"] == chapter and c["profile"] in PROFILES[:-1]]
    return max(own, key=lambda card: PROFILES.index(card["profile"]), default=None)


# ---- how it grows


def growth(card: Mapping, to: str = "paper") -> dict[str, float]:
    """GPU hours that one more data set, budget or seed adds to `estimate(card, to)`.

    A data set costs the mean of the profile's sets; a budget, one point on every curve over ε; a seed, everything again.
    """
    est, there = estimate(card, to), vars(profile(card["chapter"], to))
    curves = _curves(card)
    on_curves = sum((p for row, p in _carried_cells(card, to) if _curve(row) in curves), Passes())
    sets = sum(len(places) for places in _places(there).values())
    hours = on_curves.flops(est.image) / SUSTAINED / 3600
    return {
        "data set": est.evaluation_hours / sets if sets else 0.0,
        "budget": hours / len(there["eps_grid"]) if there.get("eps_grid") else 0.0,
        "seed": est.hours,
    }


def text_share(model: str, n_classes: int) -> float:
    """FLOPs of encoding one prompt a class, over those of a forward pass of one image.

    A list of classes is encoded once where prompts are fixed. Where they are tuned, every step encodes it again.
    """
    arithmetic = tower(model)
    return n_classes * arithmetic.text / arithmetic.image
