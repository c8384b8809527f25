"""The fine-tuned captioners of chapter 08: trained at one budget, kept in small files, and the search behind their weights."""

import copy
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from ..attacks import pgd
from ..attacks.captions import on_texts
from ..captioner import Blip2, Captioner, TokenLoss, cross_entropy
from ..defenses.caption_tuning import TextAttack, TextData, finetune, load_tuned, save_tuned
from ..defenses.checkpoints import read_facts
from ..defenses.training import Training
from ..runtime import UserError, asset, generator
from ..scenes.duo import sample_duos
from ..threat import ThreatModel
from .captioning import answer_task, caption_task
from .text_methods import ADVERSARIAL, text_method

TUNING_SCENES = 20000


def tuning_data(base: Captioner, n: int = TUNING_SCENES) -> TextData:
    """What captioners are fine-tuned on: scenes of their own, with the caption, or for BLIP-2 one question each."""
    return _tuning_data(isinstance(base, Blip2), base.image_size, n)


@cache
def _tuning_data(asks: bool, size: int, n: int) -> TextData:
    """Drawn once for all methods: half a minute of a laptop."""
    scenes = sample_duos(n, generator("tuning"), size=size)
    task = answer_task(scenes, 0) if asks else caption_task(scenes)
    return TextData(scenes.images, task.truth, task.prompt)


def training_attack(eps_255: float) -> TextAttack:
    """PGD-2 with steps of ε on the cross-entropy of the targets."""
    threat = ThreatModel(eps_255)

    def attack(model, x, texts, prompt, drawn):
        return pgd(on_texts(model, texts, prompt), x, threat, n_steps=2, step_255=eps_255, keep="last", generators=drawn)

    return attack


def checkpoint(base: Captioner, method: str, seed: int) -> Path:
    """Where the fine-tuned weights of a method lie that ship with the package."""
    slug = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
    return asset("captioner", f"{base.name}-{slug}-{seed}.safetensors")


def stated(method: str) -> str:
    """A method's loss in words that name every setting."""
    loss = text_method(method)
    return loss.__name__ if hasattr(loss, "__name__") else repr(loss)


def tune(base: Captioner, loss: TokenLoss, training: Training, *, eps_255: float = 0.0, seed: int = 0, progress: bool = True) -> Captioner:
    """`base` fine-tuned with a loss on `tuning_data`; on attacked images where ε is not 0."""
    attack = training_attack(eps_255) if eps_255 else None
    return finetune(base, tuning_data(base), loss, training, attack=attack, seed=seed, progress=progress)[0]


def tuned(run, base: Captioner, method: str, seed: int = 0) -> Captioner:
    """A method of `text_methods` on this base: from the package where it ships, from this run's folder, or trained now."""
    training, eps = Training(**run.sizes.tuning), run.sizes.eps_train if method == ADVERSARIAL else 0.0
    facts = {"method": stated(method), "eps_255": eps, "seed": seed, "training": asdict(training)}
    for path in (checkpoint(base, method, seed), run.out / "tuned" / checkpoint(base, method, seed).name):
        if path.exists() and read_facts(path).items() >= (facts | {"base_sha256": base.weights_sha256}).items():
            return load_tuned(base, path)[0]
    model = tune(base, text_method(method), training, eps_255=eps, seed=seed)
    save_tuned(model, base, path, **facts)
    return load_tuned(base, path)[0]  # as it comes back after an interruption


@dataclass(frozen=True)
class Searched:
    """Every run of `data_scripts/tune_captioners.py --search`: settings, and shares of right texts on n validation scenes."""

    runs: tuple[Mapping, ...]
    n: int
    eps_255: float
    lr: float

    def __getitem__(self, loss: str) -> Mapping:
        """The run of a loss at the common learning rate, without adversarial training."""
        for run in self.runs:
            if (run["loss"], run["lr"], run["eps_255"]) == (loss, self.lr, 0.0):
                return run
        raise UserError(f"expected a run of {loss} in the search file; run data_scripts/tune_captioners.py --search again")

    def each(self) -> dict[str, Mapping]:
        """All runs at the common rate, the loss in few words."""
        named = {}
        for run in self.runs:
            if run["lr"] == self.lr:
                attacked = f", images attacked at {run['eps_255']:g}/255" if run["eps_255"] else ""
                named[_short(run["loss"]) + attacked] = run
        return named


def search_runs(base: Captioner) -> Searched:
    """The committed search of a base captioner. Raises UserError where it was made on other weights."""
    path = asset("captioner", f"{base.name}-search.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["base_sha256"] != base.weights_sha256:
        raise UserError(f"expected {path.name} on the weights of {base.name}, got it on others; run the search again")
    return Searched(tuple(found["runs"]), found["n"], found["eps_255"], found["training"]["lr"])


def _short(loss: str) -> str:
    """PrslConfig(reading='topk_mass', start=0, end=4, a=1.0, b=1.0, ...) as "topk_mass, K 4, b 1"."""
    found = re.match(r"PrslConfig\(reading='(\w+)', start=0, end=(\d+), a=1.0, b=([\d.e-]+)", loss)
    if found:
        return f"{found[1]}, K {found[2]}, b {float(found[3]):g}"
    found = re.match(r"(\w+)\(weight=([\d.e-]+)\)", loss)
    return f"{found[1]} {float(found[2]):g}" if found else loss.replace("_", "-")


def step_ratio(base: Captioner, loss: TokenLoss, training: Training, *, repeats: int = 15) -> tuple[float, float, float]:
    """`(median, lo, hi)` of the time of a training step with `loss` over one with cross-entropy, the two taken in turn."""
    scenes = tuning_data(base, training.batch)

    model, x = copy.deepcopy(base), scenes.images.float().to(base.device) / 255

    def seconds(of: TokenLoss) -> float:
        model.requires_grad_(True).zero_grad()
        started = time.perf_counter()
        model.token_loss(x, scenes.targets, scenes.prompt, loss=of).backward()
        return time.perf_counter() - started

    ratios = torch.tensor([seconds(loss) / seconds(cross_entropy) for _ in range(repeats)])
    low, middle, high = ratios.quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
    return middle, low, high
