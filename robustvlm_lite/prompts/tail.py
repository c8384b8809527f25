"""The last block split at the one token that the feature is read from: CLS, or the end of a text.

With o the attention output of that token before `out_proj` and r its residual stream, the feature is head(o, r); no
other token's query, and no other token's MLP, has a say in it. So the split is the cheaper forward pass, and what
attribution needs (Grad-ECLIP; CBA-FAPT, Eq. 4 to 8).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Tail:
    """N inputs with L tokens each; heads side by side in the width W, projections unscaled.

    q [N, W]; k, v [N, L, W]; o, r [N, W]; content [N, L] bool: patches, or context and class name. For texts of one
    context an image, N is [B, C].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    r: Tensor
    content: Tensor


def split_block(block: nn.Module, x: Tensor, at: Tensor, content: Tensor, seen: Tensor | None = None) -> Tail:
    """The tail of x [N, L, W], tokens at the input of `block`, at position `at` [N]; seen [N, L] bool: what it may look at."""
    attn, (n, length, width) = block.attn, x.shape
    rows = torch.arange(n, device=x.device)
    h = block.ln_1(x)
    weights, biases = attn.in_proj_weight.split((width, 2 * width)), attn.in_proj_bias.split((width, 2 * width))
    q = F.linear(h[rows, at], weights[0], biases[0])
    k, v = F.linear(h, weights[1], biases[1]).chunk(2, dim=-1)
    q_heads = q.view(n, attn.num_heads, 1, -1)
    k_heads, v_heads = (t.view(n, length, attn.num_heads, -1).transpose(1, 2) for t in (k, v))
    scores = (q_heads * q_heads.shape[-1] ** -0.5) @ k_heads.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    o = (scores.softmax(dim=-1).to(v.dtype) @ v_heads).reshape(n, width)
    return Tail(q, k, v, o, x[rows, at], content)
