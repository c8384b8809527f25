"""What the prompt chapters share inside a run: which training a profile asks for, tunings that are found again, tables."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from toy_tuning import photos
from train_prompts import best_rate

from robustvlm_lite import book, defenses, fewshot
from robustvlm_lite.attacks import get_attack
from robustvlm_lite.book import tuning
from robustvlm_lite.cards import Card
from robustvlm_lite.clip import load_clip
from robustvlm_lite.defenses import PROMPT_METHODS, PromptTuning, rates
from robustvlm_lite.fewshot import Summary
from robustvlm_lite.records import Row, Store
from robustvlm_lite.runtime import UserError, profile

SHORT = {"steps": 20, "batch": 8, "rate": 10.0}


def toy_run(clip, tmp_path, parameters=None, **sizes):
    sizes = {"shots": 2, "seeds": [1, 2], "backbone": "none"} | sizes
    run = {"parameters": {"eps_255": 1.0} | (parameters or {}), "seed": 0, "out": tmp_path, "load_clip": lambda: clip}
    run |= {"device": torch.device("cpu"), "chapter": "05_capt", "profile": "tiny"}
    run |= {"card": Card("05_capt", "tiny", 0, {"eps_255": 1.0}, device="cpu"), "store": Store(tmp_path / "cells")}
    return SimpleNamespace(sizes=SimpleNamespace(**sizes), **run)


@pytest.fixture
def clip(random_clip):
    return copy.deepcopy(random_clip)


def test_a_profile_shortens_the_papers_training_or_keeps_it(clip, tmp_path):
    data, paper = photos(12, 64), PROMPT_METHODS["CAPT"].style
    plan = tuning.plan(toy_run(clip, tmp_path, tuning=SHORT), "CAPT", data)
    assert (plan.steps, plan.batch, plan.epoch, plan.augment) == (20, 8, 2, False) and plan.lr == pytest.approx(10 * paper.lr)
    assert tuning.plan(toy_run(clip, tmp_path, {"steps": 3}, tuning=SHORT), "CAPT", data).steps == 3
    whole = tuning.plan(toy_run(clip, tmp_path), "CAPT", data)
    assert whole == paper.training(data, 2) and whole.augment and whole.steps == 100
    asked = tuning.plan(toy_run(clip, tmp_path, {"steps": 30}), "CAPT", data)
    assert (asked.steps, asked.epoch, asked.lr, asked.augment) == (30, 3, paper.lr, True), "the paper's training, cut"
    assert tuning.plan(toy_run(clip, tmp_path, tuning=SHORT), "FAP", data).lr == pytest.approx(0.035)


def test_a_tuning_is_found_again_unless_something_changed(clip, tmp_path, monkeypatch):
    calls, fit = [], PromptTuning.fit
    monkeypatch.setattr(PromptTuning, "fit", lambda self, *a, **k: calls.append(self.name) or fit(self, *a, **k))
    run, data = toy_run(clip, tmp_path, tuning=SHORT | {"steps": 2}), photos(8, 64)
    first = book.tune(run, "CAPT", clip, data, 1)
    again = book.tune(run, "CAPT", clip, data, 1)
    assert calls == ["CAPT"] and again.history == first.history and again.step_seconds == first.step_seconds
    assert all(torch.equal(v, first.state()[k]) for k, v in again.state().items())
    book.tune(run, "CAPT", clip, data, 2)
    book.tune(run, "CAPT", clip, photos(8, 64, seed=3), 1)
    run.parameters["eps_255"] = 2.0
    labelled = book.tune(run, "CAPT", clip, data, 1, label="CAPT, A2", config=PROMPT_METHODS["CAPT"].config.__class__(alpha="A2"))
    assert len(calls) == 4 and labelled.name == "CAPT, A2"
    teacher = copy.deepcopy(clip)
    with torch.no_grad():
        teacher.visual.proj.mul_(-1)
    book.tune(run, "CAPT", clip, data, 1, label="CAPT, A2", teacher=teacher)
    assert len(calls) == 5, "another teacher"


def test_hand_engineered_prompts_are_the_carrier_itself(clip, tmp_path):
    data = photos(8, 64)
    hep = book.tune(toy_run(clip, tmp_path, tuning=SHORT), "HEP", clip, data, 1)
    x = data.pixels()
    with torch.no_grad():
        expected = clip.classifier(data.class_names, data.templates)(x)
        assert hep.name == "HEP" and torch.equal(hep.classifier(data.class_names, data.templates)(x), expected)


def test_a_scenario_goes_into_the_card_once_a_seed(clip, tmp_path):
    run = toy_run(clip, tmp_path, tuning=SHORT | {"steps": 2})
    train, test = photos(16, 64), photos(8, 64, seed=5)
    scenario = fewshot.base_to_new(train, test, 1)
    tuned = {s: [book.tune(run, m, clip, scenario.train(s), s) for m in ("HEP", "FAP")] for s in run.sizes.seeds}
    rows = book.measure_scenario(run, scenario, tuned, get_attack("pgd-1"), 1.0)
    assert {(r.method, r.dataset, r.extra["seed"]) for r in rows} == {
        (m, f"toy:{part}", s) for m in ("HEP", "FAP") for part in ("base", "new") for s in (1, 2)
    }
    assert len(run.card.as_dict()["rows"]) == len(rows) == 2 * 2 * 2 * 3
    tuned[2][1].history = [{"ce": math.log(2), "divergence": 0.0}] * 60
    assert book.marked(tuned, 2) == {("FAP", 2)}


def test_the_table_of_a_scenario_shows_spread_and_collapsed_runs():
    parts = {"base": (0.8, 0.05), "new": (0.5, 0.1)}
    two = Summary("M", 3, parts, {k: (v[0] / 2, v[1]) for k, v in parts.items()}, (0.6, 0.0), (0.3, 0.0), (0.4, 0.01), 1)
    html = str(book.scenario_table([two], caption="c."))
    for text in ("base, natural", "80.0\u00a0±\u00a05.0", "25.0\u00a0±\u00a010.0", "40.0\u00a0±\u00a01.0", "1 of 3", "harmonic mean"):
        assert text in html, text
    nan = math.nan
    one = Summary("M", 1, {"all": (0.8, nan)}, {"all": (0.4, nan)}, (0.8, nan), (0.4, nan), (0.5, nan), 0)
    html = str(book.scenario_table([one], caption="c."))
    assert "harmonic" not in html and ">80.0<" in html and "0 of 1" in html


# --- a learning rate for each method


TRIALS = {  # method -> (rate, seed, clean, robust)
    "CAPT": [(3.0, 1, 0.6, 0.2), (3.0, 2, 0.6, 0.2), (10.0, 1, 0.9, 0.1), (10.0, 2, 0.5, 0.3), (30.0, 1, 0.4, 0.2), (30.0, 2, 0.4, 0.3)],
    "APT": [(3.0, 1, 0.5, 0.5), (10.0, 1, 0.6, 0.4), (30.0, 1, 0.7, 0.3)],
}


def searched(monkeypatch):
    trials = [dict(zip(("method", "rate", "seed", "clean", "robust"), (m, *t), strict=True)) for m, ts in TRIALS.items() for t in ts]
    facts = {"set": "toy", "held": 40, "eps_255": 2.0, "attack": "pgd-10", "seeds": [1, 2], "trials": trials}
    facts |= {"untuned": {"clean": 0.5, "robust": 0.1}}
    monkeypatch.setattr(rates, "rate_search", lambda base, protocol: facts if protocol == "05_capt-tiny" else {"trials": []})
    monkeypatch.setattr(defenses, "rate_search", rates.rate_search)


def test_a_method_takes_the_factor_that_was_searched_for_it(clip, tmp_path, monkeypatch):
    """By the mean over seeds of clean and robust accuracy, counted here by hand; of equal ones the smallest."""
    searched(monkeypatch)
    run = toy_run(clip, tmp_path, tuning=SHORT | {"rate": "searched"}, model="nano")
    assert tuning.plan(run, "CAPT", photos(12, 64)).lr == pytest.approx(10 * PROMPT_METHODS["CAPT"].style.lr)  # 0.4, 0.45, 0.325
    assert tuning.plan(run, "APT", photos(12, 64)).lr == pytest.approx(3 * PROMPT_METHODS["APT"].style.lr), "all score 0.5"
    with pytest.raises(UserError, match="no learning rate was searched for 'FAP' in 05_capt-tiny"):
        tuning.plan(run, "FAP", photos(12, 64))
    text = str(book.factors_table(run, ["CAPT", "APT"]))
    for cell in ("hand-written prompts", "3, 10, 30", "45.0", "70.0", "n = 40 held-back training images", "tunings a factor: 2"):
        assert cell in text
    one = str(book.factors_table(toy_run(clip, tmp_path, tuning=SHORT), ["FAP"]))
    assert "one for all methods, not searched" in one and "10" in one
    assert tuning.factor(toy_run(clip, tmp_path), "FAP") == 1.0, "a full training keeps the paper's rate"


@pytest.mark.parametrize("chapter, name", [(c, p) for c in ("05_capt", "06_cba_fapt") for p in ("tiny", "small")])
def test_every_method_of_a_searched_profile_has_its_trials(chapter, name):
    """The committed searches: the same grid and seeds for every method that a chapter tunes, and no end that still wins."""
    found, sizes = defenses.rate_search("nano", f"{chapter}-{name}"), profile(chapter, name)
    assert sizes.tuning["rate"] == "searched"
    assert found["base_sha256"] == load_clip("nano", device="cpu").weights_sha256, "the search was on other weights"
    assert (found["set"], found["eps_255"]) == (sizes.train[0][0], sizes.eps_255)
    assert {key: found[key] for key in ("steps", "batch")} == {key: sizes.tuning[key] for key in ("steps", "batch")}
    asked = [m for m in (*sizes.methods, *getattr(sizes, "general", []), *getattr(sizes, "components", [])) if m != "HEP"]
    for method in asked:
        trials = [t for t in found["trials"] if t["method"] == method]
        tried = sorted({t["rate"] for t in trials})
        assert {3.0, 10.0, 30.0} <= set(tried), method
        assert sorted((t["rate"], t["seed"]) for t in trials) == [(r, s) for r in tried for s in found["seeds"]]
        best = defenses.winner(defenses.scores(found, method))
        assert best in (1.0, 3000.0) or best not in (tried[0], tried[-1]), f"{method}: {best} wins at an end"


# --- several seeds


def test_an_interval_over_seeds_resamples_images(monkeypatch):
    """Against a bootstrap written out: whole images drawn with all their tunings. Drawing answers would claim too much."""
    g = np.random.default_rng(3)
    ease = g.random(60)  # easy and hard images: answers of several seeds to one image agree
    table = {m: np.stack([(ease + 0.1 * g.standard_normal(60)) > cut for _ in range(3)]) for m, cut in (("A", 0.4), ("B", 0.5))}
    rows = []
    for m, verdicts in table.items():
        for seed, correct in enumerate(verdicts):
            order = g.permutation(60)
            rows.append(Row(m, "toy:all", "pgd-1", 1.0, "robust_acc", 60, correct.mean(), (0, 1), extra={"seed": seed},
                            records=pa.table({"index": order, "correct": correct[order]})))  # fmt: skip
    diff, lo, hi = book.paired_over_seeds(rows, "A", "B", "robust_acc", "toy:all")
    delta = table["A"].astype(float) - table["B"]
    drawn = g.integers(0, 60, (4000, 60))
    by_image = np.quantile([delta[:, i].mean() for i in drawn], [0.025, 0.975])
    by_answer = np.quantile([delta.ravel()[i].mean() for i in g.integers(0, 180, (4000, 180))], [0.025, 0.975])
    assert diff == pytest.approx(delta.mean()) and (lo, hi) == pytest.approx(tuple(by_image), abs=0.012)
    assert hi - lo > 1.15 * (by_answer[1] - by_answer[0]), "else the test could not tell them apart"
    with pytest.raises(UserError, match="same images and seeds"):
        book.paired_over_seeds(rows[1:], "A", "B", "robust_acc", "toy:all")


BEYOND = {  # where the score peaks -> the factors that are tried after 3, 10 and 30
    10.0: [], 3.0: [1.0], 1.0: [1.0], 100.0: [100.0, 300.0], 3000.0: [100.0, 300.0, 1000.0, 3000.0],
}  # fmt: skip


@pytest.mark.parametrize("peak", BEYOND)
def test_the_search_goes_on_past_an_end_that_wins(peak):
    """Until the best is not at an end, or nothing is left to try."""
    tried = []

    def scores():
        return {rate: {"score": -abs(math.log(rate / peak))} for rate in sorted(tried)}

    assert best_rate(tried.append, scores) == peak and tried == [3.0, 10.0, 30.0, *BEYOND[peak]]
