"""What the build writes from the cards: every value from a card, stale cards marked, nothing typed."""

import re

import pytest
import site_tables
import yaml
from site_pages import FROM_CARDS

from robustvlm_lite import verdicts
from robustvlm_lite.cards import committed, is_stale
from robustvlm_lite.runtime import PACKAGE, chapters


def row(**other):
    place = {"method": "A<B>", "dataset": "d", "attack": "pgd-20", "eps_255": 1.0, "metric": "robust_acc", "n": 10}
    return place | {"value": 0.25, "ci95": [0.125, 0.5], "image_forwards": 3, "image_backwards": 2, "extra": {}} | other


@pytest.fixture
def cards(monkeypatch):
    """One card of the present code and one of other code."""
    monkeypatch.setattr(site_tables, "is_stale", lambda card: card["profile"] == "small")
    monkeypatch.setattr(verdicts, "is_stale", lambda card: card["profile"] == "small")
    made = {"commit": "c" * 40, "dirty": False, "device": "cpu", "wall_s": 150.0}
    same = {"chapter": "01_clip", "seed": 0, "parameters": {}, "claims": [], "provenance": made}
    return {
        "01_clip-tiny": same | {"profile": "tiny", "rows": [row(), row(metric="map_iou", value=0.4567, ci95=[0.4, 0.5])]},
        "01_clip-small": same | {"profile": "small", "rows": [row(eps_255=0.5)]},
    }


def test_every_row_stands_in_the_table_with_its_card(cards):
    text = site_tables.all_rows(cards)
    body = re.findall(r"<tr>(.*?)</tr>", text)[1:]
    assert len(body) == 3 and all(f"cards/01_clip-{p}/card.json" in r for p, r in zip(("tiny", "tiny", "small"), body, strict=True))
    assert [site_tables.STALE in r for r in body] == [False, False, True]
    assert "A&lt;B&gt;" in body[0] and "25.0&nbsp;% (12.5–50.0)" in body[0] and 'data-value="0.25"' in body[0]
    assert "0.457 (0.4–0.5)" in body[1] and "<td>0.5</td>" in body[2]
    assert text.count("data-filter") == len(site_tables.SEARCHED)


def test_stale_cards_are_marked_wherever_a_card_is_named(cards):
    for text in (site_tables.committed_cards(cards), site_tables.cards_line("01_clip", cards)):
        fresh, stale = text.index("tiny/card.json"), text.index("small/card.json")
        assert fresh < stale and site_tables.STALE not in text[:stale] and site_tables.STALE in text[stale:]
    assert "none yet" in site_tables.cards_line("02_attacks", cards)


def claim(id, profile="tiny"):
    place = {"chapter": "01_clip", "paper": "P", "where": "Table 1", "published": "42 %", "profile": profile}
    return {"id": id, "statement": f"states {id}"} | place


def test_claims_have_a_verdict_a_card_or_a_price(cards, monkeypatch):
    monkeypatch.setattr(verdicts, "load_claims", lambda **_: [claim("A"), claim("B", "paper"), claim("C")])
    cards["01_clip-tiny"]["claims"] = [{"id": "A", "verdict": "reproduced", "why": "."}]
    cards["01_clip-small"]["claims"] = [{"id": "B", "verdict": "not_tested", "why": "Not tested: it needs paper."}]
    monkeypatch.setattr(site_tables.estimate, "estimate", lambda card, to: type("Priced", (), {"hours": 2.5}))
    a, b, c = re.findall(r"<tr>(.*?)</tr>", site_tables.claims(cards))[1:]
    assert "verdict-reproduced" in a and "cards/01_clip-tiny/card.json" in a and "../notebooks/01_clip.html" in a
    assert "Not tested: it needs paper." in b and "2.5 GPU hours" in b
    assert "no card yet" in c and "GPU" not in c
    counts = site_tables.verdict_counts(cards)
    assert "3 claims of the papers:" in counts and "own" not in counts
    assert "not tested</span> 2" in counts and "reproduced</span> 1" in counts


@pytest.mark.parametrize("hours, told", [(2.54, "2.5 GPU hours"), (0.5, "30 GPU minutes"), (0.01, "36 GPU seconds")])
def test_hours_are_told_in_a_unit_that_fits(hours, told):
    assert site_tables._hours(hours) == told


def test_bibtex_is_that_of_the_citation_file():
    citation = {"authors": [{"name": "the x authors"}], "title": "T", "version": "1.2"}
    assert "author = {{the x authors}}" in (text := site_tables.bibtex(citation, "https://x")) and "url = {https://x}" in text
    assert "doi" not in text and "doi = {10.1/2}" in site_tables.bibtex(citation | {"doi": "10.1/2"}, "https://x")


@pytest.mark.parametrize("name", FROM_CARDS)
def test_the_books_cards_fill_every_table(name):
    assert "<" in getattr(site_tables, name)(committed())


def test_the_gallery_has_a_tile_for_each_chapter_of_the_toc():
    toc = yaml.safe_load((PACKAGE.parent / "_toc.yml").read_text())
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    listed = [f.removeprefix("notebooks/") for f in files if f.startswith("notebooks/")]
    text = site_tables.gallery(toc["parts"], {listed[0]: ("pictures/x.png", 'a "b"')})
    assert re.findall(r'href="../notebooks/(\w+).html"', text) == listed and set(listed) <= set(chapters())
    assert '<img src="pictures/x.png" alt="a &quot;b&quot;"' in text and text.count("<img") == 1


def test_stale_is_what_the_cards_say():
    for name, card in committed().items():
        assert (site_tables.STALE in site_tables.cards_line(card["chapter"], {name: card})) == is_stale(card)
