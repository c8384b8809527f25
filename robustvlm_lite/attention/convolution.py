"""Maps of a ResNet tower, which has no blocks of attention but one attention pool over its last stage."""

import torch
from torch import Tensor

from .. import resnet
from ..clip import ZeroShotCLIP
from .scaling import clip_top
from .score import top_logit
from .token_rollout import token_relevance

FLOOR = 0.2  # what the released code takes off the enlarged map


def stage_cam(clip: ZeroShotCLIP, x: Tensor, text_features: Tensor) -> Tensor:
    """Grad-CAM of the largest logit on the last stage, cut off at its 0.99 quantile (A-TPT, released). [..., N].

    x [..., 3, H, W]; text_features as in `top_logit`. N is the stage's grid, 7 x 7 for 224 pixels.
    """
    with torch.no_grad():
        stage = resnet.last_stage(clip.visual, clip.normalize(x.reshape(-1, *x.shape[-3:])))
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
    with torch.no_grad():
        tokens = resnet.pool_input(clip.visual, clip.normalize(x.reshape(-1, *x.shape[-3:])))
    with torch.enable_grad():
        features, row = resnet.pooled(clip.visual.attnpool, tokens.requires_grad_())
        features = features[:, 0].view(*x.shape[:-3], -1)
        (gradient,) = torch.autograd.grad(top_logit(clip, features, text_features), tokens)
    cam = row.detach().mean(dim=1)[:, 0] * token_relevance((tokens.detach() * gradient).sum(dim=-1))
    return cam[:, 1:].reshape(*x.shape[:-3], -1)


def sharpen(pictures: Tensor) -> Tensor:
    """Pictures [..., H, W] in [0, 1] less 0.2, relative to their highest pixel, squared (A-TPT, released ResNet path)."""
    above = (pictures - FLOOR).relu()
    return (above / above.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-8)).square()
