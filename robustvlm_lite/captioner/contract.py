"""One contract for models that write: pixels in [0, 1] go in, normalization lives inside, traps are errors.

Specified for ViT-GPT2 and BLIP-2 after arXiv 2402.03627; `targets` are texts, `prompt` is a question for a model that answers.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime import UserError
from .words import Tokenizer

IGNORED = -100  # label of a position at which nothing is predicted
TokenLoss = Callable[..., Tensor]  # (logits [B, T, V], labels [B, T], reduction) -> scalar, or [B] for "none"


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Mean over all valid positions, or with reduction "none" over each image's own, [B]."""
    exact = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(exact, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)
    valid = labels != IGNORED
    if reduction == "none":
        return loss.sum(1) / valid.sum(1).clamp(min=1)
    return loss.sum() / valid.sum().clamp(min=1)


class Captioner(nn.Module):
    """A model of images [B, 3, S, S] that gives the logits of a text, and writes one.

    model: transformers' own module. mean, std: of the pixels that it takes. name, weights_sha256: as in `clip`.
    Subclasses give `logits`, `write` and `trainable`.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, image_size: int, mean, std, max_tokens: int, name="", weights_sha256=""):
        super().__init__()
        self.model, self.tokenizer, self.image_size, self.max_tokens = model, tokenizer, image_size, max_tokens
        self.name, self.weights_sha256 = name, weights_sha256
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that fine-tuning moves."""
        return list(self.model.parameters())

    def logits(self, x: Tensor, targets: Sequence[str], prompt: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """(logits [B, T, V], labels [B, T]): logits[b, t] predicts labels[b, t], which is IGNORED where nothing is predicted.

        x [B, 3, S, S] in [0, 1]. Differentiable in x. Raises UserError for images or texts that the model would take wrongly.
        """
        raise TypeError(f"{type(self).__name__} gives no logits")

    def write(self, x: Tensor, prompt: Sequence[str] | None, options: dict) -> Tensor:
        """Token ids [B, T] that the model generates, without what it was given."""
        raise TypeError(f"{type(self).__name__} does not write")

    def token_loss(
        self, x: Tensor, targets: Sequence[str], prompt=None, *, loss: TokenLoss = cross_entropy, reduction: str = "mean"
    ) -> Tensor:
        """A token loss of the targets: a scalar, or [B] with reduction "none"."""
        return loss(*self.logits(x, targets, prompt), reduction=reduction)

    @torch.no_grad()
    def generate(self, x: Tensor, prompt: Sequence[str] | None = None, *, max_new_tokens: int = 20, num_beams: int = 1) -> list[str]:
        """What the model writes about each image: greedy, or the best of `num_beams` beams; first line, lower case."""
        ids = {"bos_token_id": self.tokenizer.start, "eos_token_id": self.tokenizer.eos, "pad_token_id": self.tokenizer.pad}
        options = ids | {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        written = self.write(x, prompt, options)
        return [(self.tokenizer.decode(ids).strip().splitlines() or [""])[0].strip().lower() for ids in written.tolist()]

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels as the model takes them; UserError unless x is [B, 3, S, S], floating and in [0, 1]."""
        side = self.image_size
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, side, side):
            raise UserError(f"expected images [B, 3, {side}, {side}], got {list(x.shape)}; convert to RGB and resize first")
        if not x.is_floating_point():
            raise UserError(f"expected pixels as floats in [0, 1], got {x.dtype}; divide by 255")
        low, high = x.detach().amin().item(), x.detach().amax().item()
        if not (low >= 0 and high <= 1):
            raise UserError(f"expected pixels in [0, 1], got [{low:g}, {high:g}]; normalization happens inside the model")
        return (x - self.mean) / self.std

    def labels(self, targets: Sequence[str], n: int) -> list[list[int]]:
        """Token ids of each target with the end token; UserError for an empty or too long one."""
        if len(targets) != n:
            raise UserError(f"expected one target an image, got {len(targets)} for {n} images")
        empty = [i for i, text in enumerate(targets) if not text.strip()]
        if empty:
            raise UserError(f"expected a text for every image, got an empty one at {empty[0]}; drop that image")
        ids = [[*self.tokenizer.encode(text), self.tokenizer.eos] for text in targets]
        longest = max(ids, key=len)
        if len(longest) > self.max_tokens:
            text = targets[ids.index(longest)]
            raise UserError(f"expected at most {self.max_tokens} tokens, got {len(longest)} for {text[:40]!r}; shorten the text")
        return ids


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """Rows of token ids as one tensor [B, longest], filled up on the right, or on the left."""
    width = max(map(len, rows))
    filled = [[*[fill] * (width - len(row)), *row] if left else [*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled)
