"""Maps of where a CLIP looks: text-guided maps, their distances, and how well a map covers an object.

CLIP has no attention between image and text; what TGA-ZSR calls text-guided attention is the dot product between
projected patch tokens and a text feature. A map is [B, N] over the N patches, row by row, in [0, 1].
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import resnet, transformer
from .clip import ZeroShotCLIP, autocast
from .runtime import UserError, near_miss

TOKEN_NORMS = ("feature_axis", "token_axis", "none")
METRICS = ("l2", "l2_sq", "l1", "cosine")


def minmax(m: Tensor, eps: float = 1e-6) -> Tensor:
    """Each row of m [B, N] stretched to [0, 1]; a constant row becomes 0, not NaN."""
    low, high = m.amin(dim=1, keepdim=True), m.amax(dim=1, keepdim=True)
    return (m - low) / (high - low).clamp_min(eps)


def text_map(tokens: Tensor, text: Tensor, token_norm: str = "feature_axis") -> Tensor:
    """Text-guided attention (TGA-ZSR, Eq. 5): patch tokens times the text feature, min-max normalized. [B, N].

    tokens [B, 1 + N, D] with CLS first; text [B, D], one feature an image. token_norm: "none" is the equation;
    "feature_axis" divides each token by its own length, so that the map is a cosine; "token_axis" divides each channel
    by its norm over all tokens, CLS included, as the released code does.
    """
    if token_norm not in TOKEN_NORMS:
        raise UserError(f"unknown token_norm {token_norm!r}; {near_miss(token_norm, TOKEN_NORMS)}")
    if token_norm == "feature_axis":
        tokens = F.normalize(tokens, dim=2)
    elif token_norm == "token_axis":
        tokens = F.normalize(tokens, dim=1)
    return minmax((tokens[:, 1:] @ text[:, :, None]).squeeze(2))


def complementary_map(tokens: Tensor, text: Tensor, text_not: Tensor, token_norm: str = "token_axis") -> Tensor:
    """Comp-TGA: the map of "a photo of a dog" times one minus the map of "not a photo of a dog". [B, N]."""
    return text_map(tokens, text, token_norm) * (1 - text_map(tokens, text_not, token_norm))


def _transformer(clip: ZeroShotCLIP) -> nn.Module:
    """The image tower of a vision transformer; a ResNet has no blocks of attention to follow."""
    if not clip.is_vit:
        raise UserError(f"expected a vision transformer for this map, got {clip.name}; choose a ViT backbone")
    return clip.visual


def grad_cam(
    clip: ZeroShotCLIP, x: Tensor, text_features: Tensor, *, create_graph: bool = False, precision=None
) -> Tensor:
    """Grad-CAM on the input of the last block's attention (its ln_1), for the predicted class. [B, N].

    The released "vision-based" ablation of TGA-ZSR returns this map through NumPy, where its gradient ends. With
    create_graph=True the map can be trained.
    """
    visual = _transformer(clip)
    with torch.enable_grad(), autocast(clip.device, precision):
        stages = transformer.image_stages(visual, clip.normalize(x))
        block = visual.transformer.resblocks[-1]
        activation = block.ln_1(stages[-2])
        if not activation.requires_grad:
            activation.requires_grad_()
        mixed = stages[-2] + block.ls_1(transformer.attention(block.attn, activation))
        last = mixed + block.ls_2(block.mlp(block.ln_2(mixed)))
        feature = F.normalize(transformer.project(visual, last[:, :1])[:, 0].float(), dim=-1)
        score = (clip.logit_scale * feature @ text_features.T).amax(dim=1).sum()
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
def attention_rollout(clip: ZeroShotCLIP, x: Tensor) -> Tensor:
    """Attention followed through all blocks (Abnar and Zuidema 2020): what reaches CLS from each patch, no text. [B, N].

    Half of a token is its own, half comes by attention (mean over heads), and the blocks' matrices are multiplied.
    """
    _, matrices = transformer.image_matrices(_transformer(clip), clip.normalize(x))
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
    visual = _transformer(clip)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        tokens, matrices = transformer.image_matrices(visual, clip.normalize(x))
        feature = F.normalize(transformer.project(visual, tokens[:, :1])[:, 0], dim=-1)
        gradients = torch.autograd.grad((feature * text).sum(), matrices)
    relevance = torch.eye(matrices[0].shape[-1], device=x.device).expand(len(x), -1, -1)
    for weights, gradient in zip(matrices, gradients, strict=True):
        relevance = relevance + (weights.detach() * gradient).relu().mean(dim=1) @ relevance
    return minmax(relevance[:, 0, 1:])


@torch.no_grad()
def named_maps(clip: ZeroShotCLIP, x: Tensor, text: Tensor, mean_text: Tensor) -> dict[str, Tensor]:
    """Every map of one image that the book compares, by name: x [B, 3, H, W], text [B, D], mean_text [D] -> [B, N] each."""
    guided = text_map(clip.tokens(x), text)
    return {
        "text-guided (Eq. 5)": guided,
        "sign flipped": 1 - guided,
        "value path": value_map(clip, x, text),
        "value path − mean": value_map(clip, x, text, mean_text),
        "CLS attention (no text)": cls_map(clip, x),
    }


@lru_cache
def upsampling(grid: int, side: int) -> Tensor:
    """U [side^2, grid^2]: bilinear upsampling (align_corners=False) of a grid x grid map, as the matrix that it is."""
    basis = torch.eye(grid * grid).view(-1, 1, grid, grid)
    return F.interpolate(basis, size=(side, side), mode="bilinear", align_corners=False).flatten(1).T.contiguous()


@lru_cache
def gram(grid: int, side: int = 224) -> Tensor:
    """G = U^T U [N, N], so that |U d|_2 = sqrt(d^T G d): distances of upsampled maps without upsampling."""
    u = upsampling(grid, side).double()
    return (u.T @ u).float()


def map_distance(a: Tensor, b: Tensor, metric: str = "l2", side: int = 224) -> Tensor:
    """Distance [B] between maps a, b [B, N], measured on maps upsampled to side x side as in the paper.

    "l2": unsquared Euclidean norm over pixels (the paper's); "l2_sq": its square; "l1": mean absolute difference;
    "cosine": one minus the cosine over pixels. Their scales differ by orders of magnitude; see the chapter.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; {near_miss(metric, METRICS)}")
    grid = round(a.shape[1] ** 0.5)
    g = gram(grid, side).to(a.device)
    if metric == "l1":
        return ((a - b) @ upsampling(grid, side).to(a.device).T).abs().mean(dim=1)
    if metric == "cosine":
        ab, aa, bb = ((p @ g * q).sum(1) for p, q in ((a, b), (a, a), (b, b)))
        return 1 - ab / (aa * bb).clamp_min(1e-12).sqrt()
    squared = ((a - b) @ g * (a - b)).sum(1)
    if metric == "l2_sq":
        return squared
    # Where the maps agree (always at the first step) the root has no slope; its gradient is defined as zero, not NaN.
    safe = torch.where(squared > 1e-12, squared, torch.ones_like(squared))
    return torch.where(squared > 1e-12, safe.sqrt(), torch.zeros_like(squared))


def upsample(m: Tensor, side: int) -> Tensor:
    """Maps [B, N] as pictures [B, side, side]."""
    grid = round(m.shape[1] ** 0.5)
    return F.interpolate(m.view(-1, 1, grid, grid), size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def map_iou(m: Tensor, masks: Tensor) -> Tensor:
    """Overlap [B] of a map [B, N] with object masks [B, H, W] (bool): the map's highest pixels, as many as the mask has."""
    pixels = upsample(m, masks.shape[-1]).flatten(1)
    masks = masks.flatten(1)
    area = masks.sum(1)
    rank = pixels.argsort(dim=1, descending=True).argsort(dim=1)
    chosen = rank < area[:, None]
    return (chosen & masks).sum(1) / (chosen | masks).sum(1).clamp_min(1)


def center_prior(grid: int, n: int = 1) -> Tensor:
    """A map [n, N] that looks at nothing but the middle: what any map has to beat."""
    axis = torch.linspace(-1, 1, grid)
    return minmax(-(axis[:, None] ** 2 + axis[None] ** 2).flatten().expand(n, -1))


def random_map(grid: int, n: int, generator: torch.Generator) -> Tensor:
    """Maps [n, N] that know nothing, a fresh draw for each image."""
    return torch.rand(n, grid * grid, generator=generator)


def mask_map(masks: Tensor, grid: int) -> Tensor:
    """Object masks [B, H, W] averaged over the patches, [B, N]: about what a map of this grid can reach at best."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)
