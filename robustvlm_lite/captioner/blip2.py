"""BLIP-2: a vision tower, a Q-Former that asks it through learned queries, and OPT that writes (transformers' own class).

The class accepts a text without image placeholders, or with too few, and then ignores the image. Here the queries' outputs
are put before the text as embeddings, so that there is no placeholder to forget. Specification 2.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..runtime import UserError
from .contract import IGNORED, Captioner, padded


class Blip2(Captioner):
    """Answers a question, or captions where there is none.

    asks: how a question becomes the text that OPT reads, e.g. "Question: {} Answer:".
    """

    asks = "{}"

    def trainable(self) -> list[nn.Parameter]:
        """Q-Former, queries, projection and the vision tower's last norm: what the release fine-tunes."""
        parts = (self.model.qformer, self.model.language_projection, self.model.vision_model.post_layernorm)
        return [self.model.query_tokens, *(p for part in parts for p in part.parameters())]

    def seen(self, x: Tensor) -> Tensor:
        """What OPT gets of each image, [B, Q, W]."""
        patches = self.model.vision_model(self.normalize(x)).last_hidden_state
        queries = self.model.query_tokens.expand(len(x), -1, -1)
        return self.model.language_projection(self.model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state)

    def logits(self, x: Tensor, targets: Sequence[str], prompt: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        return self.logits_of(self.seen(x), targets, prompt)

    def logits_of(self, seen: Tensor, targets: Sequence[str], prompt: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """As `logits`, for images that `seen` [B, Q, W] has read already: several questions share it."""
        given, answers = self.given(prompt, len(seen)), self.labels(targets, len(seen))
        ids = padded([a + b for a, b in zip(given, answers, strict=True)], self.tokenizer.pad).to(self.device)
        labels = padded([[IGNORED] * len(a) + b for a, b in zip(given, answers, strict=True)], IGNORED).to(self.device)
        embeds = torch.cat([seen, self.model.get_input_embeddings()(ids)], dim=1)
        logits = self.model.language_model(inputs_embeds=embeds).logits
        return logits[:, seen.shape[1] - 1 : -1], labels

    def write(self, x: Tensor, prompt: Sequence[str] | None, options: dict) -> Tensor:
        seen = self.seen(x)
        ids = padded(self.given(prompt, len(x)), IGNORED, left=True).to(self.device)  # so that the answer follows at once
        there = ids != IGNORED
        embeds = torch.cat([seen, self.model.get_input_embeddings()(ids.masked_fill(~there, self.tokenizer.pad))], dim=1)
        mask = torch.cat([torch.ones_like(seen[:, :, 0], dtype=torch.bool), there], dim=1).long()
        return self.model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    def given(self, prompt: Sequence[str] | None, n: int) -> list[list[int]]:
        """Token ids before the answer: the start token, then the question where there is one."""
        if prompt is None:
            return [[self.tokenizer.start]] * n
        if len(prompt) != n:
            raise UserError(f"expected one question an image, got {len(prompt)} for {n} images")
        empty = [i for i, text in enumerate(prompt) if not text.strip()]
        if empty:
            raise UserError(f"expected a question for every image, got an empty one at {empty[0]}; pass None to caption")
        return [[self.tokenizer.start, *self.tokenizer.encode(self.asks.format(text))] for text in prompt]
