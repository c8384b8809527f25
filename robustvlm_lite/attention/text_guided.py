"""Maps from one forward pass: patch tokens against a text, and the two that need no rollout.

CLIP has no attention between image and text; what TGA-ZSR calls text-guided attention is the dot product between
projected patch tokens and a text feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import resnet, transformer
from ..clip import ZeroShotCLIP, autocast
from ..runtime import UserError, near_miss
from .scaling import minmax
from .score import top_logit

TOKEN_NORMS = ("feature_axis", "token_axis", "none")


def text_map(tokens: Tensor, text: Tensor, token_norm: str = "feature_axis") -> Tensor:
    """Text-guided attention (TGA-ZSR, Eq. 5): patch tokens times the text feature, min-max normalized. [B, N].

    tokens [B, 1 + N, D] with CLS first; text [B, D], one feature an image. token_norm: "none" is the equation;
    "feature_axis", the default, is its cosine form, in which each token is divided by its own length; "token_axis"
    divides each channel by its norm over all tokens, CLS included, as the released code does.
    """
    if token_norm not in TOKEN_NORMS:
        raise UserError(f"unknown token_norm {token_norm!r}; {near_miss(token_norm, TOKEN_NORMS)}")
    if token_norm == "feature_axis":
        tokens = F.normalize(tokens, dim=2)
    elif token_norm == "token_axis":
        tokens = F.normalize(tokens, dim=1)
    return minmax((tokens[:, 1:] @ text[:, :, None]).squeeze(2))


def complementary_map(tokens: Tensor, text: Tensor, text_not: Tensor, token_norm: str = "token_axis") -> Tensor:
    """Comp-TGA: the map of "a photo of a dog" times one minus the map of "not a photo of a dog". [B, N].

    Under the norm of its released code, unlike `text_map` by itself.
    """
    return text_map(tokens, text, token_norm) * (1 - text_map(tokens, text_not, token_norm))


def grad_cam(
    clip: ZeroShotCLIP, x: Tensor, text_features: Tensor, *, create_graph: bool = False, precision=None
) -> Tensor:
    """Grad-CAM on the input of the last block's attention (its ln_1), for the predicted class. [B, N].

    The released "vision-based" ablation of TGA-ZSR returns this map through NumPy, where its gradient ends. With
    create_graph=True the map can be trained.
    """
    visual = clip.vit
    with torch.enable_grad(), autocast(clip.device, precision):
        stages = transformer.image_stages(visual, clip.normalize(x))
        block = visual.transformer.resblocks[-1]
        activation = block.ln_1(stages[-2])
        if not activation.requires_grad:
            activation.requires_grad_()
        last = transformer.finish_block(block, stages[-2], transformer.attention(block.attn, activation))
        score = top_logit(clip, transformer.project(visual, last[:, :1])[:, 0], text_features)
        (gradient,) = torch.autograd.grad(score, activation, create_graph=create_graph, retain_graph=create_graph)
        weights = gradient[:, 1:].mean(dim=1, keepdim=True)  # [B, 1, W]
        cam = minmax((weights * activation[:, 1:]).sum(dim=2).relu().float())
    return cam if create_graph else cam.detach()


def value_map(clip: ZeroShotCLIP, x: Tensor, text: Tensor, mean_text: Tensor | None = None) -> Tensor:
    """Text-guided map over the last block's value path alone (MaskCLIP, Zhou et al. 2022). [B, N].

    Queries and keys of the last block mix background into every patch token; without them a patch keeps its own
    content. mean_text [D]: subtracted from the text, so that what all captions share does not count. The tokens of a
    ResNet take the value path of its attention pool anyway.
    """
    text = text if mean_text is None else text - mean_text
    if not clip.is_vit:
        return text_map(clip.tokens(x), text)
    stages = transformer.image_stages(clip.visual, clip.normalize(x))
    block = clip.visual.transformer.resblocks[-1]
    width = stages[-2].shape[-1]
    value = F.linear(block.ln_1(stages[-2]), block.attn.in_proj_weight[-width:], block.attn.in_proj_bias[-width:])
    return text_map(transformer.project(clip.visual, block.attn.out_proj(value)), text)


def cls_map(clip: ZeroShotCLIP, x: Tensor) -> Tensor:
    """Self-attention of CLS in the last block, or of a ResNet's pool, mean over heads; knows no text. [B, N]."""
    visual, x = clip.visual, clip.normalize(x)
    if clip.is_vit:
        block = visual.transformer.resblocks[-1]
        tokens = block.ln_1(transformer.image_stages(visual, x)[-2])
        weights = transformer.attention_weights(block.attn, tokens)  # [B, heads, 1 + N, 1 + N]
    else:
        weights = resnet.pool_weights(visual.attnpool, resnet.pool_input(visual, x))  # [B, heads, 1, 1 + N]
    return minmax(weights[:, :, 0, 1:].mean(dim=1))


@torch.no_grad()
def named_maps(clip: ZeroShotCLIP, x: Tensor, text: Tensor, mean_text: Tensor) -> dict[str, Tensor]:
    """Every map of one image that the book compares, by name: x [B, 3, H, W], text [B, D], mean_text [D] -> [B, N] each.

    The one called Eq. 5 is its cosine form, the default of `text_map`.
    """
    guided = text_map(clip.tokens(x), text)
    return {
        "text-guided (Eq. 5)": guided,
        "sign flipped": 1 - guided,
        "value path": value_map(clip, x, text),
        "value path − mean": value_map(clip, x, text, mean_text),
        "CLS attention (no text)": cls_map(clip, x),
    }
