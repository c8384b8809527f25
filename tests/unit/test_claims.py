"""Verdicts by rule: the expression language, what it refuses, and the three-valued outcome. All numbers are toys."""

import numpy as np
import pyarrow as pa
import pytest
import yaml

from robustvlm_lite.cards import VERDICTS
from robustvlm_lite.claims import FIELDS, decide, load_claims
from robustvlm_lite.evaluate import _row
from robustvlm_lite.records import Cell, records_table
from robustvlm_lite.rules import Accuracy, Difference, compute, parse
from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import paired_bootstrap


class Toy:
    """A card with the accuracies that a test asks for, and the examples behind them."""

    def __init__(self, profile="tiny", **parameters):
        self.rows, self.tables = [], []
        self.profile, self.parameters = profile, {"eps_255": 1.0} | parameters

    def add(self, method, correct, attack="pgd-20", eps_255=1.0, dataset="toy/a", seed=0):
        correct = np.asarray(correct, dtype=bool)
        n = len(correct)
        records = records_table(
            **{"n": n, "method": method, "dataset": dataset, "attack": attack, "eps_255": eps_255, "seed": seed},
            **{"index": range(n), "label": 1, "prediction": correct.astype(int), "margin": correct - 0.5},
            **{
                "prediction_8bit": correct.astype(int),
                "linf_255": eps_255,
                "correct": correct,
                "correct_8bit": correct,
            },
        )
        metric = "clean_acc" if attack == "none" else "robust_acc"
        self.rows.append(_row(Cell(records, 0.0, 0, 0), metric, {}, {"seed": seed}).as_dict())
        self.tables.append(records)
        return self

    @property
    def card(self):
        return {"profile": self.profile, "parameters": self.parameters, "rows": self.rows}

    def value(self, expression, **measures):
        trees = parse(measures | {"asked": expression}, "test")
        return compute(trees, self.card, pa.concat_tables(self.tables))[0]["asked"]

    def decide(self, **claim):
        claim = {"id": "T1", "profile": "tiny", "measure": {}, "partly": "0 > 1"} | claim
        (outcome,) = decide([claim], self.card, pa.concat_tables(self.tables))
        assert outcome.pop("id") == "T1"
        return outcome


def share(k, n=200):
    """n verdicts of which the first k are right."""
    return np.arange(n) < k


TWO = Toy().add("TGA-ZSR", share(120)).add("TeCoA", share(100))


# ---- the language


def test_accuracy_difference_and_interval():
    assert TWO.value('acc("TGA-ZSR")') == 0.6
    gain = TWO.value('diff(acc("TGA-ZSR"), acc("TeCoA"))')
    assert isinstance(gain, Difference) and gain == pytest.approx(0.1)
    assert (gain, gain.lo, gain.hi) == paired_bootstrap(share(120), share(100))
    assert TWO.value("lo(gain)", gain='diff(acc("TGA-ZSR"), acc("TeCoA"))') == gain.lo > 0.05
    assert TWO.value('hi(diff(acc("TGA-ZSR"), acc("TeCoA")))') == gain.hi < 0.15


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('2 * acc("TGA-ZSR") - acc("TeCoA") / 2', 0.95),
        ('acc("TGA-ZSR") > 0.5 and not acc("TeCoA") > 0.5', True),
        ('acc("TGA-ZSR") < 0.5 or acc("TeCoA") <= 0.5', True),
        ('0.4 < acc("TeCoA") < 0.5', False),
        ('0.5 <= acc("TeCoA") < acc("TGA-ZSR")', True),
        ('-acc("TeCoA") + 1 >= 0.5', True),
        ('(acc("TeCoA") > 1 or acc("TGA-ZSR") > 1) and 1 > 0', False),
    ],
)
def test_arithmetic_and_logic(expression, expected):
    assert TWO.value(expression) == pytest.approx(expected)


@pytest.mark.parametrize(
    "expression",
    [
        '__import__("os").system("true")',
        "open('/etc/passwd')",
        "().__class__.__bases__[0]",
        'acc("TeCoA").images',
        "[x for x in (1, 2)]",
        "lambda: 1",
        "9 ** 9 ** 9",
        "1 if 1 else 2",
        "acc",
        "undefined > 1",
        '"acc"("TeCoA")',
        "(acc)",
        "acc(",
        "1; 2",
        "x := 1",
        'f"{1}"',
        "acc()",
        'acc("TeCoA", colour="red")',
        'acc("TeCoA", eps_255="two")',
        "acc(3)",
        'acc(acc("TeCoA"))',
        'acc(*("TeCoA",))',
        'acc(**{"method": "TeCoA"})',
        "1 == 1",
    ],
)
def test_anything_else_is_refused_before_it_is_computed(expression):
    with pytest.raises(UserError, match="^owner, rule: ") as error:
        parse({"rule": expression}, "owner")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rule",
    [
        'lo(acc("TeCoA")) > 0',
        'diff(acc("TeCoA"), 1) > 0',
        "1 / 0 > 1",
        '"text" > 0',
        "(1, 2) > 0",
        "diff(1) > 0",
        "lo() > 0",
    ],
)
def test_a_rule_without_meaning_names_its_claim(rule):
    with pytest.raises(UserError, match="claim T1: its rule cannot be computed"):
        TWO.decide(reproduced=rule)


def test_names_come_from_above_only():
    assert parse({"a": 'acc("x")', "b": "a > 0"}, "owner")
    with pytest.raises(UserError, match="got 'b'"):
        parse({"a": "b > 0", "b": "1"}, "owner")


# ---- which rows count


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


# ---- verdicts

GAIN = {"measure": {"tga": 'acc("TGA-ZSR")', "gain": 'diff(tga, acc("TeCoA"))'}, "partly": "gain >= 0.01"}


@pytest.mark.parametrize(
    ("k", "verdict"),
    [(140, "reproduced"), (104, "reproduced"), (102, "partly"), (101, "not_reproduced"), (80, "not_reproduced")],
)
def test_three_values(k, verdict):
    toy = Toy().add("TeCoA", share(100)).add("TGA-ZSR", share(k))
    assert toy.decide(reproduced="lo(gain) > 0", **GAIN)["verdict"] == verdict


def test_why_holds_the_numbers_the_scale_and_the_rule():
    gain = TWO.value('diff(acc("TGA-ZSR"), acc("TeCoA"))')
    why = TWO.decide(reproduced="lo(gain) > 0", **GAIN)["why"]
    assert why == (
        "Profile tiny, toy/a (n = 200): tga = 60.0 % (TGA-ZSR, pgd-20 at ε = 1/255); "
        f"gain = +10.0 points [{100 * gain.lo:.1f}, {100 * gain.hi:.1f}]. The rule for reproduced holds: lo(gain) > 0."
    )
    why = TWO.decide(reproduced="gain > 0.5", **GAIN | {"partly": "gain > 0.4"})["why"]
    assert why.endswith("Neither the rule for reproduced (gain > 0.5) nor that for partly (gain > 0.4) holds.")


def test_not_tested_names_what_is_missing():
    alone = Toy().add("TeCoA", share(100)).add("TGA-ZSR", share(100), eps_255=2.0)
    outcome = alone.decide(reproduced="lo(gain) > 0", **GAIN)
    assert outcome == {"verdict": "not_tested", "why": "Not tested: no row of TGA-ZSR, pgd-* at ε = 1/255."}
    apart = Toy().add("TeCoA", share(100)).add("TGA-ZSR", share(100), dataset="toy/b")
    assert "share no data set" in apart.decide(reproduced="lo(gain) > 0", **GAIN)["why"]
    unequal = Toy().add("TeCoA", share(100)).add("TGA-ZSR", share(100, 150))
    outcome = unequal.decide(reproduced="lo(gain) > 0", **GAIN)
    assert outcome["verdict"] == "not_tested" and "did not meet the same images" in outcome["why"]
    seeds = Toy().add("TeCoA", share(9)).add("TeCoA", share(9, 50), seed=1)
    assert "other images of toy/a" in seeds.decide(reproduced='acc("TeCoA") > 0')["why"]


def test_a_claim_that_needs_a_larger_profile_is_not_tested_on_a_smaller():
    options = {"reproduced": 'acc("TeCoA") > 0', "profile": "small"}
    assert TWO.decide(**options)["why"] == "Not tested: it needs the small profile and this card is tiny."
    assert Toy("paper").add("TeCoA", share(9)).decide(**options)["verdict"] == "reproduced"


# ---- the book's file


def test_the_books_claims_are_complete_and_every_rule_parses():
    claims = load_claims()
    ids = [claim["id"] for claim in claims]
    assert len(set(ids)) == len(ids) and {f"TGA-C{i}" for i in range(1, 10)} <= set(ids)
    assert all(str(claim[field]).strip() for claim in claims for field in FIELDS)
    assert load_claims(chapter="04_tga_zsr") and not load_claims(chapter="99_none")


METHODS = ["CLIP", "FT-clean", "FT-adv", "TeCoA", "PMG-AFT", "TGA-ZSR", "CE + L_AR"]
METHODS += ["TGA-ZSR (l1)", "TGA-ZSR (cos)", "Vision-guided", "Comp-TGA"]


def book_card(robust, clean):
    """A card with every method, attack and budget that the book's claims name; `robust` and `clean` give k of 200."""
    toy = Toy()
    for method in METHODS:
        toy.add(method, share(clean.get(method, 120)), "none", 0.0)
        for eps in (1.0, 2.0, 4.0):
            toy.add(method, share(int(robust.get(method, 60) / eps)), "pgd-20", eps)
        toy.add(method, share(robust.get(method, 60)), "autoattack-20", 1.0)
    return toy


def verdicts_of(toy):
    outcome = decide(load_claims(chapter="04_tga_zsr"), toy.card, pa.concat_tables(toy.tables))
    return {entry["id"]: entry["verdict"] for entry in outcome}


def test_the_papers_own_pattern_reproduces_every_claim():
    # Robust and clean accuracy in the order of the published tables.
    robust = {"CLIP": 2, "FT-clean": 2, "FT-adv": 56, "TeCoA": 56, "PMG-AFT": 64, "TGA-ZSR": 84, "CE + L_AR": 66}
    robust |= {"Comp-TGA": 92}
    clean = {"TGA-ZSR": 140, "TeCoA": 100, "CE + L_AR": 112, "Vision-guided": 90, "Comp-TGA": 139}
    assert set(verdicts_of(book_card(robust, clean)).values()) == {"reproduced"}


def test_a_flat_pattern_reproduces_none():
    found = verdicts_of(book_card({}, {}))
    assert set(found.values()) == {"not_reproduced"}


def test_the_re_evaluations_pattern_is_told_apart():
    # As in the independent re-evaluation: above TeCoA, level with PMG-AFT, and below it beyond the training radius.
    toy = book_card(
        {"CLIP": 7, "FT-clean": 7, "TeCoA": 50, "TGA-ZSR": 63, "PMG-AFT": 63, "CE + L_AR": 63}, {"TGA-ZSR": 140}
    )
    found = verdicts_of(toy)
    assert found["TGA-C1"] == "partly" and found["TGA-C4"] == "partly" and found["TGA-C8"] == "not_reproduced"


def test_an_empty_card_tests_nothing():
    outcome = decide(load_claims(), {"profile": "paper", "parameters": {}, "rows": []}, pa.table({}))
    assert {entry["verdict"] for entry in outcome} == {"not_tested"}
    assert all(entry["why"].startswith("Not tested: no row of ") for entry in outcome)


def test_verdict_words_are_the_cards():
    assert {"reproduced", "partly", "not_reproduced", "not_tested"} == set(VERDICTS)


def test_a_bad_claims_file_is_one_line(tmp_path):
    path = tmp_path / "claims.yml"
    with pytest.raises(UserError, match="no claims at"):
        load_claims(path)
    path.write_text("- id: [unclosed")
    with pytest.raises(UserError, match="is no YAML") as error:
        load_claims(path)
    assert "\n" not in str(error.value)
    path.write_text("claims: later")
    with pytest.raises(UserError, match="expected a list of claims"):
        load_claims(path)
    good = load_claims()[0]
    for change, message in (
        ({"where": None}, "claim TGA-C1 lacks where"),
        ({"profile": "huge"}, "claim TGA-C1 lacks a known profile"),
        ({"partly": "exec('1')"}, "claim TGA-C1, partly: "),
    ):
        bad = {k: v for k, v in (good | change).items() if v is not None}
        path.write_text(yaml.safe_dump([bad], sort_keys=False))
        with pytest.raises(UserError, match=message):
            load_claims(path)


def test_values_print_by_kind():
    assert isinstance(TWO.value('acc("TeCoA")'), Accuracy)
    why = TWO.decide(measure={"ratio": 'acc("TGA-ZSR") / acc("TeCoA")'}, reproduced="ratio > 1")["why"]
    assert "ratio = 1.200" in why
