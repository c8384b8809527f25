"""The loop that every fine-tuning defense shares: adversarial images in, a weighted sum of terms out, one optimizer step."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..runtime import UserError, generator
from .base import Defense, TrainingAttack


@dataclass(frozen=True)
class Training:
    """Optimizer and sizes. The defaults are the paper's (TGA-ZSR 4.1 and its code: 10 epochs of Tiny-ImageNet)."""

    steps: int = 7820
    batch: int = 128
    optimizer: str = "sgd"  # "sgd" (momentum 0.9) or "adamw"
    lr: float = 1e-4
    warmup: int = 1000  # linear, then cosine to 0
    precision: torch.dtype | None = torch.bfloat16

    def __post_init__(self):
        if self.optimizer not in ("sgd", "adamw"):
            raise UserError(f"expected optimizer 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.steps < 1 or self.batch < 2 or not self.lr > 0:
            raise UserError(f"expected steps >= 1, batch >= 2 and lr > 0, got {self.steps}, {self.batch} and {self.lr}")


@dataclass
class Task:
    """One training set with its text side, computed once, and what the frozen model says of its images."""

    data: ImageSet
    text: Tensor  # [K, D]
    frozen: dict[str, Tensor] = field(default_factory=dict)  # name -> [N, ...], rows as in data


@dataclass
class Batch:
    """One step's images: x and x_adv [B, 3, H, W], labels y [B], their rows in the task."""

    task: Task
    index: Tensor
    x: Tensor
    y: Tensor
    x_adv: Tensor


class FineTuning(Defense):
    """Fine-tunes the image tower of a copy of `clip`; text tower and logit scale stay as they are.

    A method says what it minimises (`losses`), what its training attack maximises (`inner`) and what it keeps of the
    frozen model (`frozen`). history: one dict of terms a step; step_seconds: the wall time of each step of `fit`.
    """

    attacks_in_training = True

    def __init__(self, clip: ZeroShotCLIP, name: str = ""):
        super().__init__(copy.deepcopy(clip))
        self.name = name or self.name
        self.original = (clip,)  # a tuple, so that it is not a submodule: it is not part of the defended model
        self.history: list[dict[str, float]] = []
        self.step_seconds: list[float] = []
        self.precision: torch.dtype | None = None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms, each a scalar; their sum is minimised. Each method states its own."""
        raise TypeError(f"{type(self).__name__} states no losses")

    def inner(self, batch: Batch):
        """The training attack's objective [B]: cross-entropy over the task's classes unless a method differs."""

        def objective(x_adv: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(x_adv, batch.task.text), batch.y, reduction="none")

        return objective

    def frozen(self, task: Task, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What the frozen model says of clean training images and does not change while training; kept in memory."""
        return {}

    def logits(self, x: Tensor, text: Tensor) -> Tensor:
        """Logits of the model in training, [B, K]."""
        return self.clip.logits(x, text, self.precision)

    def fit(
        self,
        data: ImageSet | Sequence[ImageSet],
        *,
        attack: TrainingAttack | None = None,
        training: Training = Training(),  # noqa: B008 (frozen)
        seed: int = 0,
        progress: bool = True,
    ) -> "FineTuning":
        """Train on one set or several in turn. Raises UserError if an attack is missing or the loss is not finite."""
        if self.attacks_in_training and attack is None:
            raise UserError(
                f"{self.name} trains on adversarial images: expected attack=..., got None; pass partial(pgd, …)"
            )
        device, self.precision = self.clip.device, training.precision
        tasks = [self._task(d, device) for d in ([data] if isinstance(data, ImageSet) else data)]
        params = [p for p in self.clip.visual.parameters() if p.requires_grad]
        optimizer = (
            torch.optim.SGD(params, lr=training.lr, momentum=0.9)
            if training.optimizer == "sgd"
            else torch.optim.AdamW(params, lr=training.lr, weight_decay=0.0)
        )
        warmup = min(training.warmup, training.steps // 8 + 1)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(warmup, 1), total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(training.steps - warmup, 1)),
            ],
            [warmup],
        )
        # No name of a method in these keys: methods that are compared see the same batches and the same random starts.
        orders = [_Order(len(t.data), generator(seed, "order", t.data.name)) for t in tasks]
        for step in tqdm(range(training.steps), desc=f"training {self.name}", disable=not progress, leave=False):
            began = time.perf_counter()
            task, order = tasks[step % len(tasks)], orders[step % len(tasks)]
            index = order.next(min(training.batch, len(task.data)))
            x, y = task.data.pixels(index).to(device), task.data.labels[index].to(device)
            batch = Batch(task, index.to(device), x, y, x)
            if self.attacks_in_training:  # weights that have diverged show first in the attack's objective
                objective = partial(self._finite, self.inner(batch), step)
                batch.x_adv = attack(objective, x, generators=generator(seed, "attack", step))
            terms = self.losses(batch)
            total = self._finite(sum, step, terms.values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            self.history.append({k: v.item() for k, v in terms.items()})
            self.step_seconds.append(time.perf_counter() - began)
        self.clip.eval().requires_grad_(False)
        return self

    def _finite(self, loss: Callable, step: int, x) -> Tensor:
        """loss(x), or a UserError that names the training step where it is NaN or infinite."""
        value = loss(x)
        if not torch.isfinite(value).all():
            worst = value[~torch.isfinite(value)].flatten()[0].item()
            raise UserError(f"{self.name}: the loss is {worst} at step {step}; lower the learning rate")
        return value

    def _task(self, data: ImageSet, device: torch.device) -> Task:
        task = Task(data, self.clip.text_features(data.class_names, data.templates))
        self.clip.requires_grad_(False).visual.requires_grad_(True)
        parts: dict[str, list[Tensor]] = {}
        for index in torch.arange(len(data)).split(256):
            for name, value in self.frozen(task, data.pixels(index).to(device), data.labels[index].to(device)).items():
                parts.setdefault(name, []).append(value.detach())
        task.frozen = {name: torch.cat(values) for name, values in parts.items()}
        return task


def collapsed_at(natural: Sequence[float], adversarial: Sequence[float], n_classes: int, window: int = 50) -> int | None:
    """The first step, from 0, by which a run has collapsed; None if it never does.

    natural, adversarial: the clean cross-entropy and the adversarial term of each step. Collapsed means that for `window`
    steps in a row the first lies within 5 percent of ln C and the second below 1e-3: the model gives every image the same
    answer, which no attack can change (reported for FAP on EuroSAT). Such a run is kept and marked, never started again.
    """
    if len(natural) != len(adversarial) or n_classes < 2 or window < 1:
        raise UserError(
            f"expected two terms of equally many steps, n_classes >= 2 and window >= 1, got {len(natural)} and "
            f"{len(adversarial)} steps, {n_classes} and {window}"
        )
    chance, run = math.log(n_classes), 0
    for step, (clean, attacked) in enumerate(zip(natural, adversarial, strict=True)):
        run = run + 1 if abs(clean - chance) <= 0.05 * chance and attacked < 1e-3 else 0
        if run == window:
            return step
    return None


class _Order:
    """Shuffled rows without end: each epoch in a new order, no row twice in a batch."""

    def __init__(self, n: int, g: torch.Generator):
        self.n, self.g, self.rest = n, g, torch.empty(0, dtype=torch.int64)

    def next(self, k: int) -> Tensor:
        if len(self.rest) < k:
            self.rest = torch.randperm(self.n, generator=self.g)
        chosen, self.rest = self.rest[:k], self.rest[k:]
        return chosen
