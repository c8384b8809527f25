"""ViT-GPT2: an image encoder and a text decoder that looks at it (transformers' VisionEncoderDecoderModel)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import UserError
from .contract import IGNORED, Captioner, padded


class ViTGPT2(Captioner):
    """Captions an image; it takes no prompt. Specification 2.1.

    quirk_train_on_padding: labels are padded with the end token to the decoder's full length and all are predicted, as the
    released fine-tuning does. Most of the targets are then end tokens.
    """

    quirk_train_on_padding = False

    def logits(self, x: Tensor, targets: Sequence[str], prompt: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        refuse_prompt(prompt)
        pixels, ids = self.normalize(x), self.labels(targets, len(x))
        if self.quirk_train_on_padding:
            ids = [row + [self.tokenizer.eos] * (self.max_tokens - len(row)) for row in ids]
        labels = padded(ids, IGNORED).to(self.device)
        begin = torch.full_like(labels[:, :1], self.tokenizer.start)
        before = torch.cat([begin, labels[:, :-1]], dim=1)
        before = before.masked_fill(before == IGNORED, self.tokenizer.pad)
        return self.model(pixel_values=pixels, decoder_input_ids=before, decoder_attention_mask=labels != IGNORED).logits, labels

    def write(self, x: Tensor, prompt: Sequence[str] | None, options: dict) -> Tensor:
        refuse_prompt(prompt)
        written = self.model.generate(pixel_values=self.normalize(x), decoder_start_token_id=self.tokenizer.start, **options)
        return written[:, 1:]  # without the start token


def refuse_prompt(prompt: Sequence[str] | None) -> None:
    if prompt is not None:
        raise UserError("expected no prompt for ViT-GPT2, which only captions; take BLIP-2 for questions")
