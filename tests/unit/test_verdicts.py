"""The book's verdict on a claim: which card speaks for it, and every committed card held to its own examples."""

import json
from copy import deepcopy

import pytest
from test_cards import row

from robustvlm_lite import cards, verdicts
from robustvlm_lite.cards import Card, load_card

CLAIMS = [{"id": id, "chapter": "04_tga_zsr"} for id in ("A", "B", "C")]


def said(profile, chapter="04_tga_zsr", **decided):
    claims = [{"id": id, "verdict": verdict, "why": f"{profile} said so"} for id, verdict in decided.items()]
    return {"chapter": chapter, "profile": profile, "claims": claims, "provenance": {"code_sha256": "of old"}}


@pytest.fixture
def books(monkeypatch):
    """verdict and card of each claim, for cards given by name."""
    monkeypatch.setattr(verdicts, "load_claims", lambda **_: CLAIMS)
    return lambda **named: {v.claim["id"]: (v.verdict, v.card) for v in verdicts.book_verdicts(named)}


def test_a_card_that_tests_a_claim_goes_before_one_that_does_not(books):
    found = books(a=said("tiny", A="partly", B="not_tested"), b=said("small", A="not_tested", B="not_tested"))
    assert found == {"A": ("partly", "a"), "B": ("not_tested", "b"), "C": ("not_tested", "")}


def test_a_larger_profile_goes_first_and_of_equal_ones_the_least_favorable(books):
    tiny, seeds = said("tiny", A="not_reproduced"), [said("small", A=v) for v in ("reproduced", "partly")]
    assert books(a=tiny, b=seeds[0], c=seeds[1])["A"] == ("partly", "c")
    assert books(b=seeds[1], c=seeds[0])["A"] == ("partly", "b")
    assert books(a=said("paper", "05_capt", A="reproduced"), b=tiny)["A"] == ("not_reproduced", "b")


def test_a_card_of_other_code_is_stale(monkeypatch):
    monkeypatch.setattr(verdicts, "load_claims", lambda **_: CLAIMS[:1])
    assert verdicts.book_verdicts({"a": said("tiny", A="partly")})[0].stale
    monkeypatch.setattr(cards, "code_sha256", lambda *_: "of old")
    assert not verdicts.book_verdicts({"a": said("tiny", A="partly")})[0].stale
    assert not verdicts.book_verdicts({})[0].stale


# ---- contradictions


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folder of a card of two seeds, in which no claim is decided."""
    monkeypatch.setattr(verdicts, "load_claims", lambda **_: [])
    rows = [row([1, 1, 0, 0], seed=0), row([1, 0, 0, 0], seed=1)]
    Card("04_tga_zsr", "tiny", 0, {"eps_255": 1.0}, device="cpu").add(rows).write(tmp_path)
    return tmp_path


def test_seeds_are_not_taken_for_each_other(written):
    assert verdicts.contradictions(written) == []


@pytest.mark.parametrize("field, value", [("value", 0.51), ("n", 5), ("ci95", [0.1, 0.9])])
def test_every_number_of_an_accuracy_is_held_to_the_examples(written, field, value):
    card = load_card(written)
    changed = deepcopy(card)
    changed["rows"][1][field] = value
    if field == "value":
        changed["rows"][1]["ci95"] = [0.0, 1.0]
    (written / "card.json").write_text(json.dumps(changed))
    (found,) = verdicts.contradictions(written)
    assert "TeCoA toy/gray pgd-20 1.0 robust_acc says" in found and "give 0.25 [" in found


def test_a_verdict_that_no_claim_asks_for_is_found(written):
    card = load_card(written)
    card["claims"] = [{"id": "GONE", "verdict": "partly", "why": "."}]
    (written / "card.json").write_text(json.dumps(card))
    assert "GONE says partly, its examples give nothing" in verdicts.contradictions(written)[0]


@pytest.mark.parametrize("name", sorted(cards.committed()))
def test_a_committed_card_follows_from_its_examples(name):
    assert not (found := verdicts.contradictions(cards.shelf() / name)), "\n".join(found)
