"""Attacks on random classifiers: their mean over draws, independence of batches, their budget, and guessed labels."""

import pytest
import torch
from torch import nn

from robustvlm_lite import attacks
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel


class Noisy(nn.Module):
    """Linear logits of an image plus noise on its weights: what an EOT attack averages over."""

    def __init__(self, keys=None):
        super().__init__()
        w = torch.randn(3, 3 * 4 * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("w", w)
        self.keys, self.seen = keys, []

    def keyed(self, keys):
        other = Noisy(keys)
        other.seen = self.seen
        self.seen.append(tuple(keys))
        return other

    def forward(self, x):
        logits = x.flatten(1) @ self.w.T
        if self.keys is None:
            return logits
        noise = torch.stack([torch.randn(3, 48, generator=generator(*k), dtype=torch.float64) for k in self.keys])
        return logits + 5 * (noise @ x.flatten(1)[:, :, None])[..., 0]


@pytest.fixture
def x():
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Y = torch.tensor([0, 1, 2, 0])
KEYS = [("test", i) for i in range(4)]


def test_the_gradient_is_the_mean_over_draws(x):
    """Loss linear in the pixels: one step from the start moves along the sign of the mean of the draws' gradients."""

    def make(model, y):
        return lambda v: model(v)[torch.arange(len(v)), y]

    base = attacks.expectation(n_steps=1, draws=3)
    attack = type(base)("linear", "own", base.params, make)
    threat = ThreatModel(8.0)
    got = attack.run(Noisy(), x, Y, threat, KEYS)
    w = Noisy().w
    for image, y, key, moved in zip(x, Y, KEYS, got, strict=True):
        draws = [torch.randn(3, 48, generator=generator(*key, "draw", 0, d), dtype=torch.float64) for d in range(3)]
        g = torch.stack([w[y] + 5 * n[y] for n in draws]).mean(0).view(3, 4, 4)
        start = (image + threat.random_start(image[None], [generator(*key)])[0]).clamp(0, 1)
        want = (start + threat.eps / 4 * g.sign()).clamp(image - threat.eps, image + threat.eps).clamp(0, 1)
        torch.testing.assert_close(moved, want)


def test_every_step_and_image_has_draws_of_its_own(x):
    model = Noisy()
    attacks.expectation(n_steps=5, draws=2).run(model, x, Y, ThreatModel(2.0), KEYS)
    keys = [key for batch in model.seen for key in batch]
    assert len(keys) == len(set(keys)) == 5 * 2 * 4


def test_batch_and_order_do_not_matter_and_the_ball_is_kept(x):
    attack, threat = attacks.expectation(n_steps=6, draws=2), ThreatModel(2.0)
    whole = attack.run(Noisy(), x, Y, threat, KEYS)
    alone = torch.cat([attack.run(Noisy(), x[i : i + 1], Y[i : i + 1], threat, KEYS[i : i + 1]) for i in (3, 1)])
    torch.testing.assert_close(alone, whole[[3, 1]])
    assert (whole - x).abs().max() <= 2 / 255 + 1e-12 and whole.min() >= 0 and whole.max() <= 1


def test_averaging_beats_a_single_fixed_draw(x):
    """On fresh draws the mean loss is higher when the attack averaged than when it met one draw again and again."""
    threat = ThreatModel(16.0)

    class Fixed(Noisy):
        def keyed(self, keys):
            return Noisy([("fixed", k[1]) for k in keys])

    def loss(images):
        fresh = [Noisy([("fresh", d, i) for i in range(4)]) for d in range(200)]
        return torch.stack([attacks.cross_entropy(m, Y)(images) for m in fresh]).mean().item()

    averaged = attacks.expectation(20, draws=8).run(Noisy(), x, Y, threat, KEYS)
    fixed = attacks.expectation(20, draws=1).run(Fixed(), x, Y, threat, KEYS)
    assert loss(averaged) > loss(fixed) > loss(x)


def test_without_labels_is_the_attack_on_the_models_guess(x):
    model, threat, inner = Noisy(), ThreatModel(4.0), attacks.get_attack("pgd-5")
    guess = model(x).argmax(1)
    got = attacks.without_labels(inner).run(model, x, (guess + 1) % 3, threat, KEYS)
    torch.testing.assert_close(got, inner.run(model, x, guess, threat, KEYS))
    assert attacks.without_labels(inner).name == "pgd-5-guessed"


def test_another_name_is_the_same_attack(x):
    inner = attacks.get_attack("pgd-3")
    one, other = (a.run(Noisy(), x, Y, ThreatModel(2.0), KEYS) for a in (inner, attacks.renamed(inner, "on CLIP")))
    torch.testing.assert_close(one, other)
    assert attacks.renamed(inner, "on CLIP").name == "on CLIP"


@pytest.mark.parametrize(
    "options, text",
    [({"draws": 0}, "at least 1 step and 1 draw"), ({"n_steps": 0}, "at least 1 step"), ({"objective": "dlr"}, "unknown objective")],
)
def test_bad_arguments(options, text):
    with pytest.raises(UserError, match=text):
        attacks.expectation(**options)


def test_a_model_without_draws_is_refused(x):
    with pytest.raises(UserError, match="draws of its own"):
        attacks.expectation(2).run(nn.Flatten(), x, Y, ThreatModel(2.0), KEYS)
