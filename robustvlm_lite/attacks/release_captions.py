"""The released attacks on models that write, with what they do beside attacking: quirks to measure, no member of a worst case.

BIM in normalized space. On the captioner its iterates are written as JPEG pictures, with the statistics of another model, and
read again; on BLIP-2 they leave the range of pixels and chase what the model says (specification of arXiv 2402.03627, section
3.2). Nothing here respects a budget; what it spent is measured.
"""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..captioner import Captioner, TokenLoss, cross_entropy
from ..runtime import UserError
from .captions import on_texts
from .objectives import value_and_grad

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class ReleaseAttack:
    """Switches and sizes of the released captioning script; α and ε in normalized units, as there. `blip2()` has the other's.

    quirk_statistics: iterates are written with CLIP's mean and deviation although the model takes 0.5 and 0.5, which shrinks
    contrast in every generation. quirk_jpeg: they are written as JPEG, cut off to whole gray levels, and read again; else
    they are only clipped to pictures. alpha = 0 is the control: what is left of the attack without any gradient.
    quirk_unclamped: they stay in memory and may leave the range of pixels. quirk_unasked: a model that is asked when it writes
    is attacked without its question. quirk_moving_labels: the target is what the model says at the moment, not its clean text.
    """

    alpha: float = 0.02
    eps: float = 1.0
    generations: int = 11
    quirk_statistics: bool = True
    quirk_jpeg: bool = True
    quirk_unclamped: bool = False
    quirk_unasked: bool = False
    quirk_moving_labels: bool = False
    quality: int = 75

    def __post_init__(self):
        if not (0 <= self.alpha < float("inf") and 0 < self.eps < float("inf") and self.generations >= 1):
            raise UserError(f"expected alpha >= 0, eps > 0 and generations >= 1, got {self.alpha}, {self.eps} and {self.generations}")
        if self.quirk_unclamped and self.quirk_jpeg:
            raise UserError("expected quirk_unclamped or quirk_jpeg, got both; a JPEG picture holds no pixel outside [0, 1]")

    @classmethod
    def blip2(cls, alpha: float = 0.3) -> "ReleaseAttack":
        """As the released script attacks BLIP-2: pixels leave their range, and the target moves."""
        memory = {"quirk_statistics": False, "quirk_jpeg": False, "quirk_unclamped": True}
        return cls(alpha, quirk_unasked=True, quirk_moving_labels=True, **memory)

    def run(
        self, model: Captioner, x: Tensor, prompt: Sequence[str] | None = None, loss: TokenLoss = cross_entropy
    ) -> list[tuple[Tensor, list[str]]]:
        """(images as written, what the model says) of every generation; the first is the clean image.

        x [B, 3, S, S] in [0, 1].
        """
        mean, std = (torch.tensor(v).view(3, 1, 1).to(x) for v in CLIP_STATISTICS) if self.quirk_statistics else (model.mean, model.std)
        reach = self.eps * model.std.max().item() if self.quirk_unclamped else 0.0
        reader, asked = widened(model, reach), None if self.quirk_unasked else prompt
        clean = (x - model.mean) / model.std
        shown, found = x, [(x, model.generate(x, prompt))]
        targets = [text or "a" for text in found[0][1]]  # an empty text has no loss
        for _ in range(self.generations - 1):
            gradient = value_and_grad(on_texts(reader, targets, asked, loss), narrowed(shown, reach))[1]
            adv = (shown - model.mean) / model.std + self.alpha * gradient.sign()
            adv = clean + (adv - clean).clamp(-self.eps, self.eps)
            shown = (adv * std + mean).clamp(-reach, 1 + reach)
            shown = torch.stack([jpeg(image, self.quality) for image in shown]) if self.quirk_jpeg else shown
            found.append((shown, reader.generate(narrowed(shown, reach), prompt)))
            if self.quirk_moving_labels:
                targets = [text or "a" for text in found[-1][1]]
        return found


def widened(model: Captioner, reach: float) -> Captioner:
    """`model` for pixels in [-reach, 1 + reach], given as `narrowed` to [0, 1]: same weights, statistics moved along.

    A captioner refuses pixels outside [0, 1], as it should; the released script shows them to its model.
    """
    if not reach:
        return model
    wide = copy.copy(model)
    wide._buffers = model._buffers | {"mean": narrowed(model.mean, reach), "std": model.std / (1 + 2 * reach)}
    return wide


def narrowed(pixels: Tensor, reach: float) -> Tensor:
    """[-reach, 1 + reach] onto [0, 1]; rounding does not leave it."""
    return ((pixels + reach) / (1 + 2 * reach)).clamp(0, 1) if reach else pixels


def jpeg(image: Tensor, quality: int = 75) -> Tensor:
    """A picture [3, H, W] in [0, 1] cut off to whole gray levels, written as JPEG and read again."""
    buffer = io.BytesIO()
    levels = (image.detach().cpu() * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1).to(image) / 255


def spent_255(images: Tensor, clean: Tensor) -> Tensor:
    """Largest change of each image [B] in gray levels, both as 8-bit pictures: the budget that an attack really used."""
    levels, before = ((255 * v).round().clamp(0, 255) for v in (images, clean))
    return (levels - before).abs().amax(dim=(1, 2, 3))
