"""The prompted pass through the text tower, for all classes and, with a context an image, for all images at once.

Context tokens stand behind the start of the text, with the positions of the words that they replace; at the input of each
later prompted block their places are filled anew, without positions (MaPLe, Khattak et al. 2023).

A causal tower lets three things be left out, exactly: what lies behind the longest text; for all classes but one the
leading tokens that they share, whose keys and values are the same; and in the last block every query but the end's.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from .. import transformer
from .tail import Tail, split_block
from .words import ClassWords


def text_tail(model: nn.Module, words: ClassWords, prompts: Sequence[Tensor]) -> Tail:
    """The tail at the end token of every class, N = C; with a context an image ([B, 1 or C, n, W]), N = [B, C].

    model: open_clip's CLIP; prompts as in `Prompts.text`.
    """
    (n_classes, length), shared = words.ids.shape, words.shared
    x = _embed(model, words, prompts)  # [G, C, L, W], one group an image or one for all
    groups = len(x)
    mask = model.attn_mask[:length, :length]
    start, rest = x[:, 0, :shared], x[:, :, shared:].flatten(0, 1)  # [G, P, W], [G * C, L - P, W]
    *blocks, last = model.transformer.resblocks
    for i, block in enumerate(blocks):
        start = _refill(start, prompts, i)
        past = transformer.query_key_value(block.attn, block.ln_1(start))[1:]
        past = tuple(t.repeat_interleave(n_classes, 0) for t in past)
        rest = transformer.run_block(block, rest, mask[shared:], past)
        start = transformer.run_block(block, start, mask[:shared, :shared])
    start = _refill(start, prompts, len(blocks)).repeat_interleave(n_classes, 0)
    end, content = words.end.repeat(groups), words.content.repeat(groups, 1)
    seen = torch.arange(length, device=end.device) <= end[:, None]
    tail = split_block(last, torch.cat([start, rest], dim=1), end, content, seen)
    if not prompts or prompts[0].ndim < 4:
        return tail
    return Tail(*(getattr(tail, f.name).unflatten(0, (groups, n_classes)) for f in fields(tail)))


def _embed(model: nn.Module, words: ClassWords, prompts: Sequence[Tensor]) -> Tensor:
    """Token embeddings with the context in its places, and positions: [G, C, L, W]."""
    x = model.token_embedding(words.ids)[None]
    if prompts:
        context = prompts[0][(None,) * (4 - prompts[0].ndim)]  # [G, 1 or C, n, W]
        where = words.slots[None, :, :, None].expand(len(context), -1, -1, x.shape[-1])
        x = x.expand(len(context), -1, -1, -1).scatter(2, where, context.expand_as(where))
    return x + model.positional_embedding[: words.ids.shape[1]]


def _refill(start: Tensor, prompts: Sequence[Tensor], block: int) -> Tensor:
    """start [G, P, W] with the context of this block in places 1 to n."""
    if not 0 < block < len(prompts):
        return start
    new = prompts[block].reshape(-1, *prompts[block].shape[-2:]).expand(len(start), -1, -1)
    return torch.cat([start[:, :1], new, start[:, 1 + new.shape[1] :]], dim=1)
