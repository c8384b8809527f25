"""Choices tried one at a time: tuned as the chapter tunes, compared in pairs, told apart only where an interval says so."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from toy_tuning import photos

from robustvlm_lite import book, data, runtime
from robustvlm_lite.book import choices, tuning
from robustvlm_lite.defenses import PROMPT_METHODS, capt

SIZES = {
    "model": "nano", "backbone": "none", "shots": 2, "seeds": [1], "eps_255": 1.0, "pgd": "pgd-2", "train": [["toy", 0]],
    "tuning": {"steps": 2, "batch": 4, "rate": 7.0},
}  # fmt: skip


@pytest.fixture
def home_of(random_clip, tmp_path, monkeypatch):
    """home_of(chapter): a toy run inside the protocol of a chapter, on 16 random images of the toy's classes."""
    monkeypatch.setattr(runtime, "profile", lambda chapter, profile: SimpleNamespace(**SIZES))
    monkeypatch.setenv("ROBUSTVLM_OUT", str(tmp_path))
    monkeypatch.setattr(data, "load", lambda name, split="test", **_: photos(16, 64, seed=len(split), name=name))
    monkeypatch.setattr(runtime, "chapters", lambda: {"11_prompt_choices": {"parameters": {}}})
    monkeypatch.setattr("robustvlm_lite.book.run.check_resources", lambda *_: None)
    monkeypatch.setattr("robustvlm_lite.book.run.load_clip", lambda *_, **__: copy.deepcopy(random_clip))
    run = book.start("11_prompt_choices", n=0, steps=0)
    return lambda chapter: choices.home(run, chapter, "toy", 8)


def test_a_home_tunes_as_its_chapter_does_and_measures_for_the_page(home_of):
    at = home_of("05_capt")
    assert tuning.protocol(at.run) == "05_capt-tiny" and at.page.card.as_dict()["chapter"] == "11_prompt_choices"
    wide = capt.Choices(weight=6.0)
    tuned = at.tune([{"name": "CAPT"}, {"name": "CAPT", "label": "λ = 6", "config": wide}], [1, 2])
    assert [[d.name for d in of] for of in tuned.values()] == [["CAPT", "λ = 6"]] * 2
    assert tuned[1][1].config.weight == 6.0 and tuned[1][0].config == PROMPT_METHODS["CAPT"].config
    rows = at.measure(tuned)
    assert {(r.method, r.extra["seed"], r.metric) for r in rows} >= {("λ = 6", s, m) for s in (1, 2) for m in choices.METRICS.values()}
    assert len(at.page.card.as_dict()["rows"]) == len(rows)
    other = at.at(4.0)
    assert (other.eps_255, at.eps_255) == (4.0, 1.0) and other.page is at.page and "4/255" in other.asked()
    plan = tuning.plan(at.unsearched(100.0).run, "AdvPT", photos(8, 64))
    assert plan.lr == pytest.approx(100 * PROMPT_METHODS["AdvPT"].style.lr)
    assert tuning.plan(at.run, "AdvPT", photos(8, 64)).lr == pytest.approx(7 * PROMPT_METHODS["AdvPT"].style.lr)


def test_chapter_06_asks_about_both_halves(home_of):
    at = home_of("06_cba_fapt")
    assert set(at.scenario.tests) == {"base", "new"}
    assert len(at.scenario.train(1).class_names) < len(photos().class_names)


def test_effects_are_paired_differences_with_the_seeds_averaged(home_of):
    at = home_of("05_capt")
    rows = at.measure(at.tune([{"name": "CAPT"}, {"name": "TRADES"}], [1, 2]))
    found = choices.effects(at, rows, "CAPT")
    assert set(found) == {"TRADES"} and list(found["TRADES"]) == [("all", "clean"), ("all", "attacked")]

    def mean(method, metric):
        return np.mean([r.value for r in rows if (r.method, r.metric) == (method, metric)])

    for (_, head), (diff, low, high) in found["TRADES"].items():
        assert diff == pytest.approx(mean("TRADES", choices.METRICS[head]) - mean("CAPT", choices.METRICS[head])) and low <= diff <= high
    html = str(choices.effects_table(found, rows, at, "CAPT", caption="One choice.")).replace("\u00a0", " ")
    assert f"{100 * mean('CAPT', 'clean_acc'):.1f}" in html and book.points(found["TRADES"]["all", "clean"]).replace("\u00a0", " ") in html


def test_only_what_an_interval_tells_apart_is_named():
    up, none, down = (0.1, 0.02, 0.2), (0.1, -0.02, 0.2), (-0.1, -0.2, -0.01)
    found = {
        "a": {("base", "clean"): none, ("base", "attacked"): up, ("new", "attacked"): none},
        "b": {("base", "clean"): down, ("base", "attacked"): none, ("new", "attacked"): none},
        "c": {("base", "clean"): none, ("base", "attacked"): none, ("new", "attacked"): down},
    }
    assert choices.sure(found, "attacked") == ["a", "c"] and choices.sure(found, "clean") == ["b"]
