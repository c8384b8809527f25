"""Which rows of a card a rule reads: budgets, data sets, attacks, seeds, and rows of other metrics."""

import numpy as np
import pyarrow as pa
import pytest
from toy_cards import Toy, share

from robustvlm_lite.rules import parse
from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import paired_bootstrap


def test_the_budget_is_the_cards_unless_asked_and_several_are_averaged_per_image():
    toy = Toy(eps_255=2.0)
    for eps, k in ((1.0, 120), (2.0, 60), (4.0, 30)):
        toy.add("TeCoA", share(k), eps_255=eps)
        toy.add("CLIP", share(k - 30), eps_255=eps)
    assert toy.value('acc("TeCoA")') == 0.3
    assert toy.value('acc("TeCoA", eps_255=1)') == 0.6
    assert toy.value('acc("TeCoA", eps_255=(1, 2, 4))') == pytest.approx((0.6 + 0.3 + 0.15) / 3)
    gain = toy.value('diff(acc("TeCoA", eps_255=(2, 4)), acc("CLIP", eps_255=(2, 4)))')
    score = [(share(60, 200) * 1.0 + share(30)) / 2, (share(30) * 1.0 + share(0)) / 2]
    assert (gain, gain.lo, gain.hi) == pytest.approx(paired_bootstrap(*score))  # 200 images, not 400


def test_clean_accuracy_and_patterns_of_data_sets():
    toy = Toy().add("TeCoA", share(150), "none", 0.0).add("TeCoA", share(50, 100), "none", 0.0, "scenes/shape")
    toy.add("TeCoA", share(20))
    assert toy.value('acc("TeCoA", attack="none", dataset="toy/*")') == 0.75
    assert toy.value('acc("TeCoA", attack="none", dataset="scenes/shape")') == 0.5
    assert toy.value('acc("TeCoA", attack="none")') == 0.625  # data sets weigh equally
    assert toy.value('acc("TeCoA")') == 0.1


def test_differences_pair_within_data_sets_and_weigh_them_equally():
    toy = Toy()
    for method, a, b in (("TGA-ZSR", 120, 60), ("TeCoA", 100, 40)):
        toy.add(method, share(a)).add(method, share(b, 100), dataset="toy/b")
    gain = toy.value('diff(acc("TGA-ZSR"), acc("TeCoA"))')
    scores = [np.r_[share(a), share(b, 100)] for a, b in ((120, 60), (100, 40))]
    expected = paired_bootstrap(*scores, strata=["toy/a"] * 200 + ["toy/b"] * 100)
    assert (gain, gain.lo, gain.hi) == pytest.approx(expected) and gain == pytest.approx((0.1 + 0.2) / 2)


def test_only_data_sets_that_every_method_met_count():
    toy = Toy().add("TGA-ZSR", share(120)).add("TeCoA", share(100)).add("TGA-ZSR", share(10), dataset="toy/b")
    assert toy.value("a", a='acc("TGA-ZSR")', b='acc("TeCoA")') == 0.6
    assert toy.value('acc("TGA-ZSR")') == pytest.approx(0.325)


def test_the_strongest_attack_that_all_met():
    toy = Toy()
    for name, k in (("pgd-20", 100), ("pgd-5", 130), ("pgd-20x5", 90), ("pgd-100-paper", 150), ("l2-pgd-50", 170)):
        toy.add("TGA-ZSR", share(k), name)
    for name, k in (("pgd-20", 80), ("pgd-5", 110), ("pgd-100-paper", 140)):
        toy.add("TeCoA", share(k), name)
    assert toy.value('acc("TGA-ZSR")') == 0.45  # pgd-20x5
    assert toy.value("a", a='acc("TGA-ZSR")', b='acc("TeCoA")') == 0.5  # pgd-20, which both met
    assert toy.value('acc("TGA-ZSR", attack="pgd-5")') == 0.65
    assert toy.value('acc("TGA-ZSR", attack="l2-pgd-*")') == 0.85
    toy.add("TGA-ZSR", share(60), "autoattack-20").add("TGA-ZSR", share(50), "autoattack")
    assert toy.value('acc("TGA-ZSR", attack="autoattack*")') == 0.25  # without a number: the full attack


def test_several_seeds_are_averaged():
    toy = Toy().add("TeCoA", share(100), seed=0).add("TeCoA", share(120), seed=1)
    assert toy.value('acc("TeCoA")') == pytest.approx(0.55)


def test_a_difference_over_seeds_resamples_images():
    """Against a bootstrap written out. Three answers to one image agree, so drawing answers would be far too sure."""
    g = np.random.default_rng(0)
    right = {m: np.repeat((g.random(40) < p)[None], 3, axis=0) for m, p in (("TeCoA", 0.7), ("FARE", 0.4))}
    toy = Toy()
    for method, seeds in right.items():
        for seed, correct in enumerate(seeds):
            toy.add(method, correct, seed=seed)
    delta = right["TeCoA"].astype(float) - right["FARE"]
    images = np.quantile([delta[:, i].mean() for i in g.integers(0, 40, (4000, 40))], [0.025, 0.975])
    answers = np.quantile([delta.ravel()[i].mean() for i in g.integers(0, 120, (4000, 120))], [0.025, 0.975])
    ends = [toy.value(f'{end}(diff(acc("TeCoA"), acc("FARE")))') for end in ("lo", "hi")]
    assert ends == pytest.approx(list(images), abs=0.03) and ends[1] - ends[0] > 1.5 * (answers[1] - answers[0])


def test_a_worst_case_row_is_the_and_of_its_attacks():
    toy = Toy().add("TeCoA", share(100)).add("TeCoA", ~share(50), "cw-20")
    worst = dict(
        toy.rows[0], attack="worst", metric="robust_acc_worst", extra={"seed": 0, "attacks": ["pgd-20", "cw-20"]}
    )
    toy.rows.append(worst)
    assert toy.value('acc("TeCoA", attack="worst")') == 0.25


def read(metric, value, ci95, attack="none", eps_255=0.0, seed=0):
    """A card of one row of another metric than accuracy."""
    toy = Toy().add("A", share(10), attack="none", eps_255=0.0)
    place = {"method": "A", "dataset": "toy/a", "attack": attack, "eps_255": eps_255, "metric": metric, "n": 50}
    toy.rows.append(place | {"value": value, "ci95": ci95, "extra": {"seed": seed}})
    return toy


def test_a_row_of_another_metric_is_read_as_it_stands():
    toy = read("rouge_l_gain", 0.02, [0.01, 0.03], attack="worst", eps_255=0.5)
    expression = 'row("A", "rouge_l_gain", attack="worst", eps_255=0.5)'
    assert [toy.value(e) for e in (expression, f"lo({expression})", f"hi({expression})")] == [0.02, 0.01, 0.03]
    said = toy.decide(measure={"gain": expression}, reproduced="lo(gain) > 0")
    assert said["verdict"] == "reproduced"
    assert said["why"].startswith("Profile tiny, toy/a (n = 50): gain = 0.02 [0.01, 0.03].")


@pytest.mark.parametrize("change", [("0.5", "1.0"), ("rouge_l", "cider"), ('"A"', '"B"'), ("worst", "none")])
def test_a_row_that_is_not_there_is_not_tested(change):
    toy = read("rouge_l_gain", 0.02, [0.01, 0.03], attack="worst", eps_255=0.5)
    other = 'row("A", "rouge_l_gain", attack="worst", eps_255=0.5)'.replace(*change)
    assert toy.decide(measure={"gain": other}, reproduced="gain > 0")["verdict"] == "not_tested"


def test_rows_of_several_seeds_are_averaged():
    toy = read("step_ratio", 1.0, [0.9, 1.1])
    toy.rows.append(toy.rows[-1] | {"value": 1.2, "ci95": [1.1, 1.3], "extra": {"seed": 1}})
    assert toy.value('row("A", "step_ratio")') == pytest.approx(1.1)
    assert toy.value('hi(row("A", "step_ratio"))') == pytest.approx(1.2)


@pytest.mark.parametrize("wrong", ['row("A")', 'row("A", 3)', 'row("A", "m", color="red")', "row(acc, 'm')"])
def test_a_row_without_sense_is_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        parse({"asked": wrong}, "test")


def test_8bit_rows_do_not_count_as_another_seed():
    toy = Toy().add("TeCoA", share(100))
    at = toy.tables[0].schema.get_field_index("correct_8bit")
    toy.tables[0] = toy.tables[0].set_column(at, "correct_8bit", pa.array([True] * 200))
    toy.rows.append(dict(toy.rows[0], metric="robust_acc_8bit", value=1.0))
    assert toy.value('acc("TeCoA")') == 0.5


def test_an_attack_that_lacks_one_of_the_budgets_does_not_count():
    toy = (
        Toy()
        .add("TeCoA", share(100), "pgd-10")
        .add("TeCoA", share(80), "pgd-10", 2.0)
        .add("TeCoA", share(60), "pgd-20")
    )
    assert toy.value('acc("TeCoA", eps_255=(1, 2))') == pytest.approx(0.45)
    outcome = toy.decide(reproduced='acc("TeCoA", attack="pgd-20", eps_255=(1, 2)) > 0')
    assert outcome["why"] == "Not tested: no row of TeCoA, pgd-20 at ε = 1/255 and 2/255."
