"""Forward pass through open_clip's ModifiedResNet, with its attention pool written out.

The weights stay in open_clip's own modules. Written out, the pool attends from the mean token alone, the one output that
open_clip keeps, and hands out every position in the joint space, so that the maps of the book exist for a ResNet too.
"""

import torch
from torch import Tensor, nn

STRIDE = 32  # pixels of a cell of the final grid


def last_stage(visual: nn.Module, x: Tensor) -> Tensor:
    """The final features [B, W, h, w]. x: [B, 3, H, W], already normalized by CLIP's mean and std."""
    x = visual.stem(x)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    return x


def pool_input(visual: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Tokens [B, 1 + N, W] that enter the attention pool: the mean of the final features, then the features row by row.

    x as in `last_stage`. positions: [1 + N, W] instead of the model's own.
    """
    features = last_stage(visual, x).flatten(2).transpose(1, 2)  # [B, N, W]
    tokens = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)
    positions = visual.attnpool.positional_embedding if positions is None else positions
    return tokens + positions.to(tokens.dtype)


def pool_weights(pool: nn.Module, tokens: Tensor) -> Tensor:
    """How much the mean token attends to each token, [B, heads, 1, 1 + N]; sums to 1. tokens: of `pool_input`."""
    q, k = _heads(pool, pool.q_proj(tokens[:, :1])), _heads(pool, pool.k_proj(tokens))
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)


def image_tokens(visual: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The image feature and every position in the joint space, [B, 1 + N, D].

    The first token is what open_clip returns. A position takes the value path alone, v_proj and then c_proj: the
    feature is the mean of these over the positions, head by head, weighted by attention.
    """
    return pooled(visual.attnpool, pool_input(visual, x, positions))[0]


def pooled(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`image_tokens` [B, 1 + N, D] of the tokens of `pool_input`, and the weights [B, heads, 1, 1 + N] of its feature."""
    value, weights = pool.v_proj(tokens), pool_weights(pool, tokens)
    feature = (weights.to(value.dtype) @ _heads(pool, value)).transpose(1, 2).flatten(2)  # [B, 1, W]
    return pool.c_proj(torch.cat([feature, value[:, 1:]], dim=1)), weights


def _heads(pool: nn.Module, x: Tensor) -> Tensor:
    """[B, N, W] as [B, heads, N, W / heads]."""
    return x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
