"""Each exercise on attacks and evaluation passes a right solution and names the mistake in a wrong one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustvlm_lite.attacks import cross_entropy, margin
from robustvlm_lite.book import attack_exercises as exercises
from robustvlm_lite.data import ImageSet


def lengths(delta):
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def loop_projection(delta, eps):
    """Image by image with plain numbers."""
    made = []
    for d in delta:
        length = math.sqrt(float((d.double() ** 2).sum()))
        made.append(d if length <= eps else d * (eps / length))
    return torch.stack(made)


@pytest.mark.parametrize("fn", [loop_projection, lambda d, eps: d * (eps / lengths(d).clamp_min(eps))])
def test_projection_right(fn, capsys):
    exercises.check_project_l2(fn)
    assert capsys.readouterr().out.startswith("✓")


PROJECTION = {
    "lies inside must stay": lambda d, eps: eps * d / lengths(d).clamp_min(1e-9),
    "ball of the maximum norm": lambda d, eps: d.clamp(-eps, eps),
    "length of the whole batch": lambda d, eps: d * min(1.0, eps / max(float(d.norm()), 1e-9)),
    "squared length": lambda d, eps: d * (eps / lengths(d).clamp_min(1e-9) ** 2).clamp(max=1),
    "along the channels only": lambda d, eps: d * (eps / d.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp(max=1),
    "zero gives NaN": lambda d, eps: (d / lengths(d)) * lengths(d).clamp(max=eps),
    "Not the projection": lambda d, eps: 0.5 * d,
    "return missing": lambda d, eps: None,
}


@pytest.mark.parametrize("hint", PROJECTION)
def test_projection_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_project_l2(PROJECTION[hint])


def gain(g, eps, norm):
    flat = g.flatten(1)
    return eps * (flat.abs().sum(1) if norm == "linf" else flat.square().sum(1).sqrt())


def gain_by_search(g, eps, norm):
    """The value that gradient ascent over the ball itself reaches."""
    delta = torch.zeros_like(g)
    for _ in range(300):
        delta = delta + 0.1 * eps * (g.sign() if norm == "linf" else g / lengths(g))
        delta = delta.clamp(-eps, eps) if norm == "linf" else loop_projection(delta, eps)
    return (g * delta).flatten(1).sum(1)


@pytest.mark.parametrize("fn", [gain, gain_by_search])
def test_gain_right(fn, capsys):
    exercises.check_best_gain(fn)
    assert capsys.readouterr().out.startswith("✓")


GAIN = {
    "gain of the other ball": lambda g, eps, norm: gain(g, eps, {"linf": "l2", "l2": "linf"}[norm]),
    "largest slope alone": lambda g, eps, norm: eps * g.flatten(1).abs().amax(1),
    "budget is missing": lambda g, eps, norm: gain(g, 1, norm),
    "average over the pixels": lambda g, eps, norm: gain(g, eps, norm) / g[0].numel(),
    "signed slopes": lambda g, eps, norm: eps * g.flatten(1).sum(1),
    "l2: not the largest gain": lambda g, eps, norm: gain(g, eps, norm) * (1 if norm == "linf" else 0.9),
    r"Expected shape \[5\]": lambda g, eps, norm: gain(g, eps, norm).mean(),
}


@pytest.mark.parametrize("hint", GAIN)
def test_gain_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_best_gain(GAIN[hint])


class Channels(nn.Module):
    """Three classes, each the mean of one channel, scaled; a little channel difference flips the answer."""

    def __init__(self, scale=40.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x.mean(dim=(2, 3))


class Rounded(Channels):
    """The same behind a step without a gradient."""

    def forward(self, x):
        return super().forward((255 * x).round() / 255)


def colors(n=12):
    """Gray images whose labelled channel is two levels brighter."""
    images = torch.full((n, 3, 8, 8), 100, dtype=torch.uint8)
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 2
    return ImageSet("toy", images, labels, ("red", "green", "blue"), ("a {}.",))


def test_objective_is_compared_with_cross_entropy(capsys):
    exercises.check_objective(margin, Channels(), colors(), eps_255=2.0)
    out = capsys.readouterr().out
    assert "cross-entropy leaves 0.0 %, yours 0.0 %, noise 100.0 %" in out and "no measurable difference" in out
    exercises.check_objective(lambda model, y: lambda x: (0 * model(x)).sum(1), Channels(), colors(), eps_255=2.0)
    assert "yours 100.0 %" in (out := capsys.readouterr().out) and out.strip().endswith("weaker")


def test_objective_that_helps_the_model_or_cannot_be_used():
    class Loud(Channels):  # loses some images to noise, so that helping shows
        def forward(self, x):
            return super().forward(x) + 1e3 * (x - x.detach().mean((1, 2, 3), keepdim=True))[:, :, 0, 0]

    def helping(model, y):
        return lambda x: -F.cross_entropy(model(x), y, reduction="none")

    with pytest.raises(AssertionError, match="helps the model.*check the sign"):
        exercises.check_objective(helping, Loud(), colors(48), eps_255=3.0)
    with pytest.raises(AssertionError, match="return the inner function"):
        exercises.check_objective(lambda model, y: None, Channels(), colors(), eps_255=2.0)
    with pytest.raises(AssertionError, match="PGD cannot use your objective. objective: expected 12 values"):
        exercises.check_objective(lambda model, y: lambda x: F.cross_entropy(model(x), y), Channels(), colors(), eps_255=2.0)


def test_worst_case_right(capsys):
    exercises.check_worst_case(lambda right: torch.tensor(sum(all(col) for col in right.T.tolist()) / right.shape[1]))
    assert capsys.readouterr().out.startswith("✓")


WORST = {
    "smallest accuracy of a table": lambda right: right.float().mean(1).min(),
    "any attack that fails": lambda right: right.any(0).float().mean(),
    "average over the attacks": lambda right: right.float().mean(),
    "share that falls": lambda right: 1 - right.all(0).float().mean(),
    "as if attacks were independent": lambda right: right.float().mean(1).prod(),
    "Expected one number": lambda right: right.all(0).float(),
    "for these verdicts, got": lambda right: right[0].float().mean() / 3,
}


@pytest.mark.parametrize("hint", WORST)
def test_worst_case_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_worst_case(WORST[hint])


def by_covariance(a, b):
    both = torch.stack([a.double(), b.double()])
    cov = torch.cov(both, correction=0)
    return ((cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) / len(a)).sqrt()


def separate(a, b):
    return [(v.double().var(correction=0) / len(v)).sqrt() for v in (a, b)]


@pytest.mark.parametrize("fn", [by_covariance, lambda a, b: (a.double() - b.double()).std() / len(a) ** 0.5])
def test_paired_error_right(fn, capsys):
    exercises.check_paired_error(fn)
    assert capsys.readouterr().out.startswith("✓")


ERROR = {
    "two independent samples": lambda a, b: torch.stack(separate(a, b)).norm(),
    "one image's difference": lambda a, b: by_covariance(a, b) * len(a) ** 0.5,
    "that is the variance": lambda a, b: by_covariance(a, b) ** 2,
    "instead of its root": lambda a, b: by_covariance(a, b) / len(a) ** 0.5,
    "add the two errors": lambda a, b: sum(separate(a, b)),
    "Not the standard error": lambda a, b: 2 * by_covariance(a, b),
    "Expected one number": lambda a, b: a.double() - b.double(),
}


@pytest.mark.parametrize("hint", ERROR)
def test_paired_error_wrong(hint):
    with pytest.raises(AssertionError, match=f"(?i){hint}"):
        exercises.check_paired_error(ERROR[hint])


def test_unmasking_by_a_module_without_the_step(capsys):
    exercises.check_unmasked(lambda masked: Channels(), Rounded(), colors(), eps_255=3.0)
    out = capsys.readouterr().out
    assert out.startswith("✓ through the mask 100.0 % stay right") and "your surface 0.0 %" in out


def test_unmasking_that_fails_says_why():
    with pytest.raises(AssertionError, match="No better than noise: .*Does a gradient reach the pixels"):
        exercises.check_unmasked(lambda masked: masked, Rounded(), colors(), eps_255=3.0)
    with pytest.raises(AssertionError, match="Expected a torch module"):
        exercises.check_unmasked(lambda masked: cross_entropy, Rounded(), colors(), eps_255=3.0)
    with pytest.raises(AssertionError, match="PGD cannot use your module"):
        exercises.check_unmasked(lambda masked: nn.Flatten(0), Rounded(), colors(), eps_255=3.0)


def test_unmasking_is_not_judged_where_nothing_is_left(capsys):
    data = colors()
    wrong = ImageSet("toy", data.images, (data.labels + 1) % 3, data.class_names, data.templates)
    exercises.check_unmasked(lambda masked: Channels(), Rounded(), wrong, eps_255=3.0)
    assert capsys.readouterr().out.startswith("not judged")
