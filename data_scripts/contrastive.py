"""The model that is pre-trained and its loss: images against the captions of their own label set."""

import functools
import math

import torch
import torch.nn.functional as F

from robustvlm_lite import resnet, transformer
from robustvlm_lite.clip import MEAN, STD, architectures, written_out


def positions(visual, size: int) -> torch.Tensor:
    """The position embedding for images of another size, [1 + N, W]: of the patches, or of a ResNet's attention pool."""
    vit = written_out(visual) is transformer
    pos, cell = (visual if vit else visual.attnpool).positional_embedding, visual.patch_size[0] if vit else resnet.STRIDE
    grid, new = math.isqrt(len(pos) - 1), size // cell
    if new == grid:
        return pos
    spatial = pos[1:].T.reshape(1, -1, grid, grid)
    spatial = F.interpolate(spatial, size=(new, new), mode="bilinear", antialias=True)
    return torch.cat([pos[:1], spatial.flatten(2)[0].T])


def image_features(model, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    image_tokens, pos = written_out(model.visual).image_tokens, positions(model.visual, x.shape[-1])
    return F.normalize(image_tokens(model.visual, (x - mean) / std, pos)[:, 0].float(), dim=-1)


def contrastive_loss(model, tokenizer, batch, device) -> torch.Tensor:
    """Cross-entropy of each image over the captions of its own label set."""
    x, captions, groups = batch
    image = image_features(model, x.to(device))
    text = encode_captions(model, tokenizer(captions).to(device))
    scale = model.logit_scale.exp().clamp(max=100)
    with torch.autocast(device.type, enabled=False):  # bfloat16 would round the cosines
        losses = [
            F.cross_entropy(
                scale * image[rows.to(device)] @ text[where.to(device)].T, target.to(device), reduction="sum"
            )
            for rows, target, where in groups
        ]
    return torch.stack(losses).sum() / len(x)


def encode_captions(model, ids: torch.Tensor, buckets: int = 4) -> torch.Tensor:
    """Unit text features [C, D]; captions of like length go through the text tower together, so little padding is computed."""
    order = ids.argmax(-1).argsort()
    text = torch.cat([transformer.text_features(model, part) for part in ids[order].chunk(buckets)])
    return F.normalize(text.float(), dim=-1)[order.argsort()]


def make_model(name: str):
    model, encode = architectures.empty_model(name), architectures.tokenizer(name)
    encode_one = functools.cache(lambda text: encode(text)[0])  # captions repeat from step to step

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.stack([encode_one(t) for t in texts])

    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.07))
        if written_out(model.visual) is transformer:  # open_clip leaves this image tower at torch's defaults
            width = model.visual.transformer.width
            torch.nn.init.normal_(model.visual.positional_embedding, std=0.02)
            for block in model.visual.transformer.resblocks:
                torch.nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                torch.nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                for p in (block.attn.out_proj.weight, block.mlp.c_proj.weight):
                    torch.nn.init.zeros_(p)
    return model, tokenizer
