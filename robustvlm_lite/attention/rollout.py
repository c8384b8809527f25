"""Attention followed through the blocks to CLS, plain and weighted with its own gradient."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import transformer
from ..clip import ZeroShotCLIP
from .scaling import minmax
from .score import top_logit


@torch.no_grad()
def attention_rollout(clip: ZeroShotCLIP, x: Tensor) -> Tensor:
    """Attention followed through all blocks (Abnar and Zuidema 2020): what reaches CLS from each patch, no text. [B, N].

    Half of a token is its own, half comes by attention (mean over heads), and the blocks' matrices are multiplied.
    """
    _, matrices = transformer.image_matrices(clip.vit, clip.normalize(x))
    flow = torch.eye(matrices[0].shape[-1], device=x.device)
    own = flow.clone()
    for weights in matrices:
        flow = (own + weights.mean(dim=1)) / 2 @ flow
    return minmax(flow[:, 0, 1:])


def gradient_rollout(clip: ZeroShotCLIP, x: Tensor, text: Tensor) -> Tensor:
    """Attention that raises the cosine with a text, summed over all paths to CLS (Chefer et al. 2021). [B, N], detached.

    In each block the attention matrices are multiplied with their own gradient; the positive part, averaged over heads,
    is added to what has reached a token so far. text: [B, D], one direction an image.
    """
    depth = len(clip.vit.transformer.resblocks)
    return minmax(_relevance(clip, x, depth, lambda f: (F.normalize(f, dim=-1) * text).sum())[:, 0, 1:])


def gar(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor, last: int | None = None) -> Tensor:
    """Gradient attention rollout of the largest logit (A-TPT, the original form that its ablation names). [..., N].

    The same product as `gradient_rollout`, of another score and not stretched to [0, 1]. x [..., 3, H, W]; text_features
    as in `top_logit`. last: the product and the graph reach over that many blocks; None: over all.
    """
    last = last or len(clip.visual.transformer.resblocks)
    flat = x.reshape(-1, *x.shape[-3:])
    relevance = _relevance(clip, flat, last, lambda f: top_logit(clip, f.view(*x.shape[:-3], -1), text_features))
    return relevance[:, 0, 1:].view(*x.shape[:-3], -1)


def _relevance(clip: ZeroShotCLIP, x: Tensor, last: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Product over the last blocks of I + E_heads relu(A dS/dA), [B, 1 + N, 1 + N]; score: features [B, D] -> scalar S."""
    tokens = transformer.tokens_before(clip.visual, clip.normalize(x), last)
    with torch.enable_grad():
        blocks = clip.visual.transformer.resblocks[-last:]
        tokens, matrices = transformer.matrices_through(blocks, tokens.requires_grad_())
        gradients = torch.autograd.grad(score(transformer.project(clip.visual, tokens[:, :1])[:, 0]), matrices)
    relevance = torch.eye(tokens.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    for weights, gradient in zip(matrices, gradients, strict=True):
        relevance = relevance + (weights.detach() * gradient).relu().mean(dim=1) @ relevance
    return relevance
