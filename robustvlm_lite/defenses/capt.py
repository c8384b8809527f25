"""CAPT (Yang et al. 2024): prompts in both towers that keep attacked answers near the model's own clean ones and a frozen CLIP's.

    L = CE(p_tr(x), y) + lambda [ (1 - alpha) KL(p_tr(x) || p_tr(x_adv)) + alpha KL(p_fz(x) || p_tr(x_adv)) ]

p_tr is the prompted model, p_fz the frozen one with hand-written templates; what it says of clean images is computed once.
No code was found, and not its full text: our sources describe the weight alpha without its formula. `Choices` names every reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import ZeroShotCLIP
from ..prompts import PromptSpec
from ..runtime import UserError, near_miss
from . import terms
from .prompting import STYLES, Method, PromptBatch, PromptTask, PromptTuning

EMA = 0.9  # of the running accuracies of reading A5
DIRECTIONS = ("target_adv", "adv_target", "sym")
INNER = ("ce", "kl", "consistency")


@dataclass(frozen=True)
class Choices:
    """What the paper leaves open.

    weight: lambda. alpha: how the frozen model is trusted, a reading of `READINGS` or a constant in [0, 1] (A6: 0 is
    TRADES over prompts, 1 is robust distillation). direction: "target_adv" is KL(target || attacked), "adv_target" the
    other way round, "sym" their mean. detach_clean: no gradient through the model's own clean answer in the first KL.
    inner: what the training attack maximises, the cross-entropy, the first KL, or the whole bracket.
    """

    weight: float = 1.5
    alpha: str | float = "A1"
    direction: str = "target_adv"
    detach_clean: bool = False
    inner: str = "ce"

    def __post_init__(self):
        if not self.weight >= 0:
            raise UserError(f"CAPT: expected lambda >= 0, got {self.weight}; 0 leaves clean prompt tuning")
        if isinstance(self.alpha, str) and self.alpha not in READINGS:
            raise UserError(f"unknown reading of alpha {self.alpha!r}; {near_miss(self.alpha, READINGS)}")
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise UserError(f"CAPT: expected a constant alpha in [0, 1], got {self.alpha}; or name a reading, as 'A1'")
        for name, known in (("direction", DIRECTIONS), ("inner", INNER)):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; {near_miss(getattr(self, name), known)}")


# ---- readings of alpha: (frozen logits [B, C], tuned logits [B, C], labels [B]) -> [B] in [0, 1]


def _share(a: Tensor, b: Tensor) -> Tensor:
    """a / (a + b), and one half where both are 0."""
    total = a + b
    return torch.where(total > 0, a / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def _true(logits: Tensor, y: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, y[:, None])[:, 0]


def _by_odds(frozen: Tensor, tuned: Tensor, y: Tensor) -> Tensor:
    """p_fz / (p_fz + p_tr) of the true class, from log-probabilities, so that two tiny ones keep their ratio."""
    losses = (F.cross_entropy(logits, y, reduction="none") for logits in (tuned, frozen))
    return torch.sigmoid(next(losses) - next(losses))


def _by_loss(frozen: Tensor, tuned: Tensor, y: Tensor) -> Tensor:
    own, other = (F.cross_entropy(logits, y, reduction="none") for logits in (tuned, frozen))
    return _share(own, other)


def _by_batch(frozen: Tensor, tuned: Tensor, y: Tensor) -> Tensor:
    return _share(_true(frozen, y).mean(), _true(tuned, y).mean()).expand(len(y))


def _by_confidence(frozen: Tensor, tuned: Tensor, y: Tensor) -> Tensor:
    return _share(*(logits.softmax(dim=1).amax(dim=1) for logits in (frozen, tuned)))


READINGS: dict[str, Callable | None] = {
    "A1": _by_odds,  # the default
    "A2": lambda frozen, tuned, y: _true(frozen, y),  # the frozen model alone
    "A3": _by_loss,
    "A4": _by_batch,
    "A5": None,  # running accuracies: has a memory, see CAPT.alpha
    "A7": _by_confidence,  # needs no label
}


def divergence(target: Tensor, adv: Tensor, direction: str) -> Tensor:
    """KL between a target's logits and those of attacked images, [B]."""
    if direction == "sym":
        return (terms.kl(target, adv) + terms.kl(adv, target)) / 2
    return terms.kl(target, adv) if direction == "target_adv" else terms.kl(adv, target)


class CAPT(PromptTuning):
    """CAPT over any prompts; `history` also keeps the mean and the quartiles of alpha in each step.

    teacher: the frozen CLIP; the tuned one itself, without prompts, if None. It answers from its own text, but must have
    the tuned model's embedding width: a CLIP of another family is another method.
    """

    name = "CAPT"

    def __init__(
        self,
        clip: ZeroShotCLIP,
        spec: PromptSpec,
        name: str = "",
        class_names: Sequence[str] = (),
        config: Choices | None = None,
        teacher: ZeroShotCLIP | None = None,
    ):
        super().__init__(clip, spec, name, class_names, config or Choices())
        widths = [c.model.text_projection.shape[1] for c in (clip, teacher or clip)]
        if widths[0] != widths[1]:
            raise UserError(
                f"expected a teacher of embedding width {widths[0]}, that of {clip.name}, got {widths[1]} of {teacher.name}; "
                "choose one of the same family"
            )
        self.teacher = (teacher or clip,)  # a tuple, so that it is no part of the defended model
        self.running: dict[str, float] = {}

    def fit(self, data, **options) -> "CAPT":
        self.running = {}
        return super().fit(data, **options)

    def frozen(self, task: PromptTask, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        teacher = self.teacher[0]
        with torch.no_grad():
            text = teacher.text_features(task.data.class_names, task.data.templates)
            return {"logits": teacher.logits(x, text, self.precision)}

    def alpha(self, frozen: Tensor, tuned: Tensor, y: Tensor) -> Tensor:
        """The weight of the frozen model for each image, [B], detached: the optimizer must not trade it for the KLs."""
        chosen = self.config.alpha
        frozen, tuned = frozen.detach(), tuned.detach()
        if not isinstance(chosen, str):
            return torch.full_like(frozen[:, 0], chosen)
        if chosen != "A5":
            return READINGS[chosen](frozen, tuned, y)
        for name, logits in (("frozen", frozen), ("tuned", tuned)):
            now = (logits.argmax(dim=1) == y).float().mean().item()
            self.running[name] = EMA * self.running.get(name, now) + (1 - EMA) * now
        ratio = _share(*(torch.tensor(self.running[name]) for name in ("frozen", "tuned")))
        return torch.full_like(frozen[:, 0], ratio.item())

    def inner(self, batch: PromptBatch) -> Callable[[Tensor], Tensor]:
        if self.config.inner == "ce":
            return super().inner(batch)
        clean, frozen = self.logits(self.clean(batch), batch).detach(), self.kept(batch)["logits"]
        alpha = torch.zeros_like(clean[:, 0])
        if self.config.inner == "consistency":
            remembered = dict(self.running)  # the step itself counts once
            alpha, self.running = self.alpha(frozen, clean, batch.y), remembered

        def objective(x_adv: Tensor) -> Tensor:
            adv, how = self.answers(x_adv, batch), self.config.direction
            return (1 - alpha) * divergence(clean, adv, how) + alpha * divergence(frozen, adv, how)

        return objective

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        c = self.config
        clean = self.logits(self.clean(batch), batch)
        adv = self.logits(self.features(batch.x_adv, batch), batch)
        frozen = self.kept(batch)["logits"]
        alpha = self.alpha(frozen, clean, batch.y)
        own = divergence(clean.detach() if c.detach_clean else clean, adv, c.direction)
        other = divergence(frozen, adv, c.direction)
        spread = torch.quantile(alpha.float(), alpha.new_tensor([0.25, 0.75]).float()).tolist()
        batch.notes |= {"divergence": own.mean().item(), "divergence_frozen": other.mean().item()}
        batch.notes |= {"alpha": alpha.mean().item(), "alpha_q1": spread[0], "alpha_q3": spread[1]}
        return {
            "ce": F.cross_entropy(clean, batch.y),
            "kl_train": c.weight * ((1 - alpha) * own).mean(),
            "kl_frozen": c.weight * (alpha * other).mean(),
        }


PROMPTS = PromptSpec(n_text=2, depth_text=9, n_vision=2, depth_vision=9)  # independent, as many as MaPLe: our reading
METHODS = {
    "CAPT": Method(CAPT, PROMPTS, STYLES["apt"], Choices()),
    "CAPT (distillation)": Method(CAPT, PROMPTS, STYLES["apt"], Choices(alpha=1.0)),
    "CAPT (own answer)": Method(CAPT, PROMPTS, STYLES["apt"], Choices(alpha=0.0)),
    "CAPT (text only)": Method(CAPT, PromptSpec(n_text=2, depth_text=9), STYLES["apt"], Choices()),
    "CAPT (image only)": Method(CAPT, PromptSpec(n_vision=2, depth_vision=9), STYLES["apt"], Choices()),
}
