"""Time of A-TPT's attention maps of all views of an image, ours against the released order of operations.

    python benchmarks/token_gradients.py [--model nano] [--views 63] [--classes 47] [--repeats 5]

Both give the token-gradient rollout in its released form, from the same weights and views, in turn. CPU seconds of one
thread, so that other work on the machine does not count; the ratio is the median over the rounds. Target: at least 5.
Another architecture, such as `--model ViT-B-16-quickgelu --views 4 --repeats 1`, gets random weights.

Released order: one view after another; for each, every class prompt is encoded again over 40 tokens; every block evaluates
its first norm three times, keeps its attention matrices and the gradient of its tokens; the backward pass runs down to the
pixels.
Ours: text from the cache, all views in one batch, a graph over the last two blocks alone, and of the last one only CLS.
Maps differ by what the released order loses to rounding in the last block (`attention.through_norm`).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm_lite import attention, data, transformer, views
from robustvlm_lite.clip import ZeroShotCLIP, load_clip, random_clip
from robustvlm_lite.runtime import asset, generator

TARGET, LENGTH, TEMPLATE = 5.0, 40, "a photo of a {}."


class Released:
    """One view after another."""

    def __init__(self, clip: ZeroShotCLIP, names: list[str], encode_again: bool):
        self.clip, self.encode_again = clip, encode_again
        self.ids = clip.tokenizer([TEMPLATE.format(c) for c in names])[:, :LENGTH]
        self.stored = self.encode()

    @torch.no_grad()
    def encode(self) -> Tensor:
        """Unit features [C, D], without cutting the padding off."""
        model, length = self.clip.model, self.ids.shape[1]
        h = model.token_embedding(self.ids) + model.positional_embedding[:length]
        for block in model.transformer.resblocks:
            h = transformer.run_block(block, h, model.attn_mask[:length, :length])
        h = model.ln_final(h[torch.arange(len(h)), self.ids.argmax(dim=1)])
        return F.normalize(h @ model.text_projection, dim=1)

    def map(self, view: Tensor) -> Tensor:
        """[N] of one view [3, S, S]."""
        visual, text = self.clip.visual, self.encode() if self.encode_again else self.stored
        h = transformer.embed(visual, self.clip.normalize(view[None].clone().requires_grad_()))
        tokens, matrices = [], []
        for block in visual.transformer.resblocks:
            h.retain_grad()
            tokens.append(h)
            inputs = (block.ln_1(h), block.ln_1(h), block.ln_1(h))
            mixed, weights = block.attn(*inputs, need_weights=True, average_attn_weights=False)
            matrices.append(weights)
            h = h + mixed
            h = h + block.mlp(block.ln_2(h))
        attention.top_logit(self.clip, transformer.project(visual, h)[:, 0], text).backward()
        relevance = [attention.token_relevance((t.detach() * t.grad).sum(2)) for t in tokens[-2:]]
        rows = attention.cls_row(tuple(m.detach().mean(1) for m in matrices[-2:]), relevance, "released")
        return attention.clip_top(rows)[0]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self.map(view) for view in x])


def model_of(name: str) -> ZeroShotCLIP:
    """The bundled weights of `name`, or random ones of an open_clip architecture."""
    bundled = asset("clip", f"{name}.safetensors").exists()
    return (load_clip(name, device="cpu") if bundled else random_clip(name)).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    for name, default in (("views", 63), ("classes", 47), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    clip, names = model_of(args.model), data.load("photos/web").class_names[: args.classes]
    photo = F.interpolate(data.load("photos/caltech", "test", n=1).pixels(), (clip.image_size, clip.image_size))
    x = views.base_views(photo, [generator("token_gradients")], args.views, "rrc_flip")[0]
    text = clip.text_features(names, (TEMPLATE,))
    ways = {
        "ours": lambda x: attention.token_rollout(clip, x, text, "released"),
        "released order, text encoded once": Released(clip, names, encode_again=False),
        "released order": Released(clip, names, encode_again=True),
    }
    maps = [way(x[:2]) for way in ways.values()]  # first calls pay for allocation

    def seconds(way) -> float:
        began = time.process_time()
        way(x)
        return time.process_time() - began

    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(args.repeats)]
    print(f"attention maps: {args.model}, {args.views} views, {len(names)} classes, {args.repeats} rounds, CPU seconds are medians")
    print(f"{'':36}{'s/image':>9}{'ratio':>8}{'furthest map':>15}")
    for (name, _), m in zip(ways.items(), maps, strict=True):
        ratio = statistics.median(r[name] / r["ours"] for r in rounds)
        off = ((m - maps[0]).abs().amax(1) / maps[0].amax(1)).max()
        print(f"{name:36}{statistics.median(r[name] for r in rounds):9.3f}{ratio:8.2f}{off:15.1e}")
    print(f"ratio {ratio:.2f} (target {TARGET}): {'reached' if ratio >= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
