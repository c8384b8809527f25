"""Attribution maps of the last block that can be trained: a forward weight, a backward weight, and ways to join them.

    A(j) = lambda_j <w, v_j>,   lambda_j = cos(q, k_j),   w = dS / do                  (CBA-FAPT, Eq. 6 to 8)

q and o belong to the token that the feature is read from, k and v to all tokens, S is the score. It is Grad-ECLIP (Zhao
et al., ICML 2024) without its ReLU. w crosses the output projection and the MLP but no attention, so training on A needs
no second derivative of attention. S is often linear in the other tower's feature; then so is A.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import PromptedCLIP, Tail
from ..runtime import UserError, near_miss

FUSIONS = ("F1", "F2", "F3", "F4", "F5a", "F5b")
NORMS = ("N1", "N2", "N3", "N4", "N5")
SMOOTHING = 1e-3  # share of the uniform distribution in a normalized map, so that no logarithm meets 0


def bidirectional_map(tail: Tail, w: Tensor, n_heads: int, fusion: str = "F1") -> Tensor:
    """Signed evidence of every token for the score, [N, L], 0 where the query does not look.

    w [N, W]: gradient of the score at `tail.o`. fusion: "F1" (CBA-FAPT) takes one cosine over the whole width; "F2" one a
    head; "F3" (Grad-ECLIP) stretches lambda to [0, 1] over the content and cuts negative evidence; "F4" takes the
    softmax attention of each head, whose map sums to <w, o>; "F5a" is lambda alone, "F5b" <w, v_j> alone.
    Choose `tail.content` of it: patches, or context and class name.
    """
    if fusion not in FUSIONS:
        raise UserError(f"unknown fusion {fusion!r}; {near_miss(fusion, FUSIONS)}")
    if fusion in ("F2", "F4"):
        q, k, v, w = (t.unflatten(-1, (n_heads, -1)) for t in (tail.q, tail.k, tail.v, w))  # [..., heads, W / heads]
        if fusion == "F2":
            weight = F.cosine_similarity(q[:, None], k, dim=-1)  # [N, L, heads]
        else:
            scores = (q[:, None] * k).sum(-1) * q.shape[-1] ** -0.5
            weight = scores.masked_fill(~tail.seen[..., None], -torch.inf).softmax(dim=1)
        a = (weight * (w[:, None] * v).sum(-1)).sum(-1)
    else:
        forward = F.cosine_similarity(tail.q[:, None], tail.k, dim=-1)
        backward = (tail.v @ w[:, :, None])[..., 0]
        if fusion == "F3":
            a = (_stretched(forward, tail.content) * backward).relu()
        else:
            a = {"F1": forward * backward, "F5a": forward, "F5b": backward}[fusion]
    return a * tail.seen


def both_maps(
    model: PromptedCLIP, image: Tail, text: Tail, score: Tensor, fusion: str = "F1", *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Maps over the patches [B, P] and over the text [B, L] of each image for its own text.

    image, text: tails with B rows each, from which `score` [B] was computed; row i of the score must read row i alone.
    """
    w_image, w_text = torch.autograd.grad(score.sum(), (image.o, text.o), create_graph=create_graph)
    heads = (tower.resblocks[-1].attn.num_heads for tower in (model.clip.visual.transformer, model.clip.model.transformer))
    a_image = bidirectional_map(image, w_image, next(heads), fusion)[:, image.content[0]]
    return a_image, bidirectional_map(text, w_text, next(heads), fusion)


def explain(model: PromptedCLIP, x: Tensor, classes: Tensor, fusion: str = "F1") -> tuple[Tensor, Tensor, Tensor]:
    """(image map [B, P], text map [B, L], its content [B, L]) of cos(z_v, z_t) for these classes [B], without a graph.

    Signed, and not stretched to [0, 1]. x: pixels [B, 3, H, W].
    """
    with torch.enable_grad():
        prompts = model.constants()[0]
        image, text = model.image_tail(x.detach().requires_grad_(), prompts), model.text_tail(prompts).take(classes)
        text = replace(text, o=text.o.requires_grad_())  # no prompt has a graph here: this is where the gradient ends
        score = F.cosine_similarity(model.head_image(image.o, image.r), model.head_text(text.o, text.r), dim=-1)
        maps = both_maps(model, image, text, score, fusion)
    return *(m.detach() for m in maps), text.content


def _stretched(weight: Tensor, content: Tensor) -> Tensor:
    """Each row stretched to [0, 1] over its own content, 0 elsewhere."""
    low = weight.masked_fill(~content, torch.inf).amin(dim=1, keepdim=True)
    high = weight.masked_fill(~content, -torch.inf).amax(dim=1, keepdim=True)
    return (weight - low) / (high - low).clamp_min(1e-6) * content


def as_distribution(a: Tensor, content: Tensor, norm: str = "N1") -> Tensor:
    """Signed maps [N, L] as distributions over `content` [N, L]: [N, L], or [N, 2 L] for "N1"; 0 outside, rows sum to 1.

    "N1": positive and negative part side by side, over their sum. "N2": the positive part (Grad-ECLIP). "N3": absolute
    values. These three are mixed with a little of the uniform distribution. "N4": softmax of the map as it is, whose
    differences are too small for a softmax to see. "N5": softmax of the standardized map.
    """
    if norm not in NORMS:
        raise UserError(f"unknown text normalization {norm!r}; {near_miss(norm, NORMS)}")
    if norm in ("N4", "N5"):
        if norm == "N5":
            n = content.sum(dim=1, keepdim=True)
            mean = (a * content).sum(dim=1, keepdim=True) / n
            spread = (((a - mean) * content).square().sum(dim=1, keepdim=True) / n + 1e-12).sqrt()
            a = (a - mean) / spread
        return a.masked_fill(~content, -torch.inf).softmax(dim=1)
    a = a * content
    parts = {"N1": [a.relu(), (-a).relu()], "N2": [a.relu()], "N3": [a.abs()]}[norm]
    mass, room = torch.cat(parts, dim=1), content.repeat(1, len(parts)).to(a.dtype)
    total, uniform = mass.sum(dim=1, keepdim=True), room / room.sum(dim=1, keepdim=True)
    empty = total < 1e-12  # nothing positive under N2, or nothing at all: such a map says nothing, and has no slope either
    share = mass / torch.where(empty, torch.ones_like(total), total)
    return torch.where(empty, uniform, (1 - SMOOTHING) * share + SMOOTHING * uniform)


def map_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of distributions [N, L] that are 0 at the same places, [N]."""
    there = p > 0
    logs = [torch.where(there, t, torch.ones_like(t)).log() for t in (p, q)]
    return (p * (logs[0] - logs[1])).sum(dim=1)
