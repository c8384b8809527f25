"""Prompt-tuned defenses: losses and attacks against plain formulas, special cases that tie methods together, training."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, in_float32, toy_clip
from toy_tuning import ATTACK, SHORT, close, in_step, kl, photos, reference, same, trained

from robustvlm_lite.defenses import PROMPT_METHODS, build_prompts, gradient_shares
from robustvlm_lite.defenses.capt import Choices
from robustvlm_lite.defenses.prompt_tuning import Weight
from robustvlm_lite.defenses.prompting import scaled_spec
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.runtime import UserError

TUNED = [name for name in PROMPT_METHODS if name != "PAFT"]
MAPS = [name for name in TUNED if name.startswith("CBA")]


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, "toy-tuning")


@pytest.fixture(scope="module")
def small(clip):
    """The same in float32, as images come."""
    model = in_float32(clip)
    model._text_cache.clear()
    return model


# --- losses


def expected_terms(defense, batch):
    """The weighted terms of each method, but for maps, from its paper's formula."""
    clean, adv, z, z_adv, frozen = reference(defense, batch)
    ce, ce_adv = F.cross_entropy(clean, batch.y), F.cross_entropy(adv, batch.y)
    name, config = defense.name, defense.config
    if name == "AdvPT":
        return None
    if name.startswith("FAP"):
        return {"ce": ce, "consistency": 1.5 * ((F.cosine_similarity(z, z_adv) + 1) * kl(clean, adv)).mean()}
    if name == "TRADES":
        return {"ce": ce, "kl": 6.0 * kl(clean, adv).mean()}
    if name.startswith("CAPT"):
        a = float(name != "CAPT (own answer)")
        p = [logits.softmax(1)[torch.arange(len(batch.y)), batch.y].detach() for logits in (frozen, clean)]
        if config.alpha == "A1":
            a = p[0] / (p[0] + p[1])
        return {"ce": ce, "kl_train": 1.5 * ((1 - a) * kl(clean, adv)).mean(), "kl_frozen": 1.5 * (a * kl(frozen, adv)).mean()}
    if name == "CBA-FAPT (FAP's loss)":
        return {"ce": ce, "consistency": 1.5 * ((F.cosine_similarity(z, z_adv) + 1) * kl(clean, adv)).mean()}
    if name == "CBA-FAPT (adversarial only)":
        return {"ce_adv": 5.0 * ce_adv}
    if name.startswith("CBA"):
        return {"ce": ce, "ce_adv": 5.0 * ce_adv}
    return {"ce_adv": ce_adv}


@pytest.mark.parametrize("name", [n for n in TUNED if n != "AdvPT"])
def test_losses_and_gradients_equal_the_formulas(name, clip):
    defense, batch = in_step(name, clip)
    terms, expected = defense.losses(batch), expected_terms(defense, batch)
    assert set(terms) - set(expected) <= {"vaa", "taa"} and set(expected) <= set(terms)
    parameters = defense.learned()
    for key, value in expected.items():
        close(terms[key].detach(), value.detach())
        if (key, defense.config and getattr(defense.config, "alpha", "")) in (("kl_train", 1.0), ("kl_frozen", 0.0)):
            continue  # weight 0
        pairs = (torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in (terms[key], value))
        for ours, theirs in zip(*pairs, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                close(ours, theirs, 1e-7)


@pytest.mark.parametrize("name", ["APT", "AVP", "FAP", "TRADES", "CAPT", "CBA-FAPT", "CBA-FAPT (FAP's loss)"])
def test_the_training_attack_maximises_what_the_paper_says(name, clip):
    """Cross-entropy, or KL from the clean answer for FAP and TRADES; and it cannot reach the prompts."""
    defense, batch = in_step(name, clip)
    clean, adv, *_ = reference(defense, batch)
    expected = kl(clean, adv) if name in ("FAP", "TRADES", "CBA-FAPT (FAP's loss)") else F.cross_entropy(adv, batch.y, reduction="none")
    close(defense.inner(batch)(batch.x_adv), expected.detach(), 1e-8)
    x = batch.x_adv.clone().requires_grad_()
    defense.inner(batch)(x).sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in defense.learned())


@pytest.mark.parametrize("inner, alpha", [("kl", "A1"), ("consistency", "A1"), ("consistency", 1.0)])
def test_capts_other_attacks(inner, alpha, clip):
    defense, batch = in_step("CAPT", clip, config=Choices(inner=inner, alpha=alpha))
    clean, adv, _, _, frozen = reference(defense, batch)
    a = defense.alpha(frozen, clean, batch.y) if inner == "consistency" else 0.0
    close(defense.inner(batch)(batch.x_adv), ((1 - a) * kl(clean, adv) + a * kl(frozen, adv)).detach(), 1e-8)


def test_kl_directions_of_capt(clip):
    for direction in ("target_adv", "adv_target", "sym"):
        defense, batch = in_step("CAPT", clip, config=Choices(direction=direction, alpha=1.0, weight=1.0))
        _, adv, _, _, frozen = reference(defense, batch)
        ways = {"target_adv": kl(frozen, adv), "adv_target": kl(adv, frozen)}
        expected = ways.get(direction, sum(ways.values()) / 2)
        close(defense.losses(batch)["kl_frozen"].detach(), expected.mean().detach(), 1e-8)
    gap = ways["target_adv"].mean() - ways["adv_target"].mean()
    assert abs(gap) > 1e-3 * ways["target_adv"].mean(), "else the directions are not told apart"


def test_a_detached_clean_answer_keeps_its_value_and_loses_its_gradient(clip):
    values, gradients = [], []
    for detach in (False, True):
        defense, batch = in_step("CAPT", clip, config=Choices(detach_clean=detach, alpha=0.0))
        term = defense.losses(batch)["kl_train"]
        values.append(term.detach())
        gradients.append(torch.autograd.grad(term, defense.learner.vision)[0])
        if detach:
            clean, adv, *_ = reference(defense, batch)
            close(gradients[-1], torch.autograd.grad(1.5 * kl(clean.detach(), adv).mean(), defense.learner.vision)[0], 1e-7)
    assert values[0] == values[1] and (gradients[0] - gradients[1]).abs().max() > 1e-6


def test_the_bank_of_advpt_holds_attacked_features_and_no_label(small):
    clip = small
    defense, data, seen = build_prompts("AdvPT", clip, NAMES), photos(), []

    def watched(objective, x, **options):
        x_adv = ATTACK(objective, x, **options)
        seen.append((x, x_adv, objective(x_adv)))
        return x_adv

    defense.fit(data, attack=watched, training=SHORT, progress=False)
    (x, x_adv, value), *more = seen
    assert not more and len(x) == len(data), "the bank is made once"
    home, away = (clip.model.encode_image(clip.normalize(v.to(clip.mean.dtype))) for v in (x, x_adv))
    close(value.detach(), kl(home, away).detach().to(value), 1e-5)
    task = defense.task(data)
    batch = defense.batch(task, torch.arange(3), x[:3], data.labels[:3])
    task.frozen = {"bank": F.normalize(away, dim=-1).detach()}
    expected = F.cross_entropy(clip.logit_scale * task.frozen["bank"][:3] @ batch.text.T, batch.y)
    close(defense.losses(batch)["ce_bank"], expected)


# --- special cases


SPECIAL = {  # settings of one method that are another one
    "alpha 0 and its KL attacked is TRADES": (
        ("CAPT", {"config": Choices(weight=6.0, alpha=0.0, inner="kl")}), ("TRADES", {})),
    "alpha 0 over the whole bracket is TRADES": (
        ("CAPT", {"config": Choices(weight=6.0, alpha=0.0, inner="consistency")}), ("TRADES", {})),
    "alpha 1 is distillation": (("CAPT", {"config": Choices(alpha=1.0)}), ("CAPT (distillation)", {})),
    "FAP with lambda 0 is natural cross-entropy, as CAPT with lambda 0": (
        ("FAP", {"config": Weight(0.0)}), ("CAPT", {"config": Choices(weight=0.0), "spec": "FAP"})),
    "CBA without maps is its base, whatever its maps were": (
        ("CBA-FAPT (no maps)", {}),
        ("CBA-FAPT", {"config": replace(PROMPT_METHODS["CBA-FAPT"].config, beta=0.0, gamma=0.0, fusion="F4")})),
    "CBA on FAP without maps is FAP": (
        ("CBA-FAPT (FAP's loss)", {"config": replace(PROMPT_METHODS["CBA-FAPT (FAP's loss)"].config, beta=0.0, gamma=0.0)}),
        ("FAP", {})),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIAL)
def test_special_cases_learn_the_same_prompts(case, small):
    clip, ends = small, []
    for name, options in SPECIAL[case]:
        if options.get("spec") == "FAP":
            options = options | {"spec": scaled_spec(clip, PROMPT_METHODS["FAP"].spec)}
        ends.append(trained(name, clip, **options))
    assert same(*ends)
    assert not same(ends[0], build_prompts(*[SPECIAL[case][0][0]], clip, NAMES)), "they moved"


def test_fap_with_lambda_0_is_the_clean_cross_entropy(clip):
    defense, batch = in_step("FAP", clip, config=Weight(0.0))
    clean, *_ = reference(defense, batch)
    close(sum(defense.losses(batch).values()).detach(), F.cross_entropy(clean, batch.y).detach())


def test_without_prompts_capt_is_the_frozen_model(clip):
    one = replace(photos(), templates=("a photo of a {}.",))
    defense = build_prompts("CAPT", clip, spec=PromptSpec())
    x = one.pixels().double()
    close(defense.classifier(NAMES)(x), clip.classifier(NAMES, one.templates)(x))
    task = defense.task(one)
    batch = defense.batch(task, torch.arange(4), x[:4], one.labels[:4])
    batch.x_adv = x[4:8]
    terms = defense.losses(batch)
    close(terms["kl_train"], terms["kl_frozen"])  # the two clean answers are one, so alpha is one half
    with pytest.raises(UserError, match="CAPT: expected something to learn, got none"):
        defense.fit(one, attack=ATTACK, training=SHORT, progress=False)


# --- training


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_training_moves_every_prompt_and_nothing_of_clip(name, random_clip):
    base = copy.deepcopy(random_clip)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    defense = trained(name, base, data=photos(side=64))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    start = build_prompts(name, base, NAMES)
    if name != "PAFT":
        start.learner.seed = 3
        start.learner.reset()
    moved = {k: not torch.equal(v, defense.state()[k]) for k, v in start.state().items()}
    assert moved and all(moved.values()), moved
    assert len(defense.history) == 3 and all(math.isfinite(v) for h in defense.history for v in h.values())
    model = defense.classifier(NAMES, ())
    x = photos(side=64).pixels()
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (12, 4) and logits.isfinite().all()
    assert defense.attack_surface(model)(x[:2]).dtype == torch.float32


def test_runs_follow_the_seed_and_share_images_and_starts(small):
    clip, seen = small, {}

    def watched(name):
        def attack(objective, x, **options):
            seen.setdefault(name, []).append(x)
            assert all(p.grad is None or not p.grad.any() for p in defense.learned())
            return ATTACK(objective, x, **options)

        return attack

    ends = {}
    for name, seed in (("CAPT", 0), ("FAP", 0), ("CAPT", 1)):
        for again in range(2):
            torch.manual_seed(again)
            defense = build_prompts(name, clip, NAMES)
            defense.fit(photos(), attack=watched((name, seed, again)), training=replace(SHORT, steps=1), seed=seed, progress=False)
            ends[name, seed, again] = defense
    for name, seed in (("CAPT", 0), ("FAP", 0), ("CAPT", 1)):
        one, two = (ends[name, seed, again].state() for again in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert torch.equal(seen["CAPT", 0, 0][0], seen["FAP", 0, 0][0])
    assert not torch.equal(seen["CAPT", 0, 0][0], seen["CAPT", 1, 0][0])
    assert not torch.equal(ends["CAPT", 0, 0].state()["vision"], ends["CAPT", 1, 0].state()["vision"])
    repeated = ends["CAPT", 0, 0].fit(photos(), attack=ATTACK, training=replace(SHORT, steps=1), seed=0, progress=False)
    assert same(repeated, ends["CAPT", 0, 1]) and len(repeated.history) == 1, "a second fit starts anew"


def test_the_text_is_encoded_once_a_step_and_the_towers_see_each_image_once(small, monkeypatch):
    from robustvlm_lite.prompts import PromptedCLIP

    calls = {"text": 0, "image": 0}
    for key, name in (("text", "text_tail"), ("image", "image_tail")):
        real = getattr(PromptedCLIP, name)

        def counted(self, *args, _real=real, _key=key, **options):
            calls[_key] += 1
            return _real(self, *args, **options)

        monkeypatch.setattr(PromptedCLIP, name, counted)
    data = photos()
    for name, images in (("CAPT", 2 + 2), ("FAP", 2 + 2), ("APT", 2 + 1), ("CBA-FAPT", 2 + 1)):  # attack, clean and attacked
        defense = build_prompts(name, small, NAMES)
        calls.update(text=0, image=0)
        defense.fit(data, attack=ATTACK, training=replace(SHORT, steps=2), progress=False)
        assert calls == {"text": 2, "image": 2 * images}, name


def test_what_the_frozen_model_says_is_kept_unless_images_never_come_twice(clip, small):
    for name, teacher in (("CAPT", None), ("CAPT", clip)):
        defense, batch = in_step(name, clip, teacher=teacher)
        *_, frozen = reference(defense, batch)
        close(defense.kept(batch)["logits"], frozen)
        batch.task.frozen = {}
        close(defense.kept(batch)["logits"], frozen)
    seen = []

    def watched(objective, x, **options):
        seen.append(x)
        return ATTACK(objective, x, **options)

    data = photos(4)
    augmented = replace(SHORT, augment=True, steps=2)
    build_prompts("CAPT", small).fit(data, attack=watched, training=augmented, progress=False)
    levels = [(x * 255 - (x * 255).round()).abs().max() for x in seen]
    assert not torch.equal(*seen) and max(levels) < 1e-3, "8-bit crops, another one each time"


def test_a_run_that_gives_every_image_the_same_answer_is_marked(small):
    defense = trained("FAP", small)
    still, moved = {"ce": math.log(4), "divergence": 1e-5}, {"ce": 0.4, "divergence": 0.3}
    defense.history = [still] * 160
    assert defense.collapsed(4) == 49 and defense.collapsed(9) is None
    defense.history = [still] * 49 + [moved] * 111
    assert defense.collapsed(4) is None, "fifty in a row"
    assert trained("APT", small).collapsed(4) is None, "its loss does not show it"
    defense.history = [moved] * 12 + [still] * 6
    assert defense.collapsed(4) == 17, "a third of a short run"
    defense.history = [moved] * 13 + [still] * 5
    assert defense.collapsed(4) is None


@pytest.mark.parametrize("name", ["FAP", "TRADES", "CAPT", "CBA-FAPT (no maps)", "CBA-FAPT (FAP's loss)", "CBA-FAPT (adversarial only)"])
def test_what_is_kept_of_a_step_is_a_plain_divergence_and_a_plain_cross_entropy(name, clip):
    """Whatever the loss weighs them by: the detector of collapse and the figures compare methods by them."""
    defense, batch = in_step(name, clip)
    terms = defense.losses(batch)
    clean, adv, z, z_adv, _ = reference(defense, batch)
    plain, weighed = kl(clean, adv).mean().item(), ((F.cosine_similarity(z, z_adv) + 1) * kl(clean, adv)).mean().item()
    assert batch.notes["divergence"] == pytest.approx(plain, rel=1e-6) and abs(weighed - plain) > 1e-3 * plain
    kept = {k: v.item() for k, v in terms.items()} | batch.notes
    assert kept["ce"] == pytest.approx(F.cross_entropy(clean, batch.y).item(), rel=1e-6)


def test_gradient_shares_are_ratios_of_lengths(clip):
    defense, batch = in_step("CBA-FAPT", clip)
    terms, parameters = defense.losses(batch), defense.learned()
    shares = gradient_shares(terms, parameters)

    def length(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm().item()

    total = length(sum(terms.values()))
    assert shares == pytest.approx({k: length(v) / total for k, v in terms.items()}, rel=1e-6)
    assert shares["taa"] > 0 and shares["vaa"] > 0
