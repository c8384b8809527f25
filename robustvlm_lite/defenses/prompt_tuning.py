"""The rivals of CAPT and CBA-FAPT, each a set of prompts and a loss over one loop.

AVP (TeCoA's visual prompts, Mao et al. 2023) and its few-shot form AdvVP; AdvTP, AdvVLP and AdvMaPLe (Zhou et al. 2024:
the prompts of CoOp, of independent towers and of MaPLe under TeCoA's loss); APT (Li et al. 2024); AdvPT (Zhang et al.
2024); FAP (Zhou et al. 2024); TRADES (Zhang et al. 2019) on prompts; PAFT, the linear probe that APT compares with.
Hand-engineered prompts are plain CLIP with its templates: `Defense`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import ZeroShotCLIP
from ..data import ImageSet
from ..prompts import PromptSpec
from ..runtime import UserError, generator
from . import terms
from .base import TrainingAttack
from .prompting import STYLES, Method, PromptBatch, PromptTuning
from .training import Batch, Task, Trained


@dataclass(frozen=True)
class Weight:
    """Of the second term: lambda of FAP, beta of TRADES. With 0 both are clean prompt tuning."""

    weight: float

    def __post_init__(self):
        if not self.weight >= 0:
            raise UserError(f"expected a weight (lambda, beta) >= 0, got {self.weight}; 0 leaves clean prompt tuning")


class AdversarialCE(PromptTuning):
    """TeCoA's loss: cross-entropy on attacked images, over any prompts."""

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        logits = self.logits(self.features(batch.x_adv, batch), batch)
        return {"ce_adv": F.cross_entropy(logits, batch.y)}


class FAP(PromptTuning):
    """Few-shot adversarial prompt tuning: CE(x) + lambda (cos + 1) KL(p(x) || p(x_adv)); its attack maximises that KL."""

    name = "FAP"
    attacks_divergence = True

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        clean, adv = self.clean(batch), self.features(batch.x_adv, batch)
        logits, logits_adv = self.logits(clean, batch), self.logits(adv, batch)
        consistency = terms.feature_aware_kl(logits, logits_adv, clean, adv).mean()
        batch.notes["divergence"] = terms.kl(logits, logits_adv).mean().item()
        return {"ce": F.cross_entropy(logits, batch.y), "consistency": self.config.weight * consistency}


class TradesPrompts(PromptTuning):
    """TRADES over prompts: CE(x) + beta KL(p(x) || p(x_adv)), the gradient through both; its attack maximises that KL."""

    name = "TRADES"
    attacks_divergence = True

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        logits = self.logits(self.clean(batch), batch)
        divergence = terms.kl(logits, self.logits(self.features(batch.x_adv, batch), batch)).mean()
        batch.notes["divergence"] = divergence.item()
        return {"ce": F.cross_entropy(logits, batch.y), "kl": self.config.weight * divergence}


class AdvPT(PromptTuning):
    """A text context over a bank of attacked image features, made once without labels.

    The bank maximises KL(softmax(z(x)) || softmax(z(x_adv))) between raw features of the frozen tower. No attack in it
    has seen the prompts: robust accuracy under the paper's own attack is that of a transfer attack.
    """

    name = "AdvPT"
    attacks_in_training = False

    def fit(self, data: ImageSet | Sequence[ImageSet], *, attack: TrainingAttack | None = None, seed: int = 0, **options):
        if attack is None:
            raise UserError(f"{self.name} makes its bank of attacked features: expected attack=..., got None; pass one")
        self._attack, self._starts = attack, generator(seed, "bank")
        return super().fit(data, seed=seed, **options)

    def frozen(self, task: Task, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def raw(images: Tensor) -> Tensor:
            return self.clip.tokens(images)[:, 0]

        with torch.no_grad():
            home = raw(x)
        x_adv = self._attack(lambda moved: terms.kl(home, raw(moved)), x, generators=self._starts)
        with torch.no_grad():
            return {"bank": F.normalize(raw(x_adv), dim=-1)}

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        return {"ce_bank": F.cross_entropy(self.logits(self.kept(batch)["bank"], batch), batch.y)}


class HeadClassifier(nn.Module):
    """Pixels [B, 3, H, W] to logits [B, C]: unit image features through a linear head [C, D]."""

    def __init__(self, clip: ZeroShotCLIP, head: nn.Parameter, precision: torch.dtype | None = None):
        super().__init__()
        self.clip, self.head, self.precision = clip, head, precision

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.image_features(x, self.precision) @ self.head.T

    def fast(self) -> "HeadClassifier":
        """The same for gradients in bfloat16, as `clip.Classifier.fast`."""
        return HeadClassifier(self.clip, self.head, torch.bfloat16)


class LinearProbe(Trained):
    """PAFT: a linear head on the frozen tower, from CLIP's own text features, trained on attacked images.

    APT names it after Chen et al. (2020) and does not release it; this is our reading. It knows its classes and no other.
    """

    name = "PAFT"

    def __init__(self, clip: ZeroShotCLIP, spec: PromptSpec, name: str = "", class_names: Sequence[str] = (), config=None):
        super().__init__(clip.requires_grad_(False), name)
        if not class_names:
            raise UserError(f"{self.name}: expected the class names that its head is for, got none; pass class_names")
        self.class_names, self.config = tuple(class_names), config
        self.head = nn.Parameter(clip.mean.new_zeros(len(class_names), clip.model.text_projection.shape[1]))

    def task(self, data: ImageSet) -> Task:
        self._require(data.class_names)
        text = self.clip.text_features(data.class_names, data.templates)
        with torch.no_grad():
            self.head.copy_(self.clip.logit_scale * text)
        return Task(data, text)

    def learned(self) -> list[nn.Parameter]:
        return [self.head]

    def answers(self, x: Tensor, batch: Batch) -> Tensor:
        return self.clip.image_features(x, self.precision) @ self.head.detach().T

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            features = self.clip.image_features(batch.x_adv, self.precision)
        return {"ce_adv": F.cross_entropy(features @ self.head.T, batch.y)}

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> HeadClassifier:
        self._require(class_names)
        return HeadClassifier(self.clip, self.head)

    def collapsed(self, n_classes: int) -> None:
        """Unknown: the loss has no clean term."""

    def state(self) -> dict[str, Tensor]:
        return {"head": self.head.detach().cpu().clone()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        got = {name: tuple(value.shape) for name, value in state.items()}
        if got != {"head": tuple(self.head.shape)}:
            raise UserError(f"{self.name}: expected a head of shape {tuple(self.head.shape)}, got {got or 'none'}")
        self.head.copy_(state["head"])

    def choices(self) -> dict:
        return {"spec": {}, "class_names": list(self.class_names), "config": {}}

    def _require(self, class_names: Sequence[str]) -> None:
        if tuple(class_names) != self.class_names:
            raise UserError(
                f"{self.name}: expected the {len(self.class_names)} classes of its head, got {len(class_names)} others; "
                "a linear head cannot name new classes"
            )


def _deep(**options) -> PromptSpec:
    """Two tokens in each of nine blocks of both towers, from "a photo of a" and from noise (MaPLe, FAP)."""
    return PromptSpec(n_text=2, depth_text=9, n_vision=2, depth_vision=9, **options)


APT16 = {"n_text": 16, "start": "normal"}
LAMBDA = Weight(1.5)  # of all of FAP's scripts
RIVALS = {
    "AVP": Method(AdversarialCE, PromptSpec(n_vision=200, pixel_pad=40), STYLES["avp"]),
    "AdvVP": Method(AdversarialCE, PromptSpec(n_vision=5, pixel_pad=30), STYLES["advvp"]),
    "PAFT": Method(LinearProbe, PromptSpec(), STYLES["apt"]),
    "APT": Method(AdversarialCE, PromptSpec(**APT16), STYLES["apt"]),
    "APT (class-specific)": Method(AdversarialCE, PromptSpec(**APT16, class_specific=True), STYLES["apt"]),
    "AdvPT": Method(AdvPT, PromptSpec(n_text=32, start="normal"), STYLES["advpt"]),
    "AdvTP": Method(AdversarialCE, PromptSpec(**APT16), STYLES["coop"]),
    "AdvVLP": Method(AdversarialCE, _deep(), STYLES["maple"]),
    "AdvMaPLe": Method(AdversarialCE, _deep(coupling="text2vision"), STYLES["maple"]),
    "AdvMaPLe (released)": Method(AdversarialCE, _deep(coupling="fap"), STYLES["maple"]),
    "FAP": Method(FAP, _deep(coupling="fap"), STYLES["maple"], LAMBDA),
    "FAP (released)": Method(FAP, _deep(coupling="fap", quirk_literal_braces=True), STYLES["maple"], LAMBDA),
    "FAP (shared projection)": Method(FAP, _deep(coupling="fap", share_projection=True), STYLES["maple"], LAMBDA),
    "TRADES": Method(TradesPrompts, _deep(), STYLES["apt"], Weight(6.0)),  # TRADES' own beta
}
