"""The exercises of chapter 07 pass a right solution and name the mistake in a wrong one."""

import pytest
import torch

from robustvlm_lite.book import exercises_a_tpt as exercises
from robustvlm_lite.runtime import generator

TV = 20 + 20 * torch.rand(5, 6, generator=generator("tv"))


def entropy(z):
    return torch.distributions.Categorical(logits=z).entropy()


def relative(tv):
    return (-(tv / tv.mean(1, keepdim=True))).softmax(1)


RIGHT = {
    "surest": (exercises.check_surest, lambda z, k: entropy(z).topk(k, largest=False).indices),
    "first step": (exercises.check_first_step, lambda c, g: c * (1 - 5e-5) - 5e-3 * g / (g.abs() + 1e-8)),
    "shared weights": (lambda fn: exercises.check_shared_weights(fn, TV), relative),
}
WRONG = {
    "least sure": ("surest", lambda z, k: entropy(z).topk(k).indices),
    "largest logit": ("surest", lambda z, k: z.amax(-1).topk(k).indices),
    "Expected views": ("surest", lambda z, k: torch.arange(k).expand(3, k)),
    "plain gradient descent": ("first step", lambda c, g: c - 5e-3 * g),
    "weight decay is missing": ("first step", lambda c, g: c - 5e-3 * g.sign()),
    "sign is reversed": ("first step", lambda c, g: c * (1 - 5e-5) + 5e-3 * g.sign()),
    "bias corrections": ("first step", lambda c, g: c * (1 - 5e-5) - 5e-3 * 0.1 / 0.001**0.5 * g.sign()),
    "Expected -?\\d": ("first step", lambda c, g: c),
    "sum to 1": ("shared weights", lambda tv: (-tv).exp()),
    "at least 0": ("shared weights", lambda tv: 2 * relative(tv) - 1 / 6 + (torch.arange(6) == 0) * 1.0 - (torch.arange(6) == 1) * 1.0),
    "calmest view must weigh most": ("shared weights", lambda tv: (tv / tv.mean(1, keepdim=True)).softmax(1)),
    "the scale of TV decides": ("shared weights", lambda tv: (-tv).softmax(1)),
    "TV has no say": ("shared weights", lambda tv: torch.full_like(tv, 1 / 6)),
    "A finer grid": ("shared weights", lambda tv: (-tv / 20).softmax(1)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(name, capsys):
    check, solution = RIGHT[name]
    check(solution)
    assert capsys.readouterr().out.startswith("✓")


@pytest.mark.parametrize("hint", WRONG)
def test_a_wrong_one_is_told_its_mistake(hint):
    name, solution = WRONG[hint]
    with pytest.raises(AssertionError, match=hint):
        RIGHT[name][0](solution)
