"""A-TPT's views, masks, weights and presets, against the rooms' own functions called view by view; and its way into results."""

import math
from dataclasses import replace

import pytest
import torch
from toy_prompts import NAMES, toy_clip

from robustvlm_lite import attacks, attention, data, views
from robustvlm_lite.clip import load_clip
from robustvlm_lite.clip import random_clip as make_clip
from robustvlm_lite.defenses import TestTime, a_tpt
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.practitioner import evaluate_own
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel

KEYS = [(0, "toy", "views", i) for i in range(2)]
PAPER, RELEASED = (replace(r.fewer(6), chosen=3) for r in (a_tpt.PAPER, a_tpt.RELEASED))


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, name="toy-a-tpt")


@pytest.fixture(scope="module")
def x():
    return (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 255).round() / 255


def look(clip, recipe, x):
    return TestTime(clip, "A-TPT (as reported)", recipe).classifier(NAMES).keyed(KEYS).look(x)


def drawn(x, recipe):
    """(base, mix) from the same generators, without the defense."""
    generators = [generator(*key) for key in KEYS]
    base = views.base_views(x, generators, recipe.n_views - 1, recipe.base)
    return base, views.augmix(base, generators).mix


def text_of(clip):
    return clip.text_features(NAMES, ("a photo of a {}.",))


MIXED = [PAPER, replace(PAPER, base="rrc_flip"), replace(PAPER, guide="gar"), replace(RELEASED, quirk_leak=False)]


@pytest.mark.parametrize("recipe", MIXED)
def test_views_are_mixed_less_where_their_own_map_is_high(clip, x, recipe):
    seen, (base, mix) = look(clip, recipe, x), drawn(x, recipe)
    torch.testing.assert_close(seen.views[:, 0], x)
    for i in range(2):
        for v in range(5):
            m = attention.guide(clip, base[i, v][None], text_of(clip), recipe.guide)
            picture = attention.guide_pixels(clip, m, recipe.guide)[0]
            mask = seen.mask[i, v]
            assert picture[mask].min() >= picture[~mask].max() - 1e-4  # nothing outside is higher
            if not recipe.quirk_quantile:
                assert mask.sum() == math.ceil(0.2 * 32 * 32)
            lam = torch.where(mask, 0.2, 0.8)
            torch.testing.assert_close(seen.views[i, v + 1], (1 - lam) * base[i, v] + lam * mix[i, v])


def test_controls_protect_as_much_elsewhere(clip, x):
    paper, random, inverted = (look(clip, replace(PAPER, guide=g), x).mask for g in ("paper", "random", "inverted"))
    count = math.ceil(0.2 * 32 * 32)
    assert (paper.sum((2, 3)) == count).all() and (random.sum((2, 3)) == count).all() and (inverted.sum((2, 3)) == count).all()
    assert not (paper & inverted).any()
    assert (random[0, 0] != random[0, 1]).any() and (random != paper).any()
    uniform = look(clip, replace(PAPER, guide="uniform"), x)
    base, mix = drawn(x, PAPER)
    torch.testing.assert_close(uniform.views[:, 1:], (1 - 0.68) * base + 0.68 * mix)


def test_calm_views_weigh_more(clip, x):
    seen = look(clip, PAPER, x)
    for i in range(2):
        near = seen.views[i][seen.chosen[i]]
        maps = torch.stack([attention.guide(clip, v[None], text_of(clip), "paper")[0] for v in near])
        grids = attention.minmax(maps, 1e-8).view(len(near), 4, 4)
        steps = [[(g[a + 1] - g[a]).abs().sum() + (g[:, a + 1] - g[:, a]).abs().sum() for a in range(3)] for g in grids]
        variation = torch.stack([sum(each) for each in steps])
        want = torch.zeros(6, dtype=torch.float64).scatter(0, seen.chosen[i], (-variation).softmax(0))
        torch.testing.assert_close(seen.weights[i], want, rtol=1e-5, atol=1e-8)
        p = (clip.logit_scale * seen.features[i] @ seen.text[i].T).softmax(1)
        torch.testing.assert_close(seen.logits[i].exp(), (want[:, None] * p).sum(0), rtol=1e-5, atol=1e-8)


def test_presets_say_what_each_source_says():
    p, r = a_tpt.PAPER, a_tpt.RELEASED
    assert (p.base, p.guide, p.answer, p.as_logits) == ("flip_center", "paper", "tv", False)
    assert (r.base, r.guide, r.answer, r.as_logits) == ("rrc_flip", "released", "neighbors", True)
    assert not any(getattr(p, q) for q in vars(p) if q.startswith("quirk_"))
    assert all(getattr(r, q) for q in vars(r) if q.startswith("quirk_"))
    for recipe in (p, r):
        assert (recipe.n_views, recipe.chosen, recipe.r, recipe.lam_high, recipe.lam_low, recipe.lr) == (64, 6, 0.2, 0.2, 0.8, 5e-3)


def test_the_released_word_stands_in_the_template():
    assert a_tpt.with_word(RELEASED, "small/flowers102").template == "a flower photo of a {}."
    assert a_tpt.with_word(RELEASED, "small/pacs") == RELEASED


def test_a_resnet_takes_its_pools_attention_and_no_gar(register, x):
    name = register("a-tpt-resnet", image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None, head_width=32)
    resnet = make_clip(name)
    wide = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for recipe in (PAPER, RELEASED):
        assert TestTime(resnet, "A-TPT (as reported)", recipe).classifier(NAMES)(wide).isfinite().all()
    with pytest.raises(UserError, match="vision transformer for attention 'gar'"):
        TestTime(resnet, "A-TPT (as reported)", replace(PAPER, guide="gar"))


@pytest.fixture(scope="module")
def nano():
    return load_clip("nano", device="cpu")


def test_records_do_not_depend_on_batches_and_differ_by_seed(nano):
    images = data.load("photos/caltech", n=6)
    model = TestTime(nano, "A-TPT (as reported)", PAPER).classifier(images.class_names)
    attack = [(attacks.get_attack("pgd-2"), ThreatModel(1.0))]
    options = {"method": "A-TPT (as reported)", "surface": model.undefended(), "progress": False}
    one, other, third = (
        evaluate(model, images, attack, batch_size=b, seed=s, **options) for b, s in ((6, 0), (4, 0), (6, 1))
    )
    for a, b in zip(one, other, strict=True):
        for column in ("prediction", "prediction_8bit"):
            assert a.records[column].equals(b.records[column])
        assert torch.allclose(torch.tensor(a.records["margin"].to_pylist()), torch.tensor(b.records["margin"].to_pylist()), atol=1e-3)
    assert one[0].records["margin"] != third[0].records["margin"]


def test_robustvlm_evaluate_takes_it(tmp_path):
    card = evaluate_own(data="photos/caltech", defense="View ensemble", attack="pgd-1", n=3, out=str(tmp_path))
    assert card.is_file() and '"View ensemble"' in card.read_text()
