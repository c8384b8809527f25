"""The losses of CBA-FAPT on maps: written out image by image, finite differences, and choices that are refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, SPECS, images, prompted, toy_clip
from toy_tuning import close, in_step

from robustvlm_lite.attention import (
    as_distribution,
    bidirectional_map,
    map_divergence,
)
from robustvlm_lite.clip import ZeroShotCLIP
from robustvlm_lite.defenses import build_prompts, gradient_shares
from robustvlm_lite.defenses.cba_fapt import FULL, Choices
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.runtime import UserError

Y = torch.tensor([2, 0, 2])


@pytest.fixture(scope="module")
def clip(register) -> ZeroShotCLIP:
    return toy_clip(register, "toy-cba")


def by_hand(defense, batch):
    """(L_VAA, L_TAA), weighted, with one backward pass an image."""
    c, model, sides = defense.config, batch.task.model, []
    heads = [t.resblocks[-1].attn.num_heads for t in (defense.clip.visual.transformer, defense.clip.model.transformer)]
    for x in (batch.x, batch.x_adv):
        rows = []
        for i, label in enumerate(batch.y.tolist()):
            image, text = model.image_tail(x[i : i + 1]), model.text_tail()
            z, own = F.normalize(model.head_image(image.o, image.r), dim=1), text.o[[label]]
            every = F.normalize(model.head_text(text.o, text.r), dim=1)
            of = int((z @ every.T).argmax()) if c.score == "predicted" else label
            own = text.o[[of]]
            z_t = F.normalize(model.head_text(own, text.r[[of]]), dim=1)
            score = c.score_scale * (z * z_t).sum()
            if c.score == "logprob":
                rest = [k for k in range(len(every)) if k != of]
                logits = model.clip.logit_scale * torch.cat([z @ z_t.T, z @ every[rest].T], dim=1)
                score = logits.log_softmax(1)[0, 0]
            w_v, w_t = torch.autograd.grad(score, (image.o, own), create_graph=True)
            one = text.take(torch.tensor([of]))
            a_v = bidirectional_map(image, w_v, heads[0], c.fusion)[image.content]
            a_t = bidirectional_map(one, w_t, heads[1], c.fusion)
            a_v = {"none": a_v, "l1": a_v / a_v.abs().sum(), "l2": a_v / a_v.norm()}[c.length]
            rows.append((a_v, as_distribution(a_t, one.content, c.text_norm)[0]))
        sides.append(rows)
    stop = torch.Tensor.detach if c.stop_clean else lambda t: t
    pairs = list(zip(*sides, strict=True))
    vaa = sum((stop(a[0]) - b[0]).norm() for a, b in pairs) / len(pairs)
    taa = sum(map_divergence(stop(a[1])[None], b[1][None])[0] for a, b in pairs) / len(pairs)
    return c.beta * vaa, c.gamma * taa


VARIANTS = [
    {}, {"fusion": "F2"}, {"fusion": "F4", "text_norm": "N3"}, {"fusion": "F3", "text_norm": "N2"}, {"score": "logprob"},
    {"score_scale": 100.0}, {"length": "l1"}, {"length": "l2"}, {"stop_clean": True}, {"text_norm": "N5"},
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_map_losses_and_gradients_are_those_of_one_image_after_another(change, clip):
    """Labels that come twice in a batch included: each image has its own copy of its class's text."""
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, **change))
    terms, expected = defense.losses(batch), by_hand(defense, batch)
    for key, value in zip(("vaa", "taa"), expected, strict=True):
        close(terms[key].detach(), value.detach(), 1e-6)
        ours, theirs = (torch.autograd.grad(v, defense.learned(), retain_graph=True) for v in (terms[key], value))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-5)


def test_maps_of_the_predicted_class(clip):
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score="predicted"))
    terms, expected = defense.losses(batch), by_hand(defense, batch)
    close(terms["vaa"].detach(), expected[0].detach(), 1e-6)


def test_maps_of_two_predicted_classes_have_a_finite_divergence(clip, monkeypatch):
    """Their names may differ in length; places that only one of them has are compared with the uniform share."""
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score="predicted"))
    assert len(set(batch.tail.content.sum(1).tolist())) > 1, "else the lengths would not be tested"
    other = torch.cat([torch.zeros(5), torch.full((5,), 3)]).long()  # "cat" for the clean images, "abyssinian" for the others
    monkeypatch.setattr(defense, "_classes", lambda features, batch: other)
    term = defense.losses(batch)["taa"]
    assert term.isfinite() and term > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(term, defense.learned()))


def test_second_order_gradients_match_finite_differences(clip):
    defense, batch = in_step("CBA-FAPT", clip, n=3)

    def value():
        fresh = defense.batch(batch.task, batch.index, batch.x, batch.y)
        fresh.x_adv = batch.x_adv
        terms = defense.losses(fresh)
        return terms["vaa"] / FULL.beta + terms["taa"] / FULL.gamma

    named = dict(defense.learner.named_parameters())
    gradients = torch.autograd.grad(value(), list(named.values()))
    for (key, p), gradient in zip(named.items(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double()
        ends, h = [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * h * direction)
            ends.append(value().item())
            with torch.no_grad():
                p.sub_(sign * h * direction)
        numeric, analytic = (ends[0] - ends[1]) / (2 * h), (gradient * direction).sum().item()
        assert analytic != 0 and abs(numeric - analytic) <= 1e-4 * abs(analytic) + 1e-9, key


def test_a_term_that_does_nothing_is_seen(clip):
    """A softmax over raw attributions (N4) is dead; the default is not, and neither is the image term."""
    shares = {}
    for norm in ("N1", "N4"):
        defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, text_norm=norm))
        shares[norm] = gradient_shares(defense.losses(batch), defense.learned())
    assert shares["N1"]["taa"] > 1e-6 and shares["N1"]["vaa"] > 1e-6
    assert shares["N4"]["taa"] < 0.1 * shares["N1"]["taa"]


def test_the_size_of_the_maps_is_kept_and_follows_the_scale(clip):
    sizes = []
    for scale in (1.0, 100.0):
        defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score_scale=scale))
        terms = defense.losses(batch)
        sizes.append((batch.notes["map"], terms["vaa"].item(), terms["taa"].item()))
    assert sizes[1][0] == pytest.approx(100 * sizes[0][0]) and sizes[1][1] == pytest.approx(100 * sizes[0][1], rel=1e-4)
    assert sizes[1][2] == pytest.approx(sizes[0][2], rel=1e-6), "a distribution has no scale"


def test_bad_choices_are_one_clear_line(clip, register):
    resnet = toy_clip(register, "toy-maps-rn", image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    tail = prompted(clip, SPECS["AdvVLP"]).image_tail(images(1))
    cases = {
        "CBA-FAPT: expected beta >= 0, got -0.1": lambda: Choices(beta=-0.1),
        "unknown fusion 'F5'; did you mean": lambda: Choices(fusion="F5"),
        "unknown text_norm 'n1'; known: N1": lambda: Choices(text_norm="n1"),
        "unknown score 'labels'; did you mean 'label'?": lambda: Choices(score="labels"),
        "unknown base 'FAP'; known: ce_ce, fap": lambda: Choices(base="FAP"),
        "expected score_scale > 0, got 0": lambda: Choices(score_scale=0),
        "unknown fusion 'F6'": lambda: bidirectional_map(tail, tail.o, 4, "F6"),
        "unknown text normalization 'N6'": lambda: as_distribution(tail.q, tail.q > 0, "N6"),
        "CBA-FAPT: expected a vision transformer, whose tokens it maps, got toy-maps-rn": (
            lambda: build_prompts("CBA-FAPT", resnet, NAMES, spec=PromptSpec(n_text=2))),
    }  # fmt: skip
    for line, call in cases.items():
        with pytest.raises(UserError) as error:
            call()
        assert line in str(error.value) and "\n" not in str(error.value), error.value
