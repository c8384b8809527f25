"""Verdicts by rule: the expression language, what it refuses, and the three-valued outcome. All numbers are toys."""

import pyarrow as pa
import pytest
import yaml
from toy_cards import TWO, Toy, share

from robustvlm_lite.cards import VERDICTS
from robustvlm_lite.claims import FIELDS, decide, load_claims
from robustvlm_lite.rules import Accuracy, Difference, parse
from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import paired_bootstrap

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
