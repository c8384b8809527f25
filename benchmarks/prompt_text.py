"""Time of tuning a text context for each test image: all images in one batch against the released order of operations.

    python benchmarks/prompt_text.py [--model nano] [--images 8] [--classes 47] [--rounds 3]

One step of test-time prompt tuning needs of the text tower: the class prompts, the gradient of their features in the
context, the class prompts again after the update. Both ways use the same weights, the same image features and the same
written-out attention, in turn, so that a busy machine slows both; the ratio is the median over the rounds.

Released order: one image after another, every class prompt at the full context length, all positions through all blocks.
Ours: contexts [B, 1, n, W] in one pass, cut to the longest prompt, leading tokens that all classes share computed once an
image, the last block at the end tokens alone. Memory grows with images x classes x tokens. The two lines between show
what each part brings.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm_lite import data, transformer
from robustvlm_lite.clip import ZeroShotCLIP, load_clip, random_clip
from robustvlm_lite.prompts import PromptedCLIP, PromptLearner, PromptSpec
from robustvlm_lite.runtime import generator

RATE = 5e-3  # of the released step
TOLERANCE = 1e-4


def entropy(logits: Tensor) -> Tensor:
    """Of each row, [B]."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


class Ours:
    """All images at once."""

    def __init__(self, clip: ZeroShotCLIP, names, features: Tensor, *, shared: bool = True):
        self.model = PromptedCLIP(clip, PromptLearner(clip, PromptSpec(n_text=4)), names)
        self.features = features
        if not shared:
            self.model.words.shared = 1  # the start token, which is never worth less than that

    def step(self) -> Tensor:
        """Logits [B, C] after one step for each image."""
        prompts = self.model.learner.expand(len(self.features))
        loss = entropy(self.model.compare(self.features, self.model.text_features(prompts))).sum()
        (ctx,) = prompts.text
        (gradient,) = torch.autograd.grad(loss, ctx)
        with torch.no_grad():
            ctx.sub_(RATE * gradient.sign())
            return self.model.compare(self.features, self.model.text_features(prompts))


class Released:
    """One image after another; `length` of the prompts is the context's, or that of the longest prompt."""

    def __init__(self, clip: ZeroShotCLIP, names, features: Tensor, *, trimmed: bool = False):
        self.clip, self.features = clip, features
        self.ids = clip.tokenizer([f"a photo of a {name}." for name in names])
        self.length = int(self.ids.argmax(1).max()) + 1 if trimmed else self.ids.shape[1]

    def text(self, ctx: Tensor) -> Tensor:
        model, ids = self.clip.model, self.ids[:, : self.length]
        words = model.token_embedding(ids)
        x = torch.cat([words[:, :1], ctx.expand(len(ids), -1, -1), words[:, 1 + len(ctx) :]], dim=1)
        x, mask = x + model.positional_embedding[: self.length], model.attn_mask[: self.length, : self.length]
        for block in model.transformer.resblocks:
            x = transformer.run_block(block, x, mask)
        x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)]
        return F.normalize(x @ model.text_projection, dim=-1)

    def step(self) -> Tensor:
        """Logits [B, C] after one step for each image."""
        out, start = [], self.clip.model.token_embedding(self.ids[0, 1:5]).detach()
        for feature in self.features:
            ctx = start.clone().requires_grad_()
            loss = entropy(self.clip.logit_scale * feature @ self.text(ctx).T)
            (gradient,) = torch.autograd.grad(loss, ctx)
            with torch.no_grad():
                ctx.sub_(RATE * gradient.sign())
                out.append(self.clip.logit_scale * feature @ self.text(ctx).T)
        return torch.stack(out)


def seconds(step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="a bundled model, or an architecture for random weights")
    for name, default in (("images", 8), ("classes", 47), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    clip = load_clip("nano", device="cpu") if args.model == "nano" else random_clip(args.model)
    clip.requires_grad_(False)
    names = data.load("photos/web").class_names[: args.classes]
    side = clip.image_size
    with torch.no_grad():
        x = torch.rand(args.images, 3, side, side, generator=generator("prompt_text"))
        features = clip.image_features(x)
    ways = {
        "ours": Ours(clip, names, features),
        "ours without shared tokens": Ours(clip, names, features, shared=False),
        "one image after another, cut": Released(clip, names, features, trimmed=True),
        "released order": Released(clip, names, features),
    }
    logits = [way.step() for way in ways.values()]  # first calls pay for allocation
    # A coordinate whose gradient is rounding noise may step the other way, so a few logits may differ by one such step.
    differences = [((z - logits[-1]).abs().max() / logits[-1].abs().max()).item() for z in logits]
    rounds = [{name: seconds(way.step) for name, way in ways.items()} for _ in range(args.rounds)]
    words = ways["ours"].model.words
    print(f"text side of a tuning step: {args.model}, {args.images} images, {len(names)} classes,", end=" ")
    print(f"{words.ids.shape[1]} tokens of {clip.model.context_length}, the first {words.shared} shared,", end=" ")
    print(f"{torch.get_num_threads()} threads, seconds are medians of {args.rounds} rounds")
    print(f"{'':30}{'s/image':>10}{'ratio':>8}{'difference':>12}")
    for name, difference in zip(ways, differences, strict=True):
        ratio = statistics.median(r[name] / r["ours"] for r in rounds)
        image = statistics.median(r[name] for r in rounds) / args.images
        print(f"{name:30}{image:10.4f}{ratio:8.2f}{difference:12.1e}")
    print(f"largest relative difference of logits (target {TOLERANCE:.0e}): ", end="")
    print("reached" if max(differences) <= TOLERANCE else "missed")


if __name__ == "__main__":
    main()
