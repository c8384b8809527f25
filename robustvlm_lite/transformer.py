"""Forward passes through open_clip's transformers, written out.

The weights stay in open_clip's own modules; only the order of operations is ours. Two reasons: the maps of the
book need every token and every attention matrix inside the graph, and attention written as
softmax(q kT) v trains about 1.8 times faster than the fused kernel on CPUs in bfloat16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = tuple[Tensor, Tensor]  # keys and values [B, heads, P, W / heads] of tokens that stand before the others


def query_key_value(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each [B, heads, N, W / heads] for tokens x [B, N, W]; the query carries the 1 / sqrt(W / heads)."""
    b, n, w = x.shape
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).view(b, n, 3, attn.num_heads, w // attn.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q * q.shape[-1] ** -0.5, k, v


def attend(
    attn: nn.MultiheadAttention, x: Tensor, mask: Tensor | None = None, past: Past | None = None
) -> tuple[Tensor, Tensor]:
    """Self-attention of x [B, N, W], and the matrices [B, heads, N, P + N] that it went through.

    mask [N, P + N] is added to the scores. past: of P tokens before x, which x sees but which are not computed again.
    """
    q, k, v = query_key_value(attn, x)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    scores = q @ k.transpose(-1, -2)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1).to(v.dtype)
    return attn.out_proj((weights @ v).transpose(1, 2).reshape(x.shape)), weights


def attention(attn: nn.MultiheadAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-attention of x [B, N, W]; mask [N, N] is added to the scores."""
    return attend(attn, x, mask)[0]


def attention_weights(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The attention matrices [B, heads, N, N] of x [B, N, W]; rows sum to 1."""
    q, k, _ = query_key_value(attn, x)
    return (q @ k.transpose(-1, -2)).softmax(dim=-1)


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
    """One residual attention block; mask and past as in `attend`."""
    return finish_block(block, x, attend(block.attn, block.ln_1(x), mask, past)[0])


def finish_block(block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """What a block makes of tokens x [..., W] whose attention output is `mixed` [..., W]: both residual steps."""
    x = x + block.ls_1(mixed)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def embed(visual: nn.Module, x: Tensor, positions: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    """Tokens [B, 1 + N, W] at the input of the first block; CLS first.

    extra [n, W] or [B, n, W]: tokens without a position, put behind the patches before `ln_pre`; then [B, 1 + N + n, W].
    """
    patches = visual.conv1(x).flatten(2).transpose(1, 2)  # [B, N, W]
    cls = visual.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
    tokens = torch.cat([cls, patches], dim=1) + (visual.positional_embedding if positions is None else positions)
    if extra is not None:
        tokens = torch.cat([tokens, extra.expand(len(x), -1, -1)], dim=1)
    return visual.ln_pre(tokens)


def image_stages(visual: nn.Module, x: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """Tokens [B, 1 + N, W] at the input of each block and at the output of the last; CLS first.

    x: [B, 3, H, W], already normalized by CLIP's mean and std. positions: [1 + N, W] instead of the model's own.
    """
    stages = [embed(visual, x, positions)]
    for block in visual.transformer.resblocks:
        stages.append(run_block(block, stages[-1]))
    return stages


def matrices_through(blocks: Sequence[nn.Module], tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tokens [B, N, W] after `blocks`, and each block's attention matrices [B, heads, N, N].

    The tokens are computed through the matrices, so that a gradient reaches them.
    """
    matrices = []
    for block in blocks:
        mixed, weights = attend(block.attn, block.ln_1(tokens))
        matrices.append(weights)
        tokens = finish_block(block, tokens, mixed)
    return tokens, matrices


def image_matrices(visual: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`matrices_through` all blocks: tokens [B, 1 + N, W] and matrices [B, heads, 1 + N, 1 + N]. x: normalized images."""
    return matrices_through(visual.transformer.resblocks, embed(visual, x))


@torch.no_grad()
def tokens_before(visual: nn.Module, x: Tensor, last: int) -> Tensor:
    """Tokens [B, 1 + N, W] at the input of the last `last` blocks, without a graph. x: normalized images."""
    tokens = embed(visual, x)
    for block in visual.transformer.resblocks[: len(visual.transformer.resblocks) - last]:
        tokens = run_block(block, tokens)
    return tokens


def cls_block(block: nn.Module, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
    """What a block makes of CLS alone, [B, 1, W], and its attention [B, N, N], averaged over heads and detached.

    CLS asks all tokens of x [B, N, W] for keys and values, but needs only its own query and MLP: exact, and most of the
    last block's work is saved. normed: the block's ln_1 of x, so that the caller can take a gradient there.
    """
    q, k, v = query_key_value(block.attn, normed)
    row = (q[:, :, :1] @ k.transpose(-1, -2)).softmax(dim=-1)
    mixed = block.attn.out_proj((row @ v).transpose(1, 2).reshape(len(x), 1, -1))
    with torch.no_grad():
        weights = (q @ k.transpose(-1, -2)).softmax(dim=-1).mean(dim=1)
    return finish_block(block, x[:, :1], mixed), weights


def project(visual: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens [B, N, W] into the joint space, [B, N, D]."""
    return visual.ln_post(tokens) @ visual.proj


def image_tokens(visual: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """All tokens of a plain open_clip vision transformer in the joint space, [B, 1 + N, D], CLS first.

    ln_post and the projection are applied to every token; open_clip applies them to CLS only.
    """
    return project(visual, image_stages(visual, x, positions)[-1])


def text_features(model: nn.Module, ids: Tensor) -> Tensor:
    """Features [C, D] (not normalized) of token ids [C, L], pooled at the end-of-text token (the largest id).

    A causal transformer never looks past that token, so the padding behind the longest caption is cut off.
    """
    end = ids.argmax(dim=-1)
    length = int(end.max()) + 1
    x = model.token_embedding(ids[:, :length]) + model.positional_embedding[:length]
    for block in model.transformer.resblocks:
        x = run_block(block, x, model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(ids), device=ids.device), end])
    return x @ model.text_projection
