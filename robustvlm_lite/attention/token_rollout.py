"""Token-gradient attention rollout (A-TPT): attention of the last two blocks, weighted with what each token adds.

The gradient is taken at the tokens that go *into* a block. At the output of the last block it would be zero for every
patch, because the image feature reads CLS alone. Even at its input a patch is read through a layer norm only, so that its
product with the gradient is what the norm's eps leaves of it: see `through_norm`.
"""

import torch
from torch import Tensor, nn

from .. import transformer
from ..clip import ZeroShotCLIP
from .scaling import clip_top
from .score import top_logit

EPS = 1e-8
SHARES = {"paper": (1 / 2, 1 / 2), "released": (1 / 3, 2 / 3)}  # of the last but one and the last block in their average


def token_rollout(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor, form: str = "paper") -> Tensor:
    """Token-gradient attention rollout of the largest logit (A-TPT, section on attention). [..., N] >= 0, detached.

    x [..., 3, H, W], any number of images and views at once; text_features as in `top_logit`. form: "paper", or
    "released" with rows of sum 1, the last block counted twice and values cut off at the 0.99 quantile. The map is not
    stretched to [0, 1]. It is zero where no token adds to the logit (`is_flat`).
    """
    visual = clip.visual
    before, last = visual.transformer.resblocks[-2:]
    first = transformer.tokens_before(visual, clip.normalize(x.reshape(-1, *x.shape[-3:])), 2)
    with torch.enable_grad():
        second, (weights,) = transformer.matrices_through([before], first.requires_grad_())
        normed = last.ln_1(second)
        cls, weights_last = transformer.cls_block(last, second, normed)
        features = transformer.project(visual, cls).view(*x.shape[:-3], -1)
        slopes = torch.autograd.grad(top_logit(clip, features, text_features), (first, second, normed))
    in_last = through_norm(last.ln_1, second.detach(), slopes[2])
    in_last[:, 0] = (second.detach() * slopes[1])[:, 0].sum(dim=-1)  # CLS goes past the norm as well
    products = ((first.detach() * slopes[0]).sum(dim=-1), in_last)
    rows = cls_row((weights.detach().mean(dim=1), weights_last), tuple(map(token_relevance, products)), form)
    return (clip_top(rows) if form == "released" else rows).view(*x.shape[:-3], -1)


def token_relevance(products: Tensor) -> Tensor:
    """W [B, T]: positive part of <token, dS/dtoken> [B, T] as shares of all tokens; zero if none adds."""
    w = products.relu()
    return w / (w.sum(dim=-1, keepdim=True) + EPS)


@torch.no_grad()
def through_norm(norm: nn.LayerNorm, tokens: Tensor, slope: Tensor) -> Tensor:
    """<token, dS/dtoken> [B, T] of tokens [B, T, D] that S reads through `norm` alone, from slope = dS/dnorm(token).

    A layer norm does not see a token's length, so the product would be 0 but for its eps: it is eps / (variance + eps)
    of <norm(token) - bias, slope>. Multiplied out in float32 instead, it is a sum that cancels to rounding.
    """
    share = norm.eps / (tokens.var(dim=-1, correction=0) + norm.eps)
    return share * ((norm(tokens) - norm.bias) * slope).sum(dim=-1)


def cls_row(attention: tuple[Tensor, Tensor], relevance: tuple[Tensor, Tensor], form: str) -> Tensor:
    """What reaches CLS from each patch, [B, T - 1], through A_last (s A_before + (1 - s) A_last) with A = I + E_h(A) W.

    attention: [B, T, T] of the last but one and the last block, averaged over heads; relevance: [B, T] of each. Only
    the row of CLS is multiplied out.
    """
    eye = torch.eye(attention[0].shape[-1], dtype=attention[0].dtype, device=attention[0].device)
    refined = [_rows(eye + a * w[:, None, :], form) for a, w in zip(attention, relevance, strict=True)]
    average = _rows(sum(share * a for share, a in zip(SHARES[form], refined, strict=True)), form)
    return (refined[1][:, :1] @ average)[:, 0, 1:]


def _rows(m: Tensor, form: str) -> Tensor:
    """Rows of sum 1 in the released form, m itself in the paper's."""
    return m / (m.sum(dim=-1, keepdim=True) + EPS) if form == "released" else m
