"""Attacks on captioners: every loss against a loop, budgets audited, the release's contrast bug by its closed form."""

import math

import pytest
import torch
from toy_captioner import SIDE, WORDS, Leaning, uneven

from robustvlm_lite.attacks import get_attack, pgd, value_and_grad
from robustvlm_lite.attacks.captions import Centered, FirstRight, Scaled, TwoClasses, on_texts, token_margin
from robustvlm_lite.attacks.release_captions import ReleaseAttack, jpeg, narrowed, spent_255, widened
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
        lost = [i for i, k in enumerate(t.tolist()) if k not in (IGNORED, 0) and i < (right[0] if right else 99)]
        want.append((nll[right[0]] if right else sum(there) / len(there)) + len(lost) * math.log(9))
    assert FirstRight(skip=[0])(logits, labels).tolist() == pytest.approx(want, rel=1e-12)


def test_losing_a_word_never_lowers_the_value_of_the_first_right_word():
    """A word that has just been lost, and a next one that is sure: an attack that keeps the best iterate must keep this one."""
    leads, labels = torch.tensor([0.5, 0.01, -0.01, -3.0]), torch.tensor([[1, 2]])
    logits = torch.zeros(4, 1, 2, 9)
    logits[:, 0, 0, 1], logits[:, 0, 1, 2] = leads, 12.0
    values = torch.stack([FirstRight()(z, labels)[0] for z in logits])
    assert (values.diff() >= 0).all() and values[0] < values[1] < values[2]


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


def test_two_classes_refuse_a_loss_that_would_leave_them_no_gradient():
    """The margin of a sure text lies far below 0; softplus is flat there, and sign steps would stand still without a word."""
    model, x = Leaning(50 * uneven()), torch.rand(2, 3, SIDE, SIDE, generator=generator("sure"))
    texts = model.generate(x)
    with pytest.raises(UserError, match="expected a loss of at least -4"):
        TwoClasses(model, texts, loss=token_margin)(x)
    assert TwoClasses(model, texts)(x).shape == (2, 2)


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


NAN = "NaN or infinite at step 0"


@pytest.mark.parametrize("wrong, match", [
    ({"threat": ThreatModel(2.0, "l2")}, "expected norm linf"), ({"n_steps": -1}, "expected an integer n_steps"),
    ({"n_steps": 2.5}, "expected an integer n_steps"), ({"lr": 0.0}, "finite lr > 0"), ({"lr": float("nan")}, "finite lr > 0"),
    ({"x": torch.full((1, 3, 4, 4), 2.0)}, "expected pixels in"), ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, "floating-point"),
])  # fmt: skip
def test_adam_refuses(wrong, match):
    given = {"objective": lambda v: v.sum((1, 2, 3)), "x": torch.zeros(1, 3, 4, 4), "threat": EPS} | wrong
    with pytest.raises(UserError, match=match):
        adam_tanh(given.pop("objective"), given.pop("x"), given.pop("threat"), **given)


@pytest.mark.parametrize("broken", [lambda v: (v * float("nan")).sum((1, 2, 3)), lambda v: v.sum((1, 2, 3)).sqrt()])
def test_adam_does_not_pass_off_a_broken_model_as_a_robust_one(broken):
    with pytest.raises(RuntimeError, match=NAN):  # the root has an infinite slope at 0
        adam_tanh(broken, torch.zeros(1, 3, 4, 4), EPS)


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


MEMORY = {"quirk_statistics": False, "quirk_jpeg": False}


def bim(model, x, alpha, eps, steps, *, unclamped, moving):
    """Plain BIM on `Leaning` in normalized space: the slope of its loss is -weight for "bright", weight for "dark"."""
    clean, adv = (x - 0.5) / 0.5, (x - 0.5) / 0.5
    found, first = [], None
    for _ in range(steps):
        bright = ((adv * model.weight).sum((1, 2, 3)) > 0).view(-1, 1, 1, 1)
        first = bright if first is None else first
        slope = torch.where(bright if moving else first, -model.weight, model.weight)
        adv = clean + (adv + alpha * slope.sign() - clean).clamp(-eps, eps)
        adv = adv if unclamped else adv.clamp(-1, 1)
        found.append((0.5 * adv + 0.5, [WORDS[int(v > 0)] for v in (adv * model.weight).sum((1, 2, 3))]))
    return found


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("unclamped", [False, True])
def test_memory_and_moving_labels_are_a_plain_loop(unclamped, moving):
    model, x = Leaning(0.05 * uneven()), torch.rand(4, 3, SIDE, SIDE, generator=generator("bim"))  # never so sure that a slope is 0
    attack = ReleaseAttack(0.3, 1.0, 6, **MEMORY, quirk_unclamped=unclamped, quirk_moving_labels=moving)
    found = attack.run(model, x)[1:]
    for (images, texts), (want, says) in zip(found, bim(model, x, 0.3, 1.0, 5, unclamped=unclamped, moving=moving), strict=True):
        assert torch.allclose(images, want, atol=1e-5) and texts == says
    outside = (found[-1][0].amin() < -0.05) and (found[-1][0].amax() > 1.05)
    assert outside == unclamped or moving  # a moving target turns back before it gets far


def test_a_moving_target_brings_the_first_text_back():
    """The released BLIP-2 strip is right again at generation 9: the attack runs from what it has just reached."""
    model, x = Leaning(uneven()), torch.full((1, 3, SIDE, SIDE), 0.5)
    x += 0.001 * model.weight.sign()  # just bright
    said = {moving: [t for _, (t,) in ReleaseAttack(0.05, 1.0, 8, **MEMORY, quirk_moving_labels=moving).run(model, x)] for moving in (0, 1)}
    assert said[0] == ["bright"] + 7 * ["dark"]
    assert said[1] == 4 * ["bright", "dark"]


def test_a_widened_model_reads_pixels_outside_their_range(model, scenes):
    x, texts, reach = 1.6 * scenes.pixels() - 0.3, scenes.captions(), 0.5
    with pytest.raises(UserError, match="expected pixels in"):
        model.logits(x, texts)
    pixels = (x - model.mean) / model.std
    before = torch.tensor([[model.tokenizer.start]] * len(x))
    want = model.model(pixel_values=pixels, decoder_input_ids=before).logits[:, 0]
    got = widened(model, reach).logits(narrowed(x, reach), texts)[0][:, 0]
    assert torch.allclose(got, want, atol=1e-4) and model.mean.flatten().tolist() == [0.5] * 3  # the model itself is as it was


def test_blip2_as_released_leaves_the_range_up_to_its_ball(scenes):
    """α = 0.3 is 20.6, 20.0 and 21.1/255 by channel; ε = 1 binds from the fourth update on: 68.5, 66.6 and 70.3/255."""
    asked = new_captioner("tiny-blip2", seed=5).eval().requires_grad_(False)
    x, question = scenes.pixels(), ["is there a star ?"] * 4
    found = [images for images, _ in ReleaseAttack.blip2().run(asked, x, question)]
    moved = [255 * (images - x).abs().amax(dim=(0, 2, 3)) for images in found]
    assert moved[1].tolist() == pytest.approx([20.6, 20.0, 21.1], abs=0.06)
    assert max(v.max() for v in moved) <= 70.35 and moved[4].tolist() == pytest.approx([68.5, 66.6, 70.3], abs=0.06)
    assert min(v.min() for v in found) < 0 and max(v.max() for v in found) > 1
    assert len(found) == 11 and (spent_255(found[4], x) == 70).all()


def test_the_released_blip2_attack_asks_nothing(scenes, monkeypatch):
    asked = new_captioner("tiny-blip2", seed=5).eval().requires_grad_(False)
    x, question, seen = scenes.pixels(), ["is there a star ?"] * 4, []
    plain = type(asked).logits

    def noted(self, x, targets, prompt=None):
        seen.append(prompt)
        return plain(self, x, targets, prompt)

    monkeypatch.setattr(type(asked), "logits", noted)
    (_, clean), (_, after) = ReleaseAttack(0.0, generations=2, **MEMORY, quirk_unasked=True).run(asked, x, question)
    assert seen == [None] and clean == after == asked.generate(x, question)


def test_what_was_spent_is_measured_on_pictures():
    x = torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    assert spent_255(x + torch.tensor([-0.4, 0.4, 0.1]), x).tolist() == [25.0]  # 128 -> 153; black and white stay


def test_gradient_check_of_the_toy():
    """Central differences in float64 at ten pixels: the toy that stands for a model above has the slope that it should."""
    model = Leaning(uneven()).double()
    x = 0.1 + 0.8 * torch.rand(2, 3, SIDE, SIDE, generator=generator("slope"), dtype=torch.float64)
    objective = on_texts(model, ["dark", "bright"])
    gradient = value_and_grad(objective, x)[1]
    for place in torch.randint(x.numel(), (10,), generator=generator("places")).tolist():
        step = torch.zeros_like(x)
        step.view(-1)[place] = 1e-5
        want = (objective(x + step) - objective(x - step)).sum() / 2e-5
        assert gradient.view(-1)[place].item() == pytest.approx(want.item(), rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("wrong, match", [
    ({"alpha": -0.1}, "alpha >= 0"), ({"alpha": float("nan")}, "alpha >= 0"), ({"eps": 0}, "eps > 0"), ({"generations": 0}, "generations"),
    ({"quirk_unclamped": True}, "quirk_unclamped or quirk_jpeg, got both"),
])  # fmt: skip
def test_impossible_settings_are_refused(wrong, match):
    with pytest.raises(UserError, match=match):
        ReleaseAttack(**wrong)
