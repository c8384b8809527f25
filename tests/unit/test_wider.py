"""Scenarios beyond the main one: which sets and shots are run, under which names, and the table of them."""

import os
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from toy_tuning import photos

from robustvlm_lite import fewshot
from robustvlm_lite.attacks import get_attack
from robustvlm_lite.book import measure_each, tuning, wider
from robustvlm_lite.cards import Card
from robustvlm_lite.fewshot import Summary
from robustvlm_lite.records import Row, Store
from robustvlm_lite.threat import ThreatModel


@pytest.fixture
def sets():
    return [photos(24, 64, seed=k, name=f"small/{name}") for k, name in enumerate(("a", "b"))]


def run_in(out, **sizes):
    """What a chapter's run offers to the functions tested here."""
    sizes, card = SimpleNamespace(shots=2, backbone="none", **sizes), Card("05_capt", "tiny", 0, {})
    places = {"device": torch.device("cpu"), "out": out, "store": Store(out / "cells"), "card": card}
    return SimpleNamespace(seed=0, sizes=sizes, parameters={"eps_255": 1.0}, **places)


def test_the_share_of_the_class_that_is_kept_best():
    """Counted by hand over two seeds: of class 0 three are right, of class 2 one, and the other method does not matter."""
    def row(method, labels, right):
        records = pa.table({"label": labels, "correct": [bool(c) for c in right]})
        return Row(method, "toy:all", "pgd-1", 1.0, "robust_acc", len(labels), 0.5, (0, 1), records=records)

    rows = [row("A", [0, 0, 1, 2], [1, 1, 0, 1]), row("A", [0, 1, 1, 2], [1, 0, 0, 0]), row("B", [1], [1])]
    assert wider.largest_class_share(rows, "A") == pytest.approx(3 / 4)
    assert wider.largest_class_share([row("A", [0, 1], [0, 0])], "A") == 0.0


def test_every_set_and_number_of_shots_but_the_main_pair(sets):
    found = wider.other_sets(sets, sets, [4, 2])
    assert list(found) == ["small/b, 4 shots", "small/a, 2 shots", "small/b, 2 shots"]
    assert {head: s.tests["all"].name for head, s in found.items()} == {
        "small/b, 4 shots": "small/b:all", "small/a, 2 shots": "small/a:all, 2 shots", "small/b, 2 shots": "small/b:all, 2 shots",
    }  # fmt: skip
    per_class = {head: len(s.train(1)) / len(sets[0].class_names) for head, s in found.items()}
    assert list(per_class.values()) == [4, 2, 2]
    assert wider.other_sets(sets[:1], sets[:1], [4]) == {}


def test_other_shots_keep_their_parts_and_leave_the_names_that_claims_read(sets):
    scenario = fewshot.base_to_new(sets[0], sets[0], 2)
    other = wider.with_shots(scenario, 2)
    assert list(other.tests) == ["base", "new"] and other.train(3).sha256 == scenario.train(3).sha256
    assert not any(images.name.endswith((":base", ":new")) for images in other.tests.values())
    assert other.tests["new"].sha256 == scenario.tests["new"].sha256


def test_methods_are_tuned_once_a_seed_and_measured_on_every_part(sets, random_clip, tmp_path):
    run = run_in(tmp_path)
    scenario, attack = fewshot.base_to_new(sets[0], sets[0], 2), get_attack("pgd-2")
    (found,) = wider.tune_and_measure(run, random_clip, scenario, ["HEP"], [1, 2], attack, 1.0)
    assert (found.method, found.seeds, list(found.natural)) == ("HEP", 2, ["base", "new"])
    for part, images in scenario.tests.items():
        logits = random_clip.classifier(images.class_names, images.templates)(images.pixels())
        right = (logits.argmax(1) == images.labels).float().mean().item()
        assert found.natural[part] == pytest.approx((right, 0)) and found.robust[part][0] <= right
    rows = run.card.as_dict()["rows"]
    assert {(r["dataset"], r["extra"]["seed"]) for r in rows} == {(f"small/a:{part}", seed) for part in ("base", "new") for seed in (1, 2)}


def test_two_processes_tune_and_measure_what_one_does(sets, random_clip, tmp_path, monkeypatch):
    scenario, attack, found = fewshot.in_distribution(sets[0], sets[0], 2), get_attack("pgd-2"), []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        run = run_in(tmp_path / str(cores), tuning={"steps": 2, "batch": 4, "rate": 10.0, "precision": None})
        models = tuning.tune_scenario(run, random_clip, scenario, ["HEP", "APT"], [1, 2])
        (alone,) = tuning.tune_each(run, random_clip, scenario.train(1), 1, [{"name": "APT", "label": "alone"}])
        rows = tuning.measure_scenario(run, scenario, models, attack, 1.0)
        rows += measure_each(run, [models[2][1], alone], scenario.tests["all"], [(attack, ThreatModel(2.0))], seed=2)
        learned = [p.detach() for m in (models[1][1], models[2][1], alone) for p in m.learner.parameters()]
        found.append((learned, [(r.method, r.metric, r.extra["seed"], r.value) for r in rows], len(run.card.as_dict()["rows"])))
    (one, rows, kept), (two, other_rows, other_kept) = found
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and rows == other_rows
    assert kept == other_kept > 0 and not torch.equal(one[0], one[len(one) // 3])


def test_the_table_has_a_line_a_set_and_a_column_a_method():
    def summary(method, natural, robust, collapsed=0):
        return Summary(method, 1, {"all": natural}, {"all": robust}, *[(0.0, 0.0)] * 3, collapsed)

    found = {"a, 4 shots": [summary("HEP", (0.5, 0.01), (0.25, 0.02)), summary("CAPT", (0.625, 0.0), (0.125, 0.0), 1)]}
    html = str(wider.sets_table(found, caption="Sets.")).replace("\u00a0", " ")
    assert "50.0 ± 1.0 / 25.0 ± 2.0" in html and "62.5 ± 0.0 / 12.5 ± 0.0" in html and "1 of 2" in html and "a, 4 shots" in html


def test_three_parts_are_one_column_each():
    parts = {part: (0.5, 0.0) for part in ("source", "x", "y")}
    found = [Summary("HEP", 1, parts, {part: (0.25, 0.0) for part in parts}, *[(0.0, 0.0)] * 2, (1 / 3, 0.0), 0)]
    html = str(tuning.scenario_table(found, caption="Across.")).replace("\u00a0", " ")
    assert html.count("50.0 ± 0.0 / 25.0 ± 0.0") == 3 and "33.3" in html and "0 of 1" in html
    two = [Summary("HEP", 1, dict(list(parts.items())[:2]), dict(list(parts.items())[:2]), *[(0.0, 0.0)] * 3, 0)]
    assert "x, robust" in str(tuning.scenario_table(two, caption="Two."))
