"""Small towers in float64 whose maps are checked, their pixels, and the score that the maps explain."""

import copy

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite.clip import random_clip as make_clip
from robustvlm_lite.runtime import generator


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator("rollout", seed), dtype=torch.float64)


def moved(clip, by):
    """The model in float64 with every weight moved, so that a bias or a gain left out would show."""
    clip = copy.deepcopy(clip).double()
    with torch.no_grad():
        for k, p in enumerate(clip.visual.parameters()):
            p.add_(by * normal(*p.shape, seed=k))
    return clip.requires_grad_(False)


def unit_text(clip, seed=5):
    return F.normalize(normal(5, clip.visual.output_dim, seed=seed), dim=1)


@pytest.fixture(scope="module")
def resnet(register):
    name = register("rollout-resnet", image_size=128, layers=[1, 2, 1, 1], width=8, patch_size=None, head_width=32)
    return moved(make_clip(name), 0.1)


@pytest.fixture(scope="module")
def wide():
    images = torch.rand(3, 3, 128, 128, generator=generator("pixels"), dtype=torch.float64)
    images[1, :, :, :64] = 0
    return images


def score(clip, feature, text):
    return clip.logit_scale * (F.normalize(feature, dim=1) @ text.T).amax(1)
