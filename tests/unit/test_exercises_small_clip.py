"""The exercises of chapter 10 pass a right solution and name the mistake in a wrong one."""

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite.book import exercises_small_clip as exercises


def by_loop(z, y, image_set, text_set):
    """Each image by itself, by the definition of cross-entropy."""
    losses = [z[i][text_set == image_set[i]].logsumexp(0) - z[i, y[i]] for i in range(len(z))]
    return torch.stack(losses).mean()


def masked(z, y, image_set, text_set, fill=-torch.inf, invert=False, **how):
    own = image_set[:, None] == text_set
    return F.cross_entropy(z.masked_fill(own if invert else ~own, fill), y, **how)


@pytest.mark.parametrize("fn", [by_loop, masked, lambda z, *rest: masked(z.double(), *rest)])
def test_own_set_loss_right(fn, capsys):
    exercises.check_own_set_loss(fn)
    assert capsys.readouterr().out.startswith("✓ captions of other sets")


OWN_SET = {
    "All captions compete": lambda z, y, a, b: F.cross_entropy(z, y),
    "e⁰ is 1": lambda *args: masked(*args, fill=0.0),
    "right caption is masked out": lambda *args: masked(*args, invert=True),
    "sum over the images": lambda *args: masked(*args, reduction="sum"),
    "average over the sets": lambda *args: (
        masked(*args, reduction="none").split([4, 2])[0].mean() / 2
        + masked(*args, reduction="none").split([4, 2])[1].mean() / 2
    ),
    r"Expected shape \[\]": lambda *args: masked(*args, reduction="none"),
    "return missing": lambda *args: None,
    "Not the mean over images": lambda *args: -masked(*args),
}


@pytest.mark.parametrize("hint", OWN_SET)
def test_own_set_loss_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_own_set_loss(OWN_SET[hint])


def lowest(labels):
    """The loss of CLIP on features that are equal within a class and far apart between classes."""
    z = 1e4 * (labels[:, None] == labels).double()
    right = torch.arange(len(labels))
    return (F.cross_entropy(z, right) + F.cross_entropy(z.T, right)) / 2


def counts(labels):
    return labels.bincount()[labels].double()


def test_loss_floor_right(capsys):
    exercises.check_loss_floor(lowest)
    exercises.check_loss_floor(lambda labels: counts(labels).log().mean())
    assert capsys.readouterr().out.count("✓") == 2


FLOOR = {
    "mean over classes": lambda labels: labels.bincount().double().log().mean(),
    "mean of logs": lambda labels: counts(labels).mean().log(),
    "other images alone": lambda labels: (counts(labels) - 1).clamp_min(1).log().mean(),
    "natural logarithm": lambda labels: counts(labels).log2().mean(),
    "cannot reach zero": lambda labels: torch.zeros(()),
    r"Expected shape \[\]": lambda labels: counts(labels).log(),
    "Not the lowest value": lambda labels: counts(labels).mean(),
}


@pytest.mark.parametrize("hint", FLOOR)
def test_loss_floor_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_loss_floor(FLOOR[hint])


def answers():
    """200 logits whose lead says how often they are right."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 5, generator=g)
    lead = z.topk(2, dim=1).values.diff(dim=1).neg()[:, 0]
    right = lead > lead.median()
    return z, torch.where(right, z.argmax(1), (z.argmax(1) + 1) % 5)


def test_trust_right(capsys):
    z, labels = answers()
    exercises.check_trust(lambda z: z.topk(2, dim=1).values @ torch.tensor([1.0, -1.0]), z, labels)
    assert "by yours 100.0 % and 0.0 %" in capsys.readouterr().out
    exercises.check_trust(lambda z: z[:, 0], z[:1], labels[:1])
    assert capsys.readouterr().out.startswith("not judged")


TRUST = {
    "turn the sign": lambda z: z.topk(2, dim=1).values.diff(dim=1)[:, 0],
    "All scores are equal": lambda z: torch.ones(len(z)),
    r"Expected shape \[200\]": lambda z: z,
}


@pytest.mark.parametrize("hint", TRUST)
def test_trust_wrong(hint):
    with pytest.raises(AssertionError, match=hint):
        exercises.check_trust(TRUST[hint], *answers())
