"""The rivals of TGA-ZSR: fine-tuning on clean or adversarial images. Formulas: TGA-ZSR 4.1 and each method's own paper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .training import Batch, FineTuning, Task


def in_batch_contrastive(logits: Tensor, y: Tensor) -> Tensor:
    """CLIP's symmetric loss with the batch's own label prompts as candidates; logits [B, K], y [B].

    Images of one class share their prompt, so some negatives equal the positive and the loss cannot reach 0: kept, it is
    what the papers call fine-tuning.
    """
    pairs = logits[:, y]  # [B, B]
    diagonal = torch.arange(len(y), device=y.device)
    return (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2


class FTClean(FineTuning):
    """Fine-tuning on clean images with CLIP's contrastive loss: the control without any defense."""

    name = "FT-clean"
    attacks_in_training = False

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"contrastive": in_batch_contrastive(self.logits(batch.x, batch.task.text), batch.y)}


class FTAdv(FineTuning):
    """The same contrastive loss on adversarial images."""

    name = "FT-adv"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"contrastive": in_batch_contrastive(self.logits(batch.x_adv, batch.task.text), batch.y)}


class TeCoA(FineTuning):
    """Text-guided contrastive adversarial training (Mao et al., ICLR 2023): cross-entropy on adversarial images."""

    name = "TeCoA"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(self.logits(batch.x_adv, batch.task.text), batch.y)}


class PMGAFT(FineTuning):
    """Pre-trained model guided adversarial fine-tuning (Wang et al., CVPR 2024).

    CE(x_adv) + KL(frozen model on x_adv || model on x_adv) + KL(model on x || model on x_adv), both KL averaged over the
    batch and at CLIP's own scale (the released code sums, and computes at scale 1).
    """

    name = "PMG-AFT"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        text, n = batch.task.text, len(batch.y)
        adv, clean = self.logits(torch.cat([batch.x_adv, batch.x]), text).split(n)
        with torch.no_grad():
            frozen = self.original[0].logits(batch.x_adv, text, self.precision)

        def kl(target: Tensor) -> Tensor:
            return F.kl_div(adv.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")

        return {"ce": F.cross_entropy(adv, batch.y), "kl_frozen": kl(frozen), "kl_clean": kl(clean)}


class FARE(FineTuning):
    """Unsupervised robust embeddings (Schlarmann et al., ICML 2024): stay where the frozen model puts the clean image.

    Outer and inner objective are one: the squared distance between raw CLS embeddings.
    """

    name = "FARE"

    def frozen(self, task: Task, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"cls": self.original[0].tokens(x)[:, 0]}

    def _distance(self, x: Tensor, batch: Batch) -> Tensor:
        return (self.clip.tokens(x, self.precision)[:, 0] - self.kept(batch)["cls"]).square().sum(1)

    def inner(self, batch: Batch):
        return lambda x_adv: self._distance(x_adv, batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"embedding": self._distance(batch.x_adv, batch).mean()}
