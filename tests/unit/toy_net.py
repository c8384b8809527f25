"""A small network, images and keys that the attack tests share."""

import torch
from torch import nn

from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel

LINF, L2 = ThreatModel(4), ThreatModel(100, "l2")


class Net(nn.Module):
    """Smooth, small, with a dropout and a batch norm that would show a wrong mode."""

    def __init__(self, n_classes=6, size=16, seed=0, scale=25.0, smooth=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8 * (size // 2) ** 2, n_classes)
        self.scale, self.act = scale, nn.Tanh() if smooth else nn.ReLU()
        self.eval()

    def forward(self, x):
        return self.scale * self.head(self.drop(self.act(self.norm(self.conv(x)))).flatten(1))


def batch(n=5, size=16, seed=0, dtype=torch.float32):
    return torch.rand(n, 3, size, size, generator=generator("images", seed)).to(dtype)


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def keys(n, run="test"):
    return [(0, run, i) for i in range(n)]
