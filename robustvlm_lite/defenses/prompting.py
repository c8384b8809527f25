"""What every prompt-tuned defense shares: prompts in place of weights, and how the papers train them.

In a step the prompts are built and the text is encoded once, with a graph. The training attack sees both as constants, so
it neither encodes text again nor reaches the prompts; clean and attacked images then go through the towers once each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..prompts import PromptedCLIP, PromptLearner, Prompts, PromptSpec
from ..runtime import UserError
from . import terms
from .training import Batch, Task, Trained, Training, collapsed_at

WARMUP = 1e-5  # learning rate of the first epoch
WINDOW = 50  # steps in a row that make a collapse


@dataclass(frozen=True)
class PromptTraining(Training):
    """Steps of prompt tuning, in the schedule of CoOp (Zhou et al. 2022) and its followers, with SGD.

    epoch: its steps; the first runs at 1e-5, then a cosine moves once an epoch. augment: each image resized from a random
    crop and mirrored or not, before it is attacked (bilinear; the papers' is bicubic).
    """

    epoch: int = 1
    weight_decay: float = 0.0
    augment: bool = False

    def optimizer_of(self, parameters: Sequence[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return optimizer, LambdaLR(optimizer, self._share)

    def _share(self, step: int) -> float:
        """Of the learning rate, as Dassl gives it to CoOp: the cosine starts one epoch late and never reaches 0."""
        epoch = step // self.epoch
        return (1 + math.cos(math.pi * (epoch - 1) * self.epoch / self.steps)) / 2 if epoch else WARMUP / self.lr


@dataclass(frozen=True)
class Style:
    """How a family of papers trains prompts: rate, sizes, and the attack in the loop.

    epochs: a number, or one by the number of shots (0: more than 16). attack_step: in budgets. attack_eps: a budget of its
    own in 1/255, where the method does not train at the one that it is tested at.
    """

    lr: float
    batch: int
    epochs: int | Mapping[int, int]
    attack_steps: int = 2
    attack_step: float = 1.0
    attack_eps: float | None = None
    weight_decay: float = 5e-4  # Dassl's default, which also acts on prompts
    augment: bool = False

    def attack(self, budget_255: float) -> tuple[float, dict]:
        """(ε in 1/255, options of PGD) of the attack in training, for prompts that are to stand `budget_255`."""
        eps = self.attack_eps or budget_255
        return eps, {"n_steps": self.attack_steps, "step_255": self.attack_step * eps, "keep": "last"}

    def training(self, data: ImageSet, shots: int = 16, precision: torch.dtype | None = None) -> PromptTraining:
        """The paper's steps on this training set, in epochs that leave an unfilled batch out."""
        epoch = max(len(data) // self.batch, 1)
        epochs = self.epochs if isinstance(self.epochs, int) else self.epochs.get(shots, self.epochs[0])
        batch = min(self.batch, len(data))
        return PromptTraining(
            steps=epoch * epochs, batch=batch, lr=self.lr, weight_decay=self.weight_decay, epoch=epoch,
            precision=precision, augment=self.augment,
        )  # fmt: skip

    def short(self, data: ImageSet, *, steps: int, batch: int, rate: float, precision=torch.bfloat16) -> PromptTraining:
        """A short run of the same kind, where models and sets are small: `rate` times the paper's learning rate."""
        whole = self.training(data, precision=precision)
        epoch = max(steps // 10, 1)
        return replace(whole, steps=steps, batch=min(batch, len(data)), lr=rate * self.lr, epoch=epoch, augment=False)


APT_EPOCHS = {16: 200, 8: 200, 4: 100, 2: 100, 1: 50, 0: 200}
STYLES = {
    "apt": Style(lr=0.002, batch=32, epochs=APT_EPOCHS, attack_steps=3, attack_step=2 / 3, augment=True),
    "maple": Style(lr=0.0035, batch=4, epochs=10),  # MaPLe, FAP, CBA-FAPT
    "coop": Style(lr=0.002, batch=32, epochs=200),  # FAP's AdvTP
    "advpt": Style(lr=0.002, batch=32, epochs=100, attack_steps=10, attack_step=0.125, attack_eps=8.0),
    "avp": Style(lr=40.0, batch=256, epochs=10, weight_decay=0.0),  # the gradient of a frame is tiny
    "advvp": Style(lr=40.0, batch=4, epochs=10, weight_decay=0.0),  # FAP's few-shot form of it
}


@dataclass(frozen=True)
class Method:
    """A defense as its paper trains it: the class of its loss, its prompts, its style, and what its config chooses."""

    kind: type
    spec: PromptSpec
    style: Style
    config: object = None


@dataclass(kw_only=True)
class PromptTask(Task):
    """A training set with its classifier over the prompts. `text` is the frozen model's, from the set's own templates."""

    model: PromptedCLIP
    fixed: Tensor | None = None  # unit text features [K, D] where no prompt reaches them


@dataclass(kw_only=True)
class PromptBatch(Batch):
    """One step: the prompts and the unit text features [K, D] in their graph, and what of the clean images is known."""

    prompts: Prompts
    text: Tensor
    clean: Tensor | None = field(default=None, repr=False)  # unit image features [B, D], in the graph


class PromptTuning(Trained):
    """Learns the prompts of a `PromptSpec` in front of a frozen, shared `clip`.

    A method says what it minimises; with `attacks_divergence` its training attack maximises KL(p(x) || p(x_adv)) instead
    of the cross-entropy. class_names: of class-specific contexts.
    """

    attacks_divergence = False

    def __init__(
        self, clip: ZeroShotCLIP, spec: PromptSpec, name: str = "", class_names: Sequence[str] = (), config=None
    ):
        super().__init__(clip.requires_grad_(False), name)
        self.learner = PromptLearner(clip, spec, class_names)
        self.config = config

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> PromptedCLIP:
        """Pixels to logits for these classes; the sentence is the prompts' own, so templates are not read."""
        return PromptedCLIP(self.clip, self.learner, class_names)

    def fit(self, data: ImageSet | Sequence[ImageSet], *, seed: int = 0, **options) -> "PromptTuning":
        """As `Trained.fit`, from the start that the seed gives."""
        self.learner.seed = seed
        self.learner.reset()
        self.history, self.step_seconds = [], []
        return super().fit(data, seed=seed, **options)

    def learned(self) -> list[torch.nn.Parameter]:
        return list(self.learner.parameters())

    def task(self, data: ImageSet) -> PromptTask:
        model = PromptedCLIP(self.clip, self.learner, data.class_names)
        fixed = None if self.learner.spec.n_text else model.constants()[1]
        text = self.clip.text_features(data.class_names, data.templates)
        return PromptTask(data, text, model=model, fixed=fixed)

    def batch(self, task: PromptTask, index: Tensor, x: Tensor, y: Tensor) -> PromptBatch:
        prompts = self.learner()
        text = task.model.text_features(prompts) if task.fixed is None else task.fixed
        return PromptBatch(task, index, x, y, x, prompts=prompts, text=text)

    def features(self, x: Tensor, batch: PromptBatch) -> Tensor:
        """Unit image features [B, D] in the graph of the prompts."""
        return batch.task.model.image_features(x, batch.prompts, self.precision)

    def clean(self, batch: PromptBatch) -> Tensor:
        """Those of the clean images, computed once a step."""
        if batch.clean is None:
            batch.clean = self.features(batch.x, batch)
        return batch.clean

    def logits(self, features: Tensor, batch: PromptBatch) -> Tensor:
        """Logits [B, K] of image features with the step's text."""
        return batch.task.model.compare(features, batch.text)

    def answers(self, x: Tensor, batch: PromptBatch) -> Tensor:
        return batch.task.model.logits(x, batch.text.detach(), batch.prompts.detach(), self.precision)

    def inner(self, batch: PromptBatch) -> Callable[[Tensor], Tensor]:
        if not self.attacks_divergence:
            return super().inner(batch)
        target = self.logits(self.clean(batch), batch).detach()
        return lambda x_adv: terms.kl(target, self.answers(x_adv, batch))

    def collapsed(self, n_classes: int) -> int | None:
        """The step by which the run gave every image the same answer (`collapsed_at`); None if never, or if unknown.

        Known where the history has a clean cross-entropy "ce" and a plain "divergence" of the attacked answers from the
        clean ones. A run that is too short for `WINDOW` steps in a row is judged by a third of its own.
        """
        known = [h for h in self.history if "ce" in h and "divergence" in h]
        window = max(1, min(WINDOW, len(known) // 3))
        return collapsed_at([h["ce"] for h in known], [h["divergence"] for h in known], n_classes, window)

    def state(self) -> dict[str, Tensor]:
        """What is learned, for a file."""
        return self.learner.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises UserError if names or shapes differ."""
        self.learner.load(state)

    def choices(self) -> dict:
        """What a file must say to build this defense again: prompts, classes, and what the method leaves open."""
        config = {} if self.config is None else asdict(self.config)
        return {"spec": asdict(self.learner.spec), "class_names": list(self.learner.class_names), "config": config}


def gradient_shares(weighted: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, float]:
    """|grad of a term| / |grad of their sum| over all parameters, by term; a share near 0 means a term that does nothing."""
    lengths = {}
    for name, value in {**weighted, "": sum(weighted.values())}.items():
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        lengths[name] = sum(g.double().square().sum() for g in grads if g is not None) ** 0.5
    total = float(lengths.pop(""))
    if not total:
        raise UserError("expected a loss that moves the prompts, got a gradient of 0; was the run collapsed?")
    return {name: float(length) / total for name, length in lengths.items()}


def scaled_spec(clip: ZeroShotCLIP, spec: PromptSpec) -> PromptSpec:
    """A spec of the papers' ViT-B/32 (12 blocks, 224 pixels, texts of 77 tokens) in the proportions of `clip`; there, itself.

    Depth 9 of 12 becomes three quarters of the smaller tower's blocks, a frame of 30 of 224 pixels as wide a share; a text
    context takes at most half of the text.
    """
    towers = [len(clip.model.transformer.resblocks)]
    towers += [len(clip.visual.transformer.resblocks)] if clip.is_vit else []
    depth = max(1, round(min(towers) * 9 / 12))
    text, vision = (min(d, depth) if d > 1 else d for d in (spec.depth_text, spec.depth_vision))
    frame = round(spec.pixel_pad * clip.image_size / 224)
    words = min(spec.n_text, clip.model.context_length // 2)
    return replace(spec, n_text=words, depth_text=text, depth_vision=vision, pixel_pad=frame)
