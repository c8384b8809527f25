"""Gray images, a classifier by brightness and attacks whose effect is plain arithmetic."""

from dataclasses import dataclass, field

import torch
from torch import nn

from robustvlm_lite.data.imageset import ImageSet
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import generator


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above 0.5; the margin is twice the distance to it, times a scale."""

    def __init__(self, scale=10.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        z = self.scale * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-z, z], dim=1)


@dataclass(frozen=True)
class Shift:
    """Moves every pixel by `share` of the budget against the label; `calls` counts the images it was given."""

    name: str = "shift-1"
    share: float = 1.0
    source: str = "own"
    params: dict = field(default_factory=dict)
    n_steps: int = 1
    calls: list = field(default_factory=list, compare=False)

    def step_255(self, threat):
        return threat.eps_255

    def run(self, model, x, y, threat, keys):
        self.calls.append(list(keys))
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
        away = (1 - 2 * y.float())[:, None, None, None]
        return (x.detach() + self.share * threat.eps * away).clamp(0, 1)


class Jitter(Shift):
    """A random perturbation that depends on the image's key only."""

    def run(self, model, x, y, threat, keys):
        noise = torch.stack([torch.rand(x.shape[1:], generator=generator(*key)) for key in keys])
        return (x + threat.eps * (2 * noise - 1)).clamp(0, 1)


def toy(levels, labels, name="toy/gray"):
    """Gray 4x4 images of the given 8-bit levels."""
    images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return ImageSet(name, images, torch.tensor(labels), ("dark", "bright"), ("a {} image",))


# Distances to 127.5:           62.5, 2.5, 0.5, wrong, 1.5, 72.5
DATA = toy([65, 125, 127, 140, 129, 200], [0, 0, 0, 0, 1, 1])


def run(model=None, data=DATA, attacks=(), **options):
    options = {"method": "toy", "batch_size": 4, "progress": False} | options
    return evaluate(model or Threshold(), data, list(attacks), **options)
