"""TGA-ZSR (Yu et al., NeurIPS 2024) and Comp-TGA: adversarial fine-tuning that keeps text-guided attention where it was.

    L = L_CE + alpha L_AR + beta L_AMC                                          (Eq. 8)
    L_AR  = mean_i | A(x_adv_i; theta) - A(x_i; theta_0) |_2                    (Eq. 6)
    L_AMC = mean_i | A(x_i; theta)     - A(x_i; theta_0) |_2                    (Eq. 7)

A is the text-guided map of `attention.text_map`; distances are those of maps upsampled to 224 x 224 pixels, computed
through a Gram matrix. theta_0 is the frozen model: its maps of the training images are computed once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import attention
from ..clip import ZeroShotCLIP
from .training import Batch, FineTuning, Task


@dataclass(frozen=True)
class TGAConfig:
    """Weights of the two attention terms and every choice that paper and released code leave open or make differently."""

    alpha: float = 0.08
    beta: float = 0.05
    token_norm: str = "feature_axis"  # see attention.text_map
    metric: str = "l2"  # see attention.map_distance
    gain: float = 1.0  # multiplies both terms; used to compare metrics at equal force
    quirk_fp16_mean_attack: bool = False  # the training attack differentiates a float16 batch mean without loss scaling


PRESETS = {
    "strict": TGAConfig(),  # cosine maps, sound attack: what the chapter teaches
    "paper": TGAConfig(token_norm="none"),  # the equations, literally
    "released": TGAConfig(token_norm="token_axis", quirk_fp16_mean_attack=True),  # what the released code computes
    "comp": TGAConfig(alpha=0.10, beta=0.07, token_norm="token_axis"),  # the successor's weights and maps
}


class TGAZSR(FineTuning):
    """TGA-ZSR with a configuration; `TGAZSR(clip, PRESETS["released"])`."""

    name = "TGA-ZSR"

    def __init__(self, clip: ZeroShotCLIP, config: TGAConfig = PRESETS["strict"], name: str = ""):
        super().__init__(clip, name)
        self.config = config

    def maps(self, clip: ZeroShotCLIP, task: Task, x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        """A [B, N] of images x with labels y, whose tokens [B, 1 + N, D] under `clip` are at hand."""
        return attention.text_map(tokens, task.text[y], self.config.token_norm)

    def frozen(self, task: Task, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        original = self.original[0]
        with torch.no_grad():
            return {"map": self.maps(original, task, x, y, original.tokens(x, self.precision))}

    def inner(self, batch: Batch):
        if not self.config.quirk_fp16_mean_attack:
            return super().inner(batch)

        def objective(x_adv: Tensor) -> Tensor:  # gradients below float16's smallest number become exactly zero
            logits = self.clip.logits(x_adv, batch.task.text, torch.float16)
            return F.cross_entropy(logits, batch.y, reduction="none") / 128

        return objective

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        c, text = self.config, batch.task.text
        images = torch.cat([batch.x_adv, batch.x]) if c.beta else batch.x_adv
        tokens = self.clip.tokens(images, self.precision)
        logits = self.clip.logit_scale * F.normalize(tokens[: len(batch.y), 0], dim=-1) @ text.T
        terms = {"ce": F.cross_entropy(logits, batch.y)}
        return terms | self.attention_terms(batch, tokens)

    def attention_terms(self, batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
        """The weighted L_AR and L_AMC; a term of weight 0 is not computed."""
        c, n, target = self.config, len(batch.y), self.kept(batch)["map"]
        terms = {}
        for name, weight, x, part in (("ar", c.alpha, batch.x_adv, tokens[:n]), ("amc", c.beta, batch.x, tokens[n:])):
            if weight:
                own = self.maps(self.clip, batch.task, x, batch.y, part)
                terms[name] = weight * c.gain * attention.map_distance(own, target, c.metric).mean()
        return terms


class CompTGA(TGAZSR):
    """Comp-TGA (Yu et al., TPAMI 2026): the map of the class times one minus the map of its negation."""

    name = "Comp-TGA"
    NEGATION = ("this is not a photo of a {}.",)

    def maps(self, clip: ZeroShotCLIP, task: Task, x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        text_not = clip.text_features(task.data.class_names, self.NEGATION)
        return attention.complementary_map(tokens, task.text[y], text_not[y], self.config.token_norm)


class VisionGuided(TGAZSR):
    """The same two terms on Grad-CAM maps that can be trained (the released "vision-based" maps have no gradient)."""

    name = "Vision-guided"

    def maps(self, clip: ZeroShotCLIP, task: Task, x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        trained = clip is self.clip
        return attention.grad_cam(
            clip, x, task.text, create_graph=trained, precision=self.precision if trained else None
        )
