"""A prompt-tuned defense in the middle of a step, on a small CLIP in float64, and its parts in plain open_clip and torch."""

from functools import partial

import torch
import torch.nn.functional as F
from toy_prompts import NAMES, reference_image, reference_text

from robustvlm_lite.attacks import pgd
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses import PromptTraining, build_prompts
from robustvlm_lite.threat import ThreatModel

TEMPLATES = ("a photo of a {}.", "a {}.")
ATTACK = partial(pgd, threat=ThreatModel(2), n_steps=2, step_255=2.0, keep="last")
SHORT = PromptTraining(steps=3, batch=4, lr=0.1, epoch=1, precision=None)


def photos(n: int = 12, side: int = 32, seed: int = 0, name: str = "toy", names=NAMES) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=g)
    return ImageSet(name, images, torch.arange(n) % len(names), tuple(names), TEMPLATES)


def in_step(name, clip, *, moved: bool = True, n: int = 5, **options):
    """(defense, batch): prompts off their start, labels that come twice, attacked images that are other images."""
    data = photos()
    defense = build_prompts(name, clip, NAMES, **options)
    if moved:
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in defense.learner.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))
    index = torch.arange(n)
    x, y = data.pixels(index).to(clip.mean.dtype), data.labels[index]
    y[1] = y[0]
    task = defense.task(data)
    task.frozen = defense.frozen(task, data.pixels().to(x), data.labels)
    batch = defense.batch(task, index, x, y)
    batch.x_adv = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8)).to(x)).clamp(0, 1)
    return defense, batch


def reference(defense, batch):
    """(clean logits, attacked logits, clean features, attacked features, frozen logits) by open_clip's own blocks."""
    model, prompts = batch.task.model, defense.learner()
    text = F.normalize(reference_text(model, prompts), dim=-1)
    clean, adv = (F.normalize(reference_image(model, x, prompts), dim=-1) for x in (batch.x, batch.x_adv))
    scale = model.clip.logit_scale
    with torch.no_grad():
        each = [model.clip.model.encode_text(model.clip.tokenizer([t.format(c) for c in NAMES])) for t in TEMPLATES]
        hand = F.normalize(sum(F.normalize(e, dim=-1) for e in each), dim=-1)
        frozen = F.normalize(model.clip.model.encode_image(model.clip.normalize(batch.x)), dim=-1)
    return scale * clean @ text.T, scale * adv @ text.T, clean, adv, scale * frozen @ hand.T


def kl(p_logits, q_logits):
    """Sum over classes of p log(p / q), written out."""
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return (p * (p / q).log()).sum(1)


def trained(name, clip, *, data=None, training=SHORT, **options):
    defense = build_prompts(name, clip, NAMES, **options)
    return defense.fit(data or photos(), attack=ATTACK, training=training, seed=3, progress=False)


def same(a, b) -> bool:
    """Up to the rounding of float32."""
    a, b = a.state(), b.state()
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in a)


def close(a, b, tolerance=1e-9):
    """Relative to the largest value, in float64: what lies below 1e-9 of a loss of about 1 is rounding."""
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-9), (a, b)
