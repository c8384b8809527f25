"""The prompted pass through a vision transformer, over open_clip's own modules.

Prompt tokens follow the patches, without a position and before `ln_pre`; at the input of each later prompted block their
places are filled anew (MaPLe, Khattak et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import transformer
from .tail import Tail, split_block


@dataclass(frozen=True)
class Trace:
    """Of each chosen block the tokens [B, L, W] at its input, and the attention [B, heads, L, L] that mixed them.

    Both lie in the graph of the features. CLS first, then patches, then prompt tokens.
    """

    tokens: list[Tensor]
    matrices: list[Tensor]


def image_tail(visual: nn.Module, x: Tensor, prompts: Sequence[Tensor]) -> Tail:
    """The tail at CLS of normalized images x [B, 3, H, W]; prompts as in `Prompts.vision`."""
    *blocks, last = visual.transformer.resblocks
    tokens = _enter(visual, x, prompts)
    for i, block in enumerate(blocks):
        tokens = transformer.run_block(block, _refill(tokens, prompts, i))
    tokens = _refill(tokens, prompts, len(blocks))
    n_content = 1 + visual.grid_size[0] * visual.grid_size[1]
    positions = torch.arange(tokens.shape[1], device=x.device).expand(len(x), -1)
    cls = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return split_block(last, tokens, cls, (positions > 0) & (positions < n_content))


def image_trace(visual: nn.Module, x: Tensor, prompts: Sequence[Tensor], chosen: Sequence[int]) -> tuple[Tensor, Trace]:
    """CLS [B, W] after the last block, and the trace of the blocks with numbers `chosen`, in the tower's order."""
    trace, tokens = Trace([], []), _enter(visual, x, prompts)
    for i, block in enumerate(visual.transformer.resblocks):
        tokens = _refill(tokens, prompts, i)
        if i not in chosen:
            tokens = transformer.run_block(block, tokens)
            continue
        if not tokens.requires_grad:  # the maps' gradients start here, whoever calls
            tokens.requires_grad_()
        mixed, matrices = transformer.attend(block.attn, block.ln_1(tokens))
        trace.tokens.append(tokens)
        trace.matrices.append(matrices)
        tokens = transformer.finish_block(block, tokens, mixed)
    return tokens[:, 0], trace


def _enter(visual: nn.Module, x: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    return transformer.embed(visual, x, extra=prompts[0] if prompts else None)


def _refill(tokens: Tensor, prompts: Sequence[Tensor], block: int) -> Tensor:
    if not 0 < block < len(prompts):
        return tokens
    new = prompts[block].expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, : -new.shape[1]], new], dim=1)
