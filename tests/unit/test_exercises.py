"""Each exercise passes a right solution and names the mistake in a wrong one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustvlm_lite.attention import map_iou
from robustvlm_lite.book import exercises
from robustvlm_lite.data import ImageSet


def highest(m, masks, largest=True):
    """[B, H, W] -> bool [B, HW]: each map's highest pixels, as many as its mask has."""
    rows = [
        torch.zeros(row.numel(), dtype=torch.bool).index_fill(
            0, row.flatten().topk(int(mask.sum()), largest=largest)[1], True
        )
        for row, mask in zip(m, masks, strict=True)
    ]
    return torch.stack(rows)


def iou(m, masks, chosen=None):
    chosen, masks = highest(m, masks) if chosen is None else chosen, masks.flatten(1)
    return (chosen & masks).sum(1) / (chosen | masks).sum(1)


def by_the_package(m, masks):
    """attention.map_iou on a grid as fine as the mask, where upsampling changes nothing."""
    return map_iou(m.flatten(1), masks)


@pytest.mark.parametrize("fn", [iou, by_the_package, lambda m, masks: iou(3 * m + 1, masks).double()])
def test_iou_right(fn, capsys):
    exercises.check_map_iou(fn)
    assert capsys.readouterr().out.startswith("✓")


IOU = {
    "fixed value": lambda m, masks: iou(m, masks, (m > 0.5).flatten(1)),
    "all pixels of the batch together": lambda m, masks: iou(
        m, masks, (m >= m.flatten().topk(int(masks.sum()))[0][-1]).flatten(1)
    ),
    "lowest pixels": lambda m, masks: iou(m, masks, highest(m, masks, largest=False)),
    "covered share": lambda m, masks: (highest(m, masks) & masks.flatten(1)).sum(1) / masks.sum((1, 2)),
    "also Dice": lambda m, masks: 2 * iou(m, masks) / (1 + iou(m, masks)),
    "return missing": lambda m, masks: None,
    "got list": lambda m, masks: iou(m, masks).tolist(),
    r"Expected shape \[4\].*got \[\]": lambda m, masks: iou(m, masks).mean(),
    "Not the intersection over union": lambda m, masks: 1 - iou(m, masks),
}


@pytest.mark.parametrize("hint", IOU)
def test_iou_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_map_iou(IOU[hint])


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


def normal_mean(raw, first=True, last=True, dim=0):
    mean = (F.normalize(raw, dim=2) if first else raw).mean(dim)
    return F.normalize(mean, dim=-1) if last else mean


def test_ensemble_right(capsys):
    exercises.check_ensemble(normal_mean)
    exercises.check_ensemble(lambda raw: normal_mean(raw.double()))
    assert capsys.readouterr().out.count("✓") == 2


ENSEMBLE = {
    "shorter than 1": lambda raw: normal_mean(raw, last=False),
    "long vectors drown": lambda raw: normal_mean(raw, first=False),
    "Nothing is of unit length": lambda raw: normal_mean(raw, first=False, last=False),
    "average over the classes": lambda raw: normal_mean(raw, dim=1),
    "another axis": lambda raw: F.normalize(F.normalize(raw, dim=1).mean(0), dim=1),
    "single template": lambda raw: F.normalize(raw[0], dim=1),
    "Not the ensemble": lambda raw: -normal_mean(raw),
    "return missing": lambda raw: None,
}


@pytest.mark.parametrize("hint", ENSEMBLE)
def test_ensemble_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_ensemble(ENSEMBLE[hint])


def fold(weight, mean, std, sign=-1):
    weight = weight / std.view(3, 1, 1)
    return weight, sign * (weight * mean.view(3, 1, 1)).sum((1, 2, 3))


def test_folded_right(random_clip, capsys):
    exercises.check_folded(fold, random_clip)
    assert capsys.readouterr().out.startswith("✓ plain pixels")


FOLDED = {
    "wrong sign": lambda w, m, s: fold(w, m, s, sign=1),
    "bias is missing": lambda w, m, s: (fold(w, m, s)[0], torch.zeros(len(w))),
    "std is missing": lambda w, m, s: fold(w, m, torch.ones(3)),
    "multiply by std": lambda w, m, s: fold(w, m, 1 / s),
    "weight changed": lambda w, m, s: (fold(w, m, s)[0], fold(w, m, torch.ones(3))[1]),
    "Expected two tensors": lambda w, m, s: w,
    "weight of shape": lambda w, m, s: (w[:1], w[:, 0, 0, 0]),
    "bias for each filter": lambda w, m, s: (fold(w, m, s)[0], torch.zeros(3)),
    "Not the same patches": lambda w, m, s: (2 * w, torch.zeros(len(w))),
}


@pytest.mark.parametrize("hint", FOLDED)
def test_folded_wrong(hint, random_clip):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_folded(FOLDED[hint], random_clip)


def two_sets():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=g)
    parts = (
        ImageSet("toy", images, torch.arange(6) % 3, ("cat", "dog", "star"), ("{}",), split)
        for split in ("tried", "held")
    )
    return tuple(parts)


def test_templates_are_measured_on_the_held_set_only_at_the_end(random_clip, capsys):
    exercises.check_templates(["a photo of a {}.", "{}"], random_clip, *two_sets())
    shown = capsys.readouterr().out
    assert shown.startswith("✓ tried: yours") and "on tried:" in shown and "n = 6" in shown and "held" not in shown
    exercises.check_templates(["a photo of a {}.", "{}"], random_clip, *two_sets(), final=True)
    assert "on held:" in capsys.readouterr().out


TEMPLATES = {
    "Expected a list": "a photo of a {}.",
    "where {} stands": ["a photo of a dog."],
    "cannot read": ["word " * 90 + "{}"],
}


@pytest.mark.parametrize("hint", TEMPLATES)
def test_templates_refused(hint, random_clip):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_templates(TEMPLATES[hint], random_clip, *two_sets())
