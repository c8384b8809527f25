"""Attacks on captioners: every loss against a loop, budgets audited, the release's contrast bug by its closed form."""

import math

import pytest
import torch

from robustvlm_lite.attacks import get_attack, pgd
from robustvlm_lite.attacks.captions import Centered, FirstRight, Scaled, TwoClasses, on_texts, token_margin
from robustvlm_lite.attacks.release_captions import ReleaseAttack, jpeg, spent_255
from robustvlm_lite.attacks.reparametrized import adam_tanh
from robustvlm_lite.captioner import IGNORED, cross_entropy, new_captioner
from robustvlm_lite.defenses.prsl import PrslConfig
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.scenes.duo import sample_duos
from robustvlm_lite.threat import ThreatModel, audit

EPS = ThreatModel(2.0)


@pytest.fixture(scope="module")
def model():
    return new_captioner("tiny-vit-gpt2", seed=5).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scenes():
    return sample_duos(4, generator("attacked"))


def drawn(seed=0):
    logits = 3 * torch.randn(3, 6, 9, generator=generator("z", seed), dtype=torch.float64)
    labels = logits.argmax(-1)
    labels[:, 1::2] = 0  # every second target is most likely not the largest
    labels[1, 4:] = IGNORED
    return logits, labels


def test_the_margin_is_a_loop_over_tokens():
    logits, labels = drawn()
    for kappa in (0.0, 0.5):
        want = []
        for z, t in zip(logits.tolist(), labels.tolist(), strict=True):
            lead = [row[k] - max(v for j, v in enumerate(row) if j != k) + kappa for row, k in zip(z, t, strict=True) if k != IGNORED]
            want.append(-sum(max(v, 0) for v in lead))
        assert token_margin(logits, labels, kappa=kappa).tolist() == pytest.approx(want, rel=1e-12)


def test_the_first_right_word_takes_the_loss():
    logits, labels = drawn()
    labels[2] = (logits[2].argmax(-1) + 1) % 9  # nothing is right: the whole text counts
    want = []
    for z, t in zip(logits, labels, strict=True):
        nll = [-(row.log_softmax(0)[k]).item() if k != IGNORED else None for row, k in zip(z, t.tolist(), strict=True)]
        right = [i for i, k in enumerate(t.tolist()) if k not in (IGNORED, 0) and z[i].argmax() == k]
        there = [v for v in nll if v is not None]
        want.append(nll[right[0]] if right else sum(there) / len(there))
    assert FirstRight(skip=[0])(logits, labels).tolist() == pytest.approx(want, rel=1e-12)


def test_centering_hides_offsets_from_a_penalty_and_scaling_is_a_temperature():
    logits, labels = drawn()
    moved = logits + 5 * torch.randn(3, 6, 1, generator=generator(2), dtype=torch.float64)
    loss = PrslConfig(b=0.5)
    assert not torch.allclose(loss(moved, labels, "none"), loss(logits, labels, "none"))
    assert torch.allclose(Centered(loss)(moved, labels), Centered(loss)(logits, labels))
    assert torch.equal(Scaled(0.1)(logits, labels), cross_entropy(0.1 * logits, labels, "none"))


def test_two_classes_keep_the_order_of_the_loss(model, scenes):
    x, texts = scenes.pixels(), scenes.captions()
    logits = TwoClasses(model, texts)(x)
    loss = model.token_loss(x, texts, reduction="none")
    softplus = torch.nn.functional.cross_entropy(logits.double(), torch.zeros(4, dtype=torch.long), reduction="none")
    assert softplus.tolist() == pytest.approx([math.log1p(math.exp(v - 8)) for v in loss.tolist()], rel=1e-4)
    assert softplus.argsort().tolist() == loss.argsort().tolist() and (logits.argmax(1) == 0).all()


LOSSES = {"cross_entropy": cross_entropy, "margin": token_margin, "first": FirstRight([3]), "prsl": Centered(PrslConfig(b=1e-2))}


@pytest.mark.parametrize("name", LOSSES)
def test_pgd_raises_a_text_loss_within_its_budget(name, model, scenes):
    x, texts = scenes.pixels(), scenes.captions()
    objective = on_texts(model, texts, loss=LOSSES[name])
    found = [pgd(objective, x, EPS, n_steps=k, generators=[generator(i) for i in range(4)]) for k in (1, 4, 8)]
    for x_adv in found:
        audit(x, x_adv, EPS)
    values = [objective(v) for v in (x, *found)]
    assert all((b >= a - 1e-6).all() for a, b in zip(values[1:], values[2:], strict=False))  # the best iterate is kept
    assert values[-1].sum() >= values[0].sum() and not torch.equal(found[-1], x)


@pytest.mark.parametrize("attack", ["mifgsm-5", "apgd-ce-8"])
def test_torchattacks_runs_on_texts(attack, model, scenes):
    x, texts = scenes.pixels(), scenes.captions()
    keys = [(0, attack, i) for i in range(4)]
    x_adv = get_attack(attack).run(TwoClasses(model, texts), x, torch.zeros(4, dtype=torch.long), EPS, keys)
    audit(x, x_adv, EPS)
    before, after = (model.token_loss(v, texts, reduction="none") for v in (x, x_adv))
    assert (after > before).all()


def test_adam_finds_the_corner_of_a_linear_objective():
    x = torch.full((2, 3, 8, 8), 0.5)
    slope = torch.randn(2, 3, 8, 8, generator=generator(0))
    x_adv = adam_tanh(lambda v: (v * slope).flatten(1).sum(1), x, EPS, n_steps=40)
    audit(x, x_adv, EPS)
    best = EPS.eps * slope.abs().flatten(1).sum(1)
    assert (((x_adv - x) * slope).flatten(1).sum(1) > 0.95 * best).all()


def test_adam_raises_a_text_loss(model, scenes):
    x, objective = scenes.pixels(), on_texts(model, scenes.captions())
    few, many = (adam_tanh(objective, x, EPS, n_steps=k) for k in (2, 12))
    audit(x, many, EPS)
    assert (objective(x) <= objective(few) + 1e-6).all() and (objective(few) <= objective(many) + 1e-6).all()


# --- the release


def contrast(images):
    return images.std(dim=(0, 2, 3))


def test_without_a_gradient_the_release_still_shrinks_contrast(model, scenes):
    """p -> (2p - 1) std + mean in every generation: factors 0.537, 0.523 and 0.552 from the two models' statistics."""
    x = scenes.pixels()
    found = [images for images, _ in ReleaseAttack(alpha=0, quirk_jpeg=False, generations=4).run(model, x)]
    for one, two in zip(found, found[1:], strict=False):
        assert (contrast(two) / contrast(one)).tolist() == pytest.approx([0.537, 0.523, 0.552], abs=1e-3)
    assert spent_255(found[1], x).min() > 40


def test_without_gradient_and_quirks_it_is_a_no_op(model, scenes):
    x = scenes.pixels()
    for images, texts in ReleaseAttack(alpha=0, quirk_jpeg=False, quirk_statistics=False, generations=3).run(model, x):
        assert torch.allclose(images, x, atol=1e-6) and texts == model.generate(x)


def test_jpeg_alone_spends_more_than_the_steps(model, scenes):
    x = scenes.pixels()
    read = torch.stack([jpeg(image) for image in x])
    assert spent_255(read, x).min() > 20  # at the edges of rendered shapes
    assert torch.equal(read, torch.stack([jpeg(image) for image in x])) and read.shape == x.shape


def test_every_generation_moves_by_alpha_at_most(model, scenes):
    x = scenes.pixels()
    found = [images for images, _ in ReleaseAttack(alpha=0.02, quirk_jpeg=False, quirk_statistics=False, generations=4).run(model, x)]
    for k, images in enumerate(found):
        assert 255 * (images - x).abs().max() <= k * 2.55 + 1e-3
    assert 255 * (found[-1] - x).abs().max() > 7


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"eps": 0}, {"generations": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="expected alpha >= 0"):
        ReleaseAttack(**wrong)
