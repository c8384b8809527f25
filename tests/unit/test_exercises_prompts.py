"""The exercises of the prompt chapters pass a right solution and name the mistake in a wrong one."""

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite.book import exercises_prompts as exercises


def kl(p, q, **how):
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, **how)


def unit(t):
    return F.normalize(t, dim=1)


def split(a, each=False):
    parts = [a.relu(), (-a).relu()]
    whole = torch.cat([h / h.sum(1, keepdim=True) for h in parts] if each else parts, 1)
    return whole / (1 if each else whole.sum(1, keepdim=True))


def slope(v, t):
    own = unit(t)
    return (v - (v * own).sum(1, keepdim=True) * own) / t.norm(dim=1, keepdim=True)


def by_length(a, b):
    return (unit(a) - unit(b)).norm(dim=1)


def seeds_first(a, b):
    d = (a.double() - b.double()).mean(0)
    return torch.stack([d.mean(), d.std() / len(d) ** 0.5])


def with_error(a, b, error):
    return torch.stack([(a.double() - b.double()).mean(), error])


RIGHT = {
    "paired over seeds": (exercises.check_paired_over_seeds, seeds_first),
    "divergence": (exercises.check_divergence, lambda p, q: kl(p, q, reduction="none").sum(1)),
    "reliability": (exercises.check_reliability, lambda f, t: torch.sigmoid(t - f)),
    "signed split": (exercises.check_signed_split, split),
    "projection": (exercises.check_projection, slope),
    "flatter": (exercises.check_flatter, by_length),
}
WRONG = {
    "two numbers": ("paired over seeds", lambda a, b: seeds_first(a, b)[0]),
    "a minus b": ("paired over seeds", lambda a, b: seeds_first(b, a)),
    "as an image of its own": ("paired over seeds", lambda a, b: with_error(a, b, (a.double() - b.double()).std() / a.numel() ** 0.5)),
    "divided by the root of N": ("paired over seeds", lambda a, b: with_error(a, b, (a.double() - b.double()).mean(0).std())),
    "for independent": (
        "paired over seeds",
        lambda a, b: with_error(a, b, ((a.double().mean(0).var() + b.double().mean(0).var()) / a.shape[1]).sqrt()),
    ),
    "Expected a standard error": ("paired over seeds", lambda a, b: with_error(a, b, 2 * seeds_first(a, b)[1])),
    "keep \\[B\\]": ("divergence", lambda p, q: kl(p, q, reduction="batchmean")),
    "The other way round": ("divergence", lambda p, q: kl(q, p, reduction="none").sum(1)),
    "average over classes": ("divergence", lambda p, q: kl(p, q, reduction="none").mean(1)),
    "own entropy is missing": ("divergence", lambda p, q: F.cross_entropy(q, p.softmax(1), reduction="none")),
    "Not the divergence": ("divergence", lambda p, q: 2 * kl(p, q, reduction="none").sum(1)),
    "belongs to the frozen one": ("reliability", lambda f, t: torch.sigmoid(f - t)),
    "ratio of losses": ("reliability", lambda f, t: t / (f + t)),
    "alone": ("reliability", lambda f, t: (-f).exp()),
    "0 / 0 is NaN": ("reliability", lambda f, t: (-f).exp() / ((-f).exp() + (-t).exp())),
    "Expected 0.800": ("reliability", lambda f, t: torch.sigmoid(t - f) / 2),
    "are two places": ("signed split", lambda a: a.abs() / a.abs().sum(1, keepdim=True)),
    "Rows must sum to 1": ("signed split", lambda a: torch.cat([a.relu(), (-a).relu()], 1)),
    "halves one by one": ("signed split", lambda a: split(a, each=True)),
    "is flat": ("signed split", lambda a: torch.cat([a, -a], 1).softmax(1)),
    "Negative parts come first": ("signed split", lambda a: split(-a)),
    "The length of z_t is missing": ("projection", lambda v, t: slope(v, t) * t.norm(dim=1, keepdim=True)),
    "gradient of the dot product": ("projection", lambda v, t: v / t.norm(dim=1, keepdim=True)),
    "sign is reversed": ("projection", lambda v, t: -slope(v, t)),
    "do not normalize z_v again": ("projection", lambda v, t: slope(unit(v), t)),
    "part along z_t": ("projection", lambda v, t: (v * unit(t)).sum(1, keepdim=True) * unit(t)),
    "flat maps would satisfy it": ("flatter", lambda a, b: (a - b).norm(dim=1)),
    "turns its sign": ("flatter", lambda a, b: (unit(a.abs()) - unit(b.abs())).norm(dim=1)),
    "one distance for each image": ("flatter", lambda a, b: by_length(a, b).mean()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_solutions_pass(name, capsys):
    check, fn = RIGHT[name]
    check(fn)
    assert capsys.readouterr().out.startswith("✓ ")


@pytest.mark.parametrize("hint", WRONG)
def test_wrong_solutions_are_told_why(hint):
    name, fn = WRONG[hint]
    with pytest.raises(AssertionError, match=hint):
        RIGHT[name][0](fn)


def test_trust_is_judged_by_labels_it_never_sees(capsys):
    g = torch.Generator().manual_seed(0)
    frozen, tuned, y = 3 * torch.randn(40, 4, generator=g), 3 * torch.randn(40, 4, generator=g), torch.arange(40) % 4

    def share(f, t):
        p, q = (z.softmax(1).amax(1) for z in (f, t))
        return p / (p + q)

    exercises.check_trust(share, frozen, tuned, y)
    assert "where frozen alone is right (n = " in capsys.readouterr().out
    for hint, fn in {
        "Expected weights in \\[0, 1\\]": lambda f, t: f.amax(1) - t.amax(1),
        "Where the frozen model alone is sure": lambda f, t: 1 - share(f, t),
        "one weight for each image": lambda f, t: share(f, t).mean(),
    }.items():
        with pytest.raises(AssertionError, match=hint):
            exercises.check_trust(fn, frozen, tuned, y)
