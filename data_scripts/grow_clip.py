"""Start a wider and deeper CLIP from a trained one that computes the same: what nano knows is not learned again.

    python data_scripts/pretrain_clip.py --model small --start nano --data-root DIR --work WORK

After Net2Net (Chen et al., ICLR 2016, arXiv 1511.05641). New dimensions of the residual stream, new heads and new hidden units
are read by random weights and written by none, new blocks write nothing: so they change no answer and yet get a gradient.
Layer norm alone would notice the new dimensions. It subtracts a mean and divides by a deviation over all of them, so they
hold the old ones' mean (measured on photographs), and the gains of the old ones shrink by sqrt(old / new).
"""

import torch
from torch import Tensor, nn

from robustvlm_lite import data, transformer
from robustvlm_lite.clip import MEAN, STD


def centered(weight: Tensor) -> Tensor:
    """What a residual stream is given, without its mean over the stream's dimensions (the first): layer norm ignores it."""
    return weight - weight.mean(dim=0, keepdim=True)


def put(target: Tensor, *blocks: tuple[tuple[slice, ...], Tensor], rest: float = 0.0) -> None:
    """Fill `target` with random numbers of deviation `rest`, then each block at its place."""
    target.copy_(torch.randn(target.shape) * rest)
    for place, value in blocks:
        target[place] = value


def widen_norm(new: nn.LayerNorm, old: nn.LayerNorm, constant: float = 0.0) -> None:
    w, shrink = len(old.weight), (len(old.weight) / len(new.weight)) ** 0.5
    nn.init.ones_(new.weight)
    put(new.weight[:w], (..., old.weight * shrink))
    nn.init.constant_(new.bias, constant)
    put(new.bias[:w], (..., old.bias))


def widen_block(new: nn.Module, old: nn.Module | None) -> None:
    """A block of width V that adds what `old`, of width W, adds; None: one that adds nothing."""
    v = new.attn.embed_dim
    for reader in (new.attn.in_proj_weight, new.mlp.c_fc.weight):
        put(reader, rest=v**-0.5)
    for zero in (new.attn.in_proj_bias, new.mlp.c_fc.bias, *new.attn.out_proj.parameters(), *new.mlp.c_proj.parameters()):
        nn.init.zeros_(zero)
    if old is None:
        return
    w, h = old.attn.embed_dim, old.mlp.c_fc.out_features
    for part in range(3):  # queries, keys, values; the old heads come first
        new.attn.in_proj_weight[part * v : part * v + w, :w] = old.attn.in_proj_weight[part * w : (part + 1) * w]
        new.attn.in_proj_bias[part * v : part * v + w] = old.attn.in_proj_bias[part * w : (part + 1) * w]
    new.attn.out_proj.weight[:w, :w] = centered(old.attn.out_proj.weight)
    new.attn.out_proj.bias[:w] = centered(old.attn.out_proj.bias)
    new.mlp.c_fc.weight[:h, :w] = old.mlp.c_fc.weight
    new.mlp.c_fc.bias[:h] = old.mlp.c_fc.bias
    new.mlp.c_proj.weight[:w, :h] = centered(old.mlp.c_proj.weight)
    new.mlp.c_proj.bias[:w] = centered(old.mlp.c_proj.bias)
    widen_norm(new.ln_1, old.ln_1)
    widen_norm(new.ln_2, old.ln_2)


def sources(new: int, old: int) -> list[int | None]:
    """For each of `new` blocks the old one it takes over, None for an added one; the last stays last."""
    added = [round((k + 1) * new / (new - old + 1)) - 1 for k in range(new - old)]
    kept = iter(range(old))
    return [None if place in added else next(kept) for place in range(new)]


@torch.no_grad()
def stream_mean(visual: nn.Module, n: int = 256) -> float:
    """Mean over the dimensions of what enters the first block, over the tokens of `n` bundled training photographs."""
    x = data.load("photos/caltech", "train", n=n).pixels()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return transformer.embed(visual, (x - mean) / std).mean().item()


@torch.no_grad()
def grow(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new` what `old` computes. Same patches, text tower and joint space; `new`'s image tower is wider or deeper."""
    a, b = old.visual, new.visual
    w, v = a.conv1.out_channels, b.conv1.out_channels
    put(b.conv1.weight, (slice(w), centered(a.conv1.weight)))
    put(b.class_embedding, (slice(w), centered(a.class_embedding)))
    put(b.positional_embedding, ((slice(None), slice(w)), centered(a.positional_embedding.T).T))
    widen_norm(b.ln_pre, a.ln_pre, constant=stream_mean(a))
    blocks, kept = b.transformer.resblocks, a.transformer.resblocks
    for block, source in zip(blocks, sources(len(blocks), len(kept)), strict=True):
        widen_block(block, None if source is None else kept[source])
    widen_norm(b.ln_post, a.ln_post)
    put(b.proj, (slice(w), a.proj), rest=v**-0.5)
    text = {name: value for name, value in old.state_dict().items() if not name.startswith("visual.")}
    new.load_state_dict(text, strict=False)
    return new

