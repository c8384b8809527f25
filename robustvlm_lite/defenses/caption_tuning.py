"""Fine-tuning of a captioner with any token loss, all at one budget; attacked images where an attack is given."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..captioner import Captioner, TokenLoss
from ..runtime import UserError, generator
from .checkpoints import apply_change, write_change
from .training import Training

TextAttack = Callable[[Captioner, Tensor, Sequence[str], Sequence[str] | None, torch.Generator], Tensor]


@dataclass(frozen=True)
class TextData:
    """Training images [N, 3, S, S] (uint8) with the text that each is to give, and a question each for a model that answers."""

    images: Tensor
    targets: Sequence[str]
    prompt: Sequence[str] | None = None

    def __post_init__(self):
        if self.images.dtype != torch.uint8:
            raise UserError(f"expected images as uint8, got {self.images.dtype}; multiply by 255 and round")
        for what, texts in (("text", self.targets), ("question", self.prompt)):
            if texts is not None and len(texts) != len(self.images):
                raise UserError(f"expected a {what} for each image, got {len(self.images)} images and {len(texts)} {what}s")


def finetune(
    base: Captioner,
    data: TextData,
    loss: TokenLoss,
    training: Training,
    *,
    attack: TextAttack | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Captioner, list[float]]:
    """A copy of `base`, fine-tuned, frozen again, and the loss of each step. What moves is `base.trainable()`.

    attack: (model, x, targets, prompt, generator) -> images of the same shape, which take the place of x in every step. Batches
    depend on the seed alone: every loss and every weight of a penalty sees the same images in the same order. Steps run in
    float32. Raises UserError for another precision, for a model with nothing to train, and where the loss is not finite.
    """
    if training.precision is not None:
        raise UserError(f"captioners are fine-tuned in float32: expected precision=None, got {training.precision}")
    model = copy.deepcopy(base).eval().requires_grad_(False)
    if not (learned := model.trainable()):
        raise UserError("expected something to train, got no parameters from trainable(); choose another captioner")
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer, schedule = training.optimizer_of(learned)
    history = []
    for step in tqdm(range(training.steps), desc="fine-tuning", leave=False, disable=not progress):
        drawn = generator(seed, "caption tuning", step)
        index = torch.randint(len(data.images), (training.batch,), generator=drawn).tolist()
        x = (data.images[index].float() / 255).to(model.device)
        texts, prompt = [data.targets[i] for i in index], data.prompt and [data.prompt[i] for i in index]
        if attack is not None:
            x = attack(model, x, texts, prompt, drawn)
        value = model.token_loss(x, texts, prompt, loss=loss)
        if not torch.isfinite(value):
            raise UserError(f"the loss is {value.item()} at step {step}; lower the learning rate or the penalty's weight")
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        history.append(value.item())
    return model.requires_grad_(False), history


def learned(model: Captioner) -> dict[str, Tensor]:
    """What fine-tuning moves, by name."""
    moved = {id(p) for p in model.trainable()}
    return {name: p.data for name, p in model.model.named_parameters() if id(p) in moved}


def save_tuned(model: Captioner, base: Captioner, path: Path, **facts) -> None:
    """Write the change from `base` in 8 bits; facts (JSON values) go into the header."""
    write_change(learned(base), learned(model), path, {"base": base.name, "base_sha256": base.weights_sha256} | facts)


def load_tuned(base: Captioner, path: Path) -> tuple[Captioner, dict]:
    """A copy of `base` with the change in a file, and the file's facts. Raises UserError if base or shapes differ."""
    model = copy.deepcopy(base)
    return model, apply_change(learned(model), path, base.name, base.weights_sha256)
