"""A captioner of one word that a linear function of the pixels decides, and ways to break its gradient."""

import torch
from torch import nn

from robustvlm_lite.book.captioning import TextTask
from robustvlm_lite.captioner import Captioner
from robustvlm_lite.runtime import generator

WORDS = ("dark", "bright")
SIDE = 8


class Leaning(Captioner):
    """Says "bright" where the sum of weight · normalized pixel + offset is above 0, else "dark"; logits [-sum, sum].

    bend: what happens to the pixels before, for instance to their gradient.
    """

    def __init__(self, weight, bend=lambda x: x, offset: float = 0.0):
        nn.Module.__init__(self)
        self.image_size, self.bend, self.offset, self.name = SIDE, bend, offset, "leaning"
        for name, value in (("mean", 0.5), ("std", 0.5)):
            self.register_buffer(name, torch.full((3, 1, 1), value))
        self.register_buffer("weight", weight)

    def lean(self, x):
        return (self.bend(self.normalize(x)) * self.weight).sum((1, 2, 3)) + self.offset

    def logits(self, x, targets, prompt=None):
        lean = self.lean(x)
        return torch.stack([-lean, lean], dim=1)[:, None], torch.tensor([[WORDS.index(t)] for t in targets])

    @torch.no_grad()
    def generate(self, x, prompt=None, **options):
        return [WORDS[int(v > 0)] for v in self.lean(x).tolist()]


def uneven(seed: int = 0):
    """Weights of both signs, none of them near 0."""
    w = torch.randn(3, SIDE, SIDE, generator=generator("weight", seed))
    return w + 0.2 * w.sign()


def task_of(model: Leaning, n: int = 24) -> TextTask:
    """8-bit images near gray; what `model` says about each is the truth."""
    x = torch.randint(96, 160, (n, 3, SIDE, SIDE), generator=generator("toy images")) / 255
    truth = tuple(model.generate(x))

    def judge(texts, index):
        return torch.tensor([[text == truth[i]] for text, i in zip(texts, index, strict=True)])

    return TextTask("toy/leaning", x, truth, judge)


class Backwards(torch.autograd.Function):
    """The identity with minus its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def backwards(x):
    return Backwards.apply(x)


def sparse(x):
    """A gradient at one pixel in sixteen only."""
    kept = torch.zeros_like(x)
    kept[..., ::4, ::4] = 1
    return x * kept + (x * (1 - kept)).detach()


def right_at_pictures(x):
    """A gradient that is right at 8-bit images and wrong at everything between them."""
    levels = 127.5 * (x.detach() + 1)
    return x if (levels - levels.round()).abs().max() < 1e-2 else backwards(x)
