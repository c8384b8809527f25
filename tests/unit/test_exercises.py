"""Each exercise passes a right solution and names the mistake in a wrong one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustvlm_lite.attention import minmax
from robustvlm_lite.book import exercises
from robustvlm_lite.data import ImageSet


def low_high(m, dim=1):
    return m.amin(dim, keepdim=True), m.amax(dim, keepdim=True)


def guarded(m, guard=1e-6):
    low, high = low_high(m)
    return (m - low) / (high - low + guard)


def in_place(m):
    low, high = low_high(m)
    return m.sub_(low).div_((high - low).clamp_min(1e-6))


@pytest.mark.parametrize("fn", [minmax, guarded, lambda m: guarded(m).clamp(0, 1)])
def test_minmax_right(fn, capsys):
    exercises.check_minmax(fn)
    assert capsys.readouterr().out.startswith("✓")


MINMAX = {
    "constant row gives NaN": lambda m: (m - m.amin(1, True)) / (m.amax(1, True) - m.amin(1, True)),
    "one minimum and maximum for the whole batch": lambda m: (m - m.min()) / (m.max() - m.min()),
    "over the batch": lambda m: (m - m.amin(0, True)) / (m.amax(0, True) - m.amin(0, True)).clamp_min(1e-6),
    "do not subtract the minimum": lambda m: m / (m.amax(1, True) - m.amin(1, True)).clamp_min(1e-6),
    "divide by the maximum": lambda m: (m - m.amin(1, True)) / m.amax(1, True),
    "upside down": lambda m: 1 - minmax(m),
    "softmax": lambda m: m.softmax(1),
    "too large": lambda m: guarded(m, 0.1),
    "changes its input": in_place,
    "return missing": lambda m: None,
    "got list": lambda m: m.tolist(),
    r"Expected shape \[4, 49\].*got \[49\]": lambda m: minmax(m).mean(0),
    r"values from 0.00 to 2.00": lambda m: 2 * minmax(m),
    "must stay constant": lambda m: minmax(m) + (m.std(1, keepdim=True) < 1e-4) * torch.rand(m.shape),
}


@pytest.mark.parametrize("hint", MINMAX)
def test_minmax_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_minmax(MINMAX[hint])


def quadratic(d, g):
    return (d @ g * d).sum(1)


def clamped(d, g):
    return quadratic(d, g).clamp_min(1e-12).sqrt()


@pytest.mark.parametrize("fn", [clamped, lambda d, g: (quadratic(d, g) + 1e-12).sqrt()])
def test_gram_right(fn, capsys):
    exercises.check_gram_distance(fn)
    assert capsys.readouterr().out.startswith("✓")


GRAM = {
    "square root is missing": quadratic,
    "on the grid": lambda d, g: d.norm(dim=1),
    "multiply by d once more": lambda d, g: (d @ g).norm(dim=1),
    "root mean square": lambda d, g: clamped(d, g) / 32,
    "all pairs": lambda d, g: (d @ g @ d.T).abs().sqrt(),
    "negative": lambda d, g: -clamped(d, g),
    "do not average over the batch": lambda d, g: quadratic(d, g).sqrt().mean(),
    "gradient is NaN": lambda d, g: quadratic(d, g).sqrt(),
    "Not the distance": lambda d, g: 2 * clamped(d, g),
}


@pytest.mark.parametrize("hint", GRAM)
def test_gram_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_gram_distance(GRAM[hint])


class ToyCLIP(nn.Module):
    """CLS sees the left half of the image, the patches the right: prediction and map can be moved apart."""

    def tokens(self, x):
        patches = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)  # [B, 16, 3] of a 16 pixel image
        shared = patches - patches.mean(dim=2, keepdim=True)
        cls = (x[..., :8] - x[..., :8].mean(dim=1, keepdim=True)).mean(dim=(2, 3))
        return torch.cat([cls[:, None], shared], dim=1)

    def text_features(self, class_names, templates):
        return torch.eye(3)

    def logits(self, x, text_features):
        return 10 * F.normalize(self.tokens(x)[:, 0], dim=-1) @ text_features.T


def toy_data():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    images = (110 + 20 * torch.rand(12, 3, 16, 16, generator=g)).to(torch.uint8)
    images[torch.arange(12), labels] += 6
    return ImageSet("toy/halves", images, labels, ("red", "green", "blue"), ("{}",))


def objective_for(move=1.0, keep=1.0):
    def fn(map_of, logits_of, x, y):
        clean = map_of(x).detach()

        def objective(x_adv):
            moved = (map_of(x_adv) - clean).square().mean(1)
            return move * moved - keep * F.cross_entropy(logits_of(x_adv), y, reduction="none")

        return objective

    return fn


def test_attention_right(capsys):
    exercises.check_attention_attack(objective_for(), ToyCLIP(), toy_data())
    assert capsys.readouterr().out.startswith("✓ the map moved")


@pytest.mark.parametrize(
    ("fn", "hint"),
    [
        (objective_for(keep=-5.0), "ordinary attack"),
        (objective_for(move=-1.0), "Check the sign"),
        (lambda map_of, logits_of, x, y: logits_of(x).sum(1), "return the inner function"),
        (lambda map_of, logits_of, x, y: lambda x_adv: map_of(x_adv).mean(), "your objective.*one per image"),
        (lambda map_of, logits_of, x, y: lambda x_adv: map_of(x_adv.detach()).mean(1), "drop no_grad or detach"),
        (lambda map_of, logits_of, x, y: lambda x_adv: (map_of(x_adv) * torch.nan).mean(1), "NaN"),
    ],
)
def test_attention_wrong(fn, hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_attention_attack(fn, ToyCLIP(), toy_data())


def test_attention_is_not_judged_without_a_correct_image(capsys):
    data = toy_data()
    wrong = ImageSet(data.name, data.images, (data.labels + 1) % 3, data.class_names, data.templates)
    exercises.check_attention_attack(objective_for(), ToyCLIP(), wrong)
    assert capsys.readouterr().out.startswith("not judged: the model classifies no image of toy/halves correctly")
