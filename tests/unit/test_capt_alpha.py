"""The weight alpha of CAPT: the specification's vectors and every other reading."""

import math

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import toy_clip
from toy_tuning import close, in_step

from robustvlm_lite.defenses import build_prompts
from robustvlm_lite.defenses.capt import READINGS, Choices


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, "toy-alpha")


@pytest.mark.parametrize(
    "reading, expected", [("A1", (0.8, 0.5, 0.0526, 0.4762)), ("A3", (0.878, 0.5, 0.0340, 0.0871)), ("A2", (0.8, 0.5, 0.05, 0.9))]
)
def test_alpha_on_the_vectors_of_the_specification(reading, expected):
    frozen, tuned = ([math.log(p / (1 - p)) for p in ps] for ps in ((0.8, 0.5, 0.05, 0.9), (0.2, 0.5, 0.9, 0.99)))
    logits = [torch.tensor([[z, 0.0] for z in zs]).double() for zs in (frozen, tuned)]
    got = READINGS[reading](*logits, torch.zeros(4, dtype=torch.int64))
    assert got.tolist() == pytest.approx(expected, abs=5e-4)


def test_the_other_readings_of_alpha(clip):
    y, g = torch.tensor([0, 1, 2, 3, 1]), torch.Generator().manual_seed(0)
    frozen, tuned = (3 * torch.randn(5, 4, generator=g).double() for _ in range(2))
    p, q = frozen.softmax(1), tuned.softmax(1)
    rows = torch.arange(5)
    batch_wide = p[rows, y].mean() / (p[rows, y].mean() + q[rows, y].mean())
    close(READINGS["A4"](frozen, tuned, y), batch_wide.expand(5))
    close(READINGS["A7"](frozen, tuned, y), p.amax(1) / (p.amax(1) + q.amax(1)))
    running = build_prompts("CAPT", clip, config=Choices(alpha="A5"))
    sure = 9 * F.one_hot(y, 4).double()
    assert running.alpha(sure, -sure, y).unique().item() == 1.0, "the first batch counts whole"
    assert running.alpha(-sure, sure, y).unique().item() == pytest.approx(0.9), "then a tenth of each"
    assert READINGS["A3"](sure * 1e3, sure * 1e3, y).tolist() == [0.5] * 5, "two losses of 0 say nothing"
    assert READINGS["A1"](-1e3 * sure, -1e3 * sure, y).tolist() == [0.5] * 5, "two probabilities of 0 keep their ratio"


@pytest.mark.parametrize("reading", [*READINGS, 0.0, 0.5, 1.0])
def test_alpha_is_a_weight_without_gradient(reading, clip):
    defense, batch = in_step("CAPT", clip, config=Choices(alpha=reading))
    frozen = batch.task.frozen["logits"][batch.index]
    alpha = defense.alpha(frozen, defense.logits(defense.clean(batch), batch), batch.y)
    assert alpha.shape == (5,) and not alpha.requires_grad and 0 <= alpha.min() and alpha.max() <= 1
    if not isinstance(reading, str):
        assert (alpha == reading).all()
