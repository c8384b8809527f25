"""A small CLIP with towers of different widths, one set of prompts a method, and prompted passes in plain open_clip blocks."""

import copy

import torch
from torch import Tensor

from robustvlm_lite.clip import ZeroShotCLIP
from robustvlm_lite.prompts import PromptedCLIP, PromptLearner, Prompts, PromptSpec

NAMES = ("cat", "wild dog", "red star", "abyssinian")
BOTH = {"n_text": 2, "depth_text": 3, "n_vision": 2, "depth_vision": 3}
SPECS = {
    "APT": PromptSpec(n_text=5, start="normal"),
    "APT, class-specific": PromptSpec(n_text=5, start="normal", class_specific=True),
    "AVP": PromptSpec(n_vision=3, pixel_pad=4),
    "AdvVLP": PromptSpec(**BOTH),
    "deep vision only": PromptSpec(n_vision=2, depth_vision=4),
    "deep text only": PromptSpec(n_text=3, depth_text=3, template="a photo of a {}, a type of pet."),
    "AdvMaPLe": PromptSpec(**BOTH, coupling="text2vision"),
    "AdvMaPLe, shared": PromptSpec(**BOTH, coupling="text2vision", share_projection=True),
    "vision to text": PromptSpec(**BOTH, coupling="vision2text"),
    "FAP": PromptSpec(**BOTH, coupling="fap"),
    "FAP, shared": PromptSpec(**BOTH, coupling="fap", share_projection=True),
    "FAP, shallow": PromptSpec(n_text=2, n_vision=2, coupling="fap"),
    "FAP, released text": PromptSpec(**BOTH, coupling="fap", quirk_literal_braces=True),
    "TPT": PromptSpec(n_text=4),
    "class in the middle": PromptSpec(n_text=4, class_position="middle"),
    "class in front": PromptSpec(n_text=3, start="normal", class_position="front"),
}


def toy_clip(register, name: str = "toy-prompts", **vision) -> ZeroShotCLIP:
    """Text tower 16 wide with 3 blocks, image tower 32 wide with 4, 32 pixels; float64, every weight moved."""
    import open_clip

    options = {"layers": 4} | vision
    register(name, quick_gelu=True, text_layers=3, context_length=20, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
        model.logit_scale.fill_(2.0)
    return ZeroShotCLIP(model, open_clip.get_tokenizer(name), name, "toy").eval().double()


def prompted(clip: ZeroShotCLIP, spec: PromptSpec, names=NAMES, seed: int = 0) -> PromptedCLIP:
    """Prompts moved off their start, so that words and zeros hide nothing."""
    learner = PromptLearner(clip, spec, names if spec.class_specific else (), seed=seed)
    g = torch.Generator().manual_seed(seed + 9)
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return PromptedCLIP(clip, learner, names)


def images(n: int = 3, side: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)).double()


def reference_text(model: PromptedCLIP, prompts: Prompts) -> Tensor:
    """Features (not normalized) [C, D]: one class after another, full context, open_clip's own blocks."""
    clip, spec, out = model.clip.model, model.learner.spec, []
    for c, name in enumerate(model.class_names):
        ids, places = sentence(model.clip.tokenizer, spec, name)
        x = clip.token_embedding(ids)
        if prompts.text:
            ctx = prompts.text[0][c] if prompts.text[0].ndim == 3 else prompts.text[0]
            rows = list(x)
            for place, vector in zip(places, ctx, strict=True):
                rows[place] = vector
            x = torch.stack(rows)
        x = (x + clip.positional_embedding)[None]
        for i, block in enumerate(clip.transformer.resblocks):
            if 0 < i < len(prompts.text):
                n = len(prompts.text[i])
                x = torch.cat([x[:, :1], prompts.text[i][None], x[:, 1 + n :]], dim=1)
            x = block(x, attn_mask=clip.attn_mask)
        out.append((clip.ln_final(x)[0, ids.argmax()]) @ clip.text_projection)
    return torch.stack(out)


def sentence(tokenizer, spec: PromptSpec, name: str) -> tuple[Tensor, list[int]]:
    """Padded ids of one class, and the places of its context tokens, by way of a whole sentence with filler words."""
    n = spec.n_text
    if spec.quirk_literal_braces:
        text, first = f"{spec.template} {name}.", 1
    else:
        before, after = spec.template.split("{}")
        words = before.split() if spec.start == "words" else ["x"] * n
        cut = {"end": len(words), "middle": len(words) // 2, "front": 0}[spec.class_position]
        text = " ".join([*words[:cut], name, *words[cut:]]) + after
        first = 1
        if spec.class_position != "end":
            length = len(tokenizer.encode(name))
            return tokenizer([text])[0], [1 + i + (length if i >= cut else 0) for i in range(n)]
    return tokenizer([text])[0], list(range(first, first + n))


def reference_image(model: PromptedCLIP, x: Tensor, prompts: Prompts, after_ln_pre: bool = False) -> Tensor:
    """Features (not normalized) [B, D] by open_clip's own blocks."""
    visual = model.clip.visual
    x = (x - model.clip.mean) / model.clip.std
    if prompts.pixel is not None:
        x = x + prompts.pixel
    patches = visual.conv1(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(x), 1, -1), patches], dim=1) + visual.positional_embedding
    for i, block in enumerate([None, *visual.transformer.resblocks]):
        new = [prompts.vision[max(i - 1, 0)].expand(len(x), -1, -1)] if max(i - 1, 0) < len(prompts.vision) else []
        if i == 0:
            both = torch.cat([tokens, *([] if after_ln_pre else new)], dim=1)
            tokens = torch.cat([visual.ln_pre(both), *(new if after_ln_pre else [])], dim=1)
            continue
        if i > 1 and new:
            tokens = torch.cat([tokens[:, : -new[0].shape[1]], *new], dim=1)
        tokens = block(tokens)
    return visual.ln_post(tokens[:, 0]) @ visual.proj


def single(prompts: Prompts, i: int) -> Prompts:
    """The prompts of image i out of prompts that were expanded to a batch of images."""
    text = tuple(t[i, 0] if t.shape[1] == 1 else t[i] for t in prompts.text)
    return Prompts(text, tuple(v[i] for v in prompts.vision), None if prompts.pixel is None else prompts.pixel[i])


def in_float32(clip: ZeroShotCLIP) -> ZeroShotCLIP:
    return copy.deepcopy(clip).float()
