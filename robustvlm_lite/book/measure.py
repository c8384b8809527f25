"""Train and measure defenses inside a run: every result goes into the card, and a killed run goes on where it stopped."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import attention, defenses, evaluate
from ..cards import load_card, shelf
from ..clip import ZeroShotCLIP, load_clip
from ..data import ImageSet
from ..defenses import Defense, Training
from ..evaluate import PassCounter
from ..records import Row
from ..runtime import UserError, weights_sha256
from ..stats import bootstrap_mean, paired_bootstrap
from .spread import beforehand


def images(run, name_and_n: Sequence, split: str = "test") -> ImageSet:
    """A dataset of the profile, given as [name, n]; the chapter's parameter n, if any, takes the place of the profile's.

    It does not cut what ships with the book for training: bundled checkpoints saw all of that.
    """
    name, n = name_and_n
    whole = split == "train" and name.startswith(("photos/", "scenes/"))
    asked = 0 if whole else run.parameters.get("n", 0)
    return run.load(name, split, n=asked or n)


def training(run) -> Training:
    """The profile's optimizer and sizes; the chapter's parameter steps, if any, takes the place of the profile's."""
    chosen = Training(**run.sizes.training)
    steps = run.parameters.get("steps", 0)
    return replace(chosen, steps=steps) if steps else chosen


def defended(run, name: str, train_sets: Sequence[ImageSet] = (), attack=None) -> Defense:
    """A defense by name: "CLIP" as it is; trained here if the profile says so or lacks a checkpoint; else the bundled one."""
    clip = run.load_clip()
    if name == "CLIP":
        return Defense(clip)
    if name not in run.sizes.train_live:
        found = defenses.load_defense(name, clip)
        _require_same_training(run, found, train_sets)
        return found
    weights = getattr(run.sizes, "tga", {})
    defense, plan = defenses.build(name, clip, **weights), training(run)
    kept = run.out / "trained" / f"{defenses.checkpoint(name, clip.name).stem}.safetensors"
    key = {"training": {**asdict(plan), "precision": str(plan.precision)}, "seed": run.seed, "tga": weights}
    key |= {"data": [s.sha256 for s in train_sets], "eps": run.sizes.eps_train, "base": clip.weights_sha256}
    if kept.exists() and (found := _read(kept, key)) is not None:
        defense.clip.visual.load_state_dict(found["weights"])
        defense.history = found["history"]
        return defense
    defense.fit(list(train_sets), attack=attack, training=plan, seed=run.seed)
    kept.parent.mkdir(exist_ok=True)
    facts = json.dumps({"key": key, "history": defense.history})
    part = kept.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in defense.clip.visual.state_dict().items()}, part, metadata={"facts": facts})
    part.replace(kept)
    return defense


def _require_same_training(run, defense: Defense, train_sets: Sequence[ImageSet]) -> None:
    """Methods are compared on what they learned from: raises UserError for a checkpoint of other images or budget."""
    facts = defense.facts
    wanted = {"data_sha256": [s.sha256 for s in train_sets], "eps_255": run.sizes.eps_train}
    other = [name for name, value in wanted.items() if facts.get(name) != value]
    if other:
        raise UserError(
            f"the bundled checkpoint of {defense.name} was trained with another {' and '.join(other)} than this profile's: "
            "add the method to the profile's train_live, or make the checkpoints again (make checkpoints)"
        )


def _read(path: Path, key: dict) -> dict | None:
    facts = defenses.read_facts(path)
    if facts["key"] != json.loads(json.dumps(key)):
        return None
    return facts | {"weights": load_file(path)}


def training_cost(run, names: Sequence[str], train_sets: Sequence[ImageSet], attack, steps: int = 5) -> list[Row]:
    """Seconds of a training step, all methods one after the other on this machine, as card rows of metric train_s.

    On half a batch, to be quick. The first step, which warms up, does not count: n is steps - 1, and the interval is of
    their mean. The passes of a row are those of one step, through the model in training and the frozen one. Nothing of
    this training is kept.
    """
    plan, clip, rows = replace(training(run), steps=steps), run.load_clip(), []
    batch = train_sets[0].take(range(min(plan.batch // 2, len(train_sets[0]))))
    for name in names:
        defense = defenses.build(name, clip, **run.sizes.tga)
        with PassCounter(defense.clip.visual.conv1) as own, PassCounter(clip.visual.conv1) as frozen:
            defense.fit(batch, attack=attack, training=plan, seed=run.seed, progress=False)
        passes = {"image_forwards": own.forwards + frozen.forwards, "image_backwards": own.backwards + frozen.backwards}
        seconds, extra = np.array(defense.step_seconds[1:]), {"seed": run.seed, "batch": len(batch)}
        place = {"method": name, "dataset": batch.name, "attack": "none", "eps_255": run.sizes.eps_train}
        rows.append(Row(**place, metric="train_s", n=len(seconds), value=seconds.mean().item(),
                        ci95=bootstrap_mean(seconds), extra=extra,
                        **{key: count // steps for key, count in passes.items()}))  # fmt: skip
    run.card.add(rows)
    return rows


def measure_seconds(
    run, dataset: str, functions: Mapping[str, Callable[[], object]], *, rounds: int = 4, **extra
) -> list[Row]:
    """Seconds of each function, all called in turn, as card rows of metric train_s; the first round only warms up.

    Turns spread a machine's moods evenly. n is the number of rounds; the interval is of their mean.
    """
    seconds = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, values in seconds.items():
        kept = np.array(values[1:])
        rows.append(Row(name, dataset, "none", 0.0, "train_s", rounds, kept.mean().item(), bootstrap_mean(kept),
                        extra={"seed": run.seed, **extra}))  # fmt: skip
    run.card.add(rows)
    return rows


def nano_checkpoint(run, name: str, data: ImageSet) -> tuple[nn.Module, nn.Module]:
    """A committed checkpoint on `nano` as (classifier, what an attacker differentiates), for images of any size.

    For comparisons that also a profile needs whose own backbone has no checkpoints: larger images are shrunk.
    """
    clip = load_clip("nano", device=str(run.device))
    classifier = defenses.load_defense(name, clip).classifier(data.class_names, data.templates)
    return Resized(classifier, clip.image_size), Resized(classifier.fast(), clip.image_size)


class Resized(nn.Module):
    """A model of images of `side` pixels, asked about larger ones: they are shrunk in the graph, antialiased."""

    def __init__(self, model: nn.Module, side: int):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True).clamp(0, 1)
        return self.model(x)


def measure(run, defense: Defense, data: ImageSet, attacks: Sequence, *, seed: int | None = None) -> list[Row]:
    """Clean accuracy and accuracy under (Attack, ThreatModel) pairs, added to the run's card.

    seed: of a defense that was trained with another than the run's.
    """
    model = defense.classifier(data.class_names, data.templates)
    return measure_model(run, defense.name, model, defense.attack_surface(model), data, attacks, seed=seed)


def measure_each(run, tuned: Sequence[Defense], data: ImageSet, attacks: Sequence, *, seed: int | None = None) -> list[Row]:
    """The rows of `measure` of several defenses, one after the other; computed on all cores at once."""
    jobs = [partial(measure, run, defense, data, attacks, seed=seed) for defense in tuned]
    beforehand(run, jobs, "measuring")
    return [row for job in jobs for row in job()]


def measure_model(
    run, method: str, model: nn.Module, surface: nn.Module, data: ImageSet, attacks: Sequence, *, seed: int | None = None
) -> list[Row]:
    """As `measure`, of a model [B, 3, H, W] -> [B, C] by itself. surface: what the attacker queries and differentiates."""
    rows = evaluate.evaluate(
        model, data, attacks, method=method, seed=run.seed if seed is None else seed, surface=surface, store=run.store,
        fingerprint=repr((data.class_names, data.templates)), batch_size=128,
    )  # fmt: skip
    run.card.add(rows)
    return rows


@torch.no_grad()
def batched(run, function: Callable[[Tensor], Tensor], data: ImageSet, size: int = 128) -> Tensor:
    """`function` of all pixels of `data`, a batch at a time on the run's device: what it gives for each image, on the CPU."""
    parts = (data.pixels(slice(i, i + size)).to(run.device) for i in range(0, len(data), size))
    return torch.cat([function(x).cpu() for x in parts])


def logits_of(clip: ZeroShotCLIP, features: Tensor, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Logits [N, C] on the CPU of image features [N, D] that are there already, under any names and templates."""
    return clip.logit_scale.cpu() * features.cpu() @ clip.text_features(class_names, templates).cpu().T


def measure_logits(run, data: ImageSet, logits: Mapping[str, Tensor]) -> list[Row]:
    """Clean accuracy of logits [N, C] by the name of what made them, added to the run's card."""
    known = {"seed": run.seed, "weights_sha256": run.load_clip().weights_sha256}
    rows = [evaluate.clean_row(z, data, method=name, **known) for name, z in logits.items()]
    run.card.add(rows)
    return rows


def measure_images(
    run, method: str, model: nn.Module, data: ImageSet, x_adv: Tensor, attack: str, eps_255: float, *, batch: int = 128
) -> Row:
    """Accuracy of `model` on `x_adv` [N, 3, H, W], copies of `data` that were made elsewhere, added to the run's card.

    The verdict is a single forward pass: of a random model it is one draw, the one of `evaluate.for_images` where the model
    can be keyed, and else one for each `batch` of images anew. See `evaluate.images_row`.
    """
    parts = torch.arange(len(data)).split(batch)
    with torch.no_grad():
        logits = [evaluate.for_images(model, data, i, run.seed)(x_adv[i].to(run.device)).cpu() for i in parts]
    logits = torch.cat(logits)
    known = {"seed": run.seed, "weights_sha256": weights_sha256(model)}
    row = evaluate.images_row(logits, x_adv, data, method=method, attack=attack, eps_255=eps_255, **known)
    run.card.add([row])
    return row


def measure_maps(
    run, method: str, data: ImageSet, maps: Mapping[str, Tensor], attack: str, eps_255: float, against: str = ""
) -> list[Row]:
    """Overlap of maps [N, patches] with the exact masks of `data`, as card rows of metric map_iou.

    against: name of one of the maps; then extra["over"] is the paired difference (diff, lo, hi) to it, scene by scene.
    """
    if data.masks is None:
        raise UserError(f"expected object masks for {data.name}, got none; use a rendered task")
    rows, ious = [], {name: attention.map_iou(m.cpu(), data.masks) for name, m in maps.items()}
    for name, iou in ious.items():
        extra = {"seed": run.seed, "map": name}
        if against:
            extra["over"] = list(paired_bootstrap(iou.numpy(), ious[against].numpy()))
        rows.append(Row(f"{method}: {name}", data.name, attack, eps_255, "map_iou", len(data), iou.mean().item(),
                        bootstrap_mean(iou.numpy()), extra=extra))  # fmt: skip
    run.card.add(rows)
    return rows


def committed_card(chapter: str, profile: str) -> dict | None:
    """The card of a chapter that the book ships for this profile, or None."""
    path = shelf() / f"{chapter}-{profile}"
    return load_card(path) if (path / "card.json").exists() else None


def measure_map_facts(
    run, method: str, defense: Defense, data: ImageSet, x_adv: Tensor, attack: str, eps_255: float
) -> dict[str, Row]:
    """The means of `map_facts` against the run's undefended model, as card rows of metric map_fact, by what they measure."""
    found = map_facts(defense, run.load_clip(), data, x_adv)
    rows = {
        fact: Row(f"{method}: {fact}", data.name, attack, eps_255, "map_fact", len(data), each.mean().item(),
                  bootstrap_mean(each.numpy()), extra={"seed": run.seed})
        for fact, each in found.items()
    }  # fmt: skip
    run.card.add(rows.values())
    return rows


@torch.no_grad()
def map_facts(defense: Defense, original: ZeroShotCLIP, data: ImageSet, x_adv: Tensor) -> dict[str, Tensor]:
    """Of each attacked scene, [N]: how far the text-guided map moved, its overlap with the object, whether the answer is right.

    Movements are shares of the starting map's length: from the defense's own clean map, and from the original model's.
    """
    model = defense.classifier(data.class_names, data.templates)
    x, y, x_adv = (t.to(model.text_features.device) for t in (data.pixels(), data.labels, x_adv))
    text = model.text_features[y]
    adv = attention.text_map(defense.clip.tokens(x_adv), text)

    def moved_from(clip: ZeroShotCLIP) -> Tensor:
        home = attention.text_map(clip.tokens(x), text)
        length = attention.map_distance(home, torch.zeros_like(home)).clamp_min(1e-6)
        return (attention.map_distance(home, adv) / length).float().cpu()

    return {
        "from own clean map": moved_from(defense.clip),
        "from original's map": moved_from(original),
        "map IoU": attention.map_iou(adv.cpu(), data.masks),
        "accuracy": (model(x_adv).argmax(1) == y).float().cpu(),
    }
