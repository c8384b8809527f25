"""Costs against arithmetic done by hand: FLOPs of published architectures, passes carried from one profile to another."""

import json
from types import SimpleNamespace

import pytest

from robustvlm_lite import cards, estimate
from robustvlm_lite.estimate import Passes
from robustvlm_lite.runtime import UserError, chapters

# GFLOPs of (image, text), as open_clip's docs/model_profile.csv has them.
PUBLISHED = {"ViT-B-32": (8.82, 5.96), "ViT-B-16": (35.13, 5.96), "ViT-L-14": (162.03, 13.3)}


@pytest.mark.parametrize("model, gflops", PUBLISHED.items())
def test_flops_are_those_that_open_clip_publishes(model, gflops):
    found = estimate.tower(model)
    assert (found.image / 1e9, found.text / 1e9) == pytest.approx(gflops, rel=2e-3)


def test_flops_of_the_bundled_model_by_hand():
    """nano: 64 patches of 8x8 pixels and CLS, four blocks of width 128; 65 tokens."""
    block = 65 * (4 * 128**2 + 8 * 128**2) + 2 * 65 * 65 * 128
    assert estimate.tower("nano").image == 2 * (4 * block + 64 * 192 * 128 + 128 * 128)


def test_a_backbone_without_a_closed_form_is_refused():
    with pytest.raises(UserError, match="expected a vision transformer, got 'RN50'"):
        estimate.tower("RN50")
    with pytest.raises(UserError, match="got 'ViT-B-33'"):
        estimate.tower("ViT-B-33")


HERE = {"model": "nano", "tuned": [["a", 10], ["b", 10]], "unseen": [["c", 10]], "pgd": "pgd-10", "autoattack": "autoattack-2",
        "eps_grid": [1.0, 2.0], "training": {"steps": 3, "batch": 4}, "train_live": ["T", "U"]}  # fmt: skip
THERE = {"model": "ViT-B-32", "tuned": [["d", 40]], "unseen": [["e", 20], ["f", 30]], "pgd": "pgd-100-paper",
         "autoattack": "autoattack-4", "eps_grid": [1.0, 2.0, 3.0], "training": {"steps": 5, "batch": 6},
         "train_live": ["T"]}  # fmt: skip


def cell(method="T", dataset="a", attack="pgd-10", eps_255=1.0, forwards=7, backwards=5, metric="robust_acc", **extra):
    passes = {"image_forwards": forwards, "image_backwards": backwards}
    place = {"method": method, "dataset": dataset, "attack": attack, "eps_255": eps_255, "metric": metric}
    return place | passes | {"extra": extra}


def card(*rows):
    return {"chapter": "99", "profile": "tiny", "rows": list(rows)}


@pytest.fixture
def profiles(monkeypatch):
    sizes = {"tiny": HERE, "paper": THERE}
    monkeypatch.setattr(estimate, "profile", lambda chapter, name: SimpleNamespace(**sizes[name]))


toy = pytest.mark.usefixtures("profiles")


@toy
@pytest.mark.parametrize(
    "row, factor",
    [
        (cell(), 4 * 10),  # d of 40 images in the place of a of 10, 100 steps in the place of 10
        (cell(attack="none"), 4),
        (cell(attack="cw-10"), 4 * 10),  # as many steps as pgd: it follows pgd
        (cell(attack="fgsm"), 4),
        (cell(attack="autoattack-2"), 4 * (3 * 4 + 200) / (3 * 2 + 100)),  # three gradient attacks, then 50 queries a step
        (cell(dataset="b"), 0),  # nothing stands in the second place
        (cell(dataset="c"), 5 * 10),  # e and f, 50 images, in the place of c
        (cell(dataset="elsewhere", attack="none"), 1),
        (cell(method="U"), 0),  # trained here, neither trained nor bundled there
        (cell(method="CLIP"), 4 * 10),
    ],
)
def test_a_cell_is_carried_over_by_images_and_steps(row, factor):
    trained = [cell(m, metric="train_s", batch=2) for m in "TU"]
    got = estimate.carried(card(row, *trained), "paper")
    assert (got.forwards, got.backwards) == pytest.approx((7 * factor, 5 * factor))


@toy
def test_a_curve_grows_with_the_number_of_budgets():
    curve = [cell(eps_255=eps) for eps in (1.0, 2.0)]
    assert estimate.carried(card(*curve), "paper").forwards == 2 * 7 * 4 * 10 * 3 / 2
    repeats = [cell(metric=metric) for metric in ("robust_acc", "robust_acc_8bit", "robust_acc_worst")]
    assert estimate.carried(card(*repeats), "paper").forwards == 7 * 4 * 10


@toy
def test_the_first_images_of_a_set(monkeypatch):
    for sizes, attacked in ((HERE, 5), (THERE, 15)):
        monkeypatch.setitem(sizes, "attacked", attacked)
    assert estimate.carried(card(cell(dataset="a[:5]", attack="none")), "paper").forwards == 7 * 3
    assert estimate.carried(card(cell(dataset="c[:5]", attack="none")), "paper").forwards == 7 * 30 / 5


@toy
def test_a_data_set_taken_whole_has_no_known_size(monkeypatch):
    monkeypatch.setitem(THERE, "unseen", [["e", 0]])
    with pytest.raises(UserError, match="every data set of unseen"):
        estimate.carried(card(cell(dataset="c")), "paper")


@toy
def test_training_counts_the_methods_and_steps_of_the_profile():
    steps = [cell(m, metric="train_s", forwards=18, backwards=12, batch=3) for m in "TU"]
    assert estimate.training(card(*steps), "paper") == Passes(6 * 5 * 6, 4 * 5 * 6)  # 6 and 4 an image, 5 steps of 6
    assert estimate.training(card(*steps), "tiny") == Passes(2 * 6 * 3 * 4, 2 * 4 * 3 * 4)
    assert estimate.training(card(cell()), "paper") is None
    uncounted = cell(metric="train_s", forwards=0, backwards=0, batch=3)
    assert estimate.training(card(uncounted), "paper") is None


@toy
def test_hours_and_growth_by_hand():
    steps = cell(metric="train_s", forwards=18, backwards=12, batch=3)
    made = card(cell(eps_255=1.0), cell(eps_255=2.0), cell(dataset="c", attack="none"), steps)
    est = estimate.estimate(made)
    curve = 4 * 10 * 3 / 2  # images, steps, budgets: what each of the two cells of the curve is multiplied by
    work = 2 * curve * (7 + 5) + 5 * (7 + 5)  # an attack's backward pass is one forward pass more
    assert est.evaluation_hours == pytest.approx(work * est.image / 1e13 / 3600)
    assert est.training_hours == pytest.approx((180 + 2 * 120) * est.image / 1e13 / 3600)
    assert est.hours == est.evaluation_hours + est.training_hours
    grown = estimate.growth(made)
    assert grown["data set"] == pytest.approx(est.evaluation_hours / 3)
    assert grown["budget"] == pytest.approx(2 * curve * 12 / 3 * est.image / 1e13 / 3600)
    assert grown["seed"] == est.hours


def test_text_is_cheap_once_and_dear_at_every_step():
    assert estimate.text_share("ViT-B-32", 47) == pytest.approx(47 * 5.96 / 8.82, rel=2e-3)


@toy
def test_a_chapter_without_a_clip_has_no_estimate(monkeypatch):
    monkeypatch.delitem(THERE, "model")
    with pytest.raises(UserError, match="profile paper of 99, got none"):
        estimate.estimate(card(cell()))


def test_the_largest_card_below_paper_is_carried():
    found = {name: {"chapter": "a", "profile": name} for name in ("tiny", "paper", "small")}
    assert estimate.nearest(found, "a")["profile"] == "small"
    assert estimate.nearest(found, "b") is None


@pytest.mark.parametrize("name", sorted(cards.committed()))
def test_the_books_own_cards_can_be_carried_to_themselves(name):
    """Under its own profile a card costs what it counted; under another it has a price, or a reason why it has none."""
    made = json.loads((cards.shelf() / name / "card.json").read_text())
    same, counted = estimate.carried(made, made["profile"]), estimate.evaluation(made)
    assert (same.forwards, same.backwards) == pytest.approx((counted.forwards, counted.backwards))
    for profile in chapters()[made["chapter"]]["profiles"]:
        try:
            assert estimate.estimate(made, profile).hours > 0
        except UserError as reason:
            assert "expected" in str(reason)


def test_what_no_card_counts_is_named():
    assert "64 views" in estimate.uncounted("07_a_tpt") and "tuned" in estimate.uncounted("05_capt")
    assert estimate.uncounted("04_tga_zsr") == estimate.uncounted("01_clip") == ""
