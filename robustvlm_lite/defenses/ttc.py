"""TTC, test-time counterattack (Xing et al. 2025): move an image away from its own feature, if it looks falsely stable.

Training-free. An attacked image sits where small noise hardly moves its feature; a clean one does not. So the share by which
noise moves the feature decides whether to counterattack or to add the noise alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..clip import Classifier, ZeroShotCLIP
from .base import Defense
from .keyed import Keyed
from .recipe import Passes

EPS_255, STEP_255, STEPS = 4.0, 1.0, 2
STABLE, BETA = 0.2, 2.0  # below this relative move an image counts as attacked; steps weigh exp(beta k)


class TTC(Defense):
    """CLIP behind a counterattack of 4/255. Nothing is trained."""

    name = "TTC"
    deterministic = False
    adapts_at_test_time = True

    def __init__(self, clip: ZeroShotCLIP):
        super().__init__(clip.requires_grad_(False))

    def classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> "Counterattacked":
        return Counterattacked(self.clip.classifier(class_names, templates))

    def attack_surface(self, classifier: "Counterattacked") -> nn.Module:
        """The defense itself; the paper attacks `classifier.undefended()`."""
        return classifier


class Counterattacked(Keyed):
    """Pixels [B, 3, S, S] in [0, 1] to logits [B, C] of the moved images; the move is a constant to a gradient (BPDA)."""

    def __init__(self, plain: Classifier):
        super().__init__()
        self.plain, self.passes, self.settings = plain, Passes(), "counterattack"

    def undefended(self) -> Classifier:
        """The same CLIP without the defense."""
        return self.plain

    def forward(self, x: Tensor) -> Tensor:
        self.passes.image_forwards += (2 + STEPS) * len(x)
        self.passes.image_backwards += STEPS * len(x)
        return self.plain(x + self.move(x.detach()))

    def move(self, x: Tensor) -> Tensor:
        """What is added to each image, [B, 3, S, S]: at most 4/255, and never out of [0, 1]."""
        eps = EPS_255 / 255
        noise = [(2 * torch.rand(x.shape[1:], generator=g) - 1) * eps for g in self.generators(len(x))]
        deltas = [((x + torch.stack(noise).to(x)).clamp(0, 1) - x)] if noise else [x]
        with torch.no_grad():
            home = self._feature(x)
        share = None
        for _ in range(STEPS):
            with torch.enable_grad():
                d = deltas[-1].detach().requires_grad_()
                away = self._feature(x + d) - home
                (g,) = torch.autograd.grad(away.square().sum(), d)
            if share is None:
                share = away.detach().norm(dim=1) / home.norm(dim=1)
            moved = (deltas[-1] + g.sign() * STEP_255 / 255).clamp(-eps, eps)
            deltas.append((x + moved).clamp(0, 1) - x)
        weights = (BETA * torch.arange(STEPS + 1.0)).softmax(dim=0).to(x)
        counter = sum(w * d for w, d in zip(weights, deltas, strict=True))
        return torch.where((share < STABLE)[:, None, None, None], counter, deltas[0])

    def _feature(self, x: Tensor) -> Tensor:
        """The image feature before it is made unit, [B, D]."""
        return self.plain.clip.tokens(x)[:, 0]
