"""Maps of a ResNet tower, which has no blocks of attention but one attention pool over its last stage."""

import torch
from torch import Tensor

from ..clip import ZeroShotCLIP
from .scaling import clip_top
from .score import top_logit
from .token_rollout import token_relevance

FLOOR = 0.2  # what the released code takes off the enlarged map


def stage_cam(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor) -> Tensor:
    """Grad-CAM of the largest logit on the last stage, cut off at its 0.99 quantile (A-TPT, released). [..., N].

    x [..., 3, H, W]; text_features as in `top_logit`. N is the stage's grid, 7 x 7 for 224 pixels.
    """
    stage = _last_stage(clip, x.reshape(-1, *x.shape[-3:]))
    with torch.enable_grad():
        features = clip.visual.attnpool(stage.requires_grad_()).view(*x.shape[:-3], -1)
        (gradient,) = torch.autograd.grad(top_logit(clip, features, text_features), stage)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * stage.detach()).sum(dim=1).relu()
    return clip_top(cam.flatten(1)).view(*x.shape[:-3], -1)


def pool_rollout(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor) -> Tensor:
    """Token-gradient rollout of the attention pool: attention of the mean token times relevance of each. [..., N].

    The paper states its rollout for transformers; this is our reading of it for the one layer of attention that a ResNet
    has, I + E_h(A) W without a product. x [..., 3, H, W]; text_features as in `top_logit`.
    """
    pool, patches = clip.visual.attnpool, _last_stage(clip, x.reshape(-1, *x.shape[-3:])).flatten(2).transpose(1, 2)
    tokens = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1) + pool.positional_embedding
    with torch.enable_grad():
        tokens.requires_grad_()
        q, k, v = (_heads(f(t), pool.num_heads) for f, t in (
            (pool.q_proj, tokens[:, :1]), (pool.k_proj, tokens), (pool.v_proj, tokens)
        ))  # fmt: skip
        row = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)  # [B, heads, 1, 1 + N]
        features = pool.c_proj((row @ v).transpose(1, 2).flatten(2)).view(*x.shape[:-3], -1)
        (gradient,) = torch.autograd.grad(top_logit(clip, features, text_features), tokens)
    cam = row.detach().mean(dim=1)[:, 0] * token_relevance((tokens.detach() * gradient).sum(dim=-1))
    return cam[:, 1:].reshape(*x.shape[:-3], -1)


def sharpen(pictures: Tensor) -> Tensor:
    """Pictures [..., H, W] in [0, 1] less 0.2, relative to their highest pixel, squared (A-TPT, released ResNet path)."""
    above = (pictures - FLOOR).relu()
    return (above / above.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-8)).square()


@torch.no_grad()
def _last_stage(clip: ZeroShotCLIP, x: Tensor) -> Tensor:
    """[B, C, h, w], without a graph."""
    visual = clip.visual
    return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(clip.normalize(x))))))


def _heads(t: Tensor, n: int) -> Tensor:
    """[B, N, W] as [B, n, N, W / n]."""
    return t.unflatten(2, (n, -1)).transpose(1, 2)
