"""Scenarios of few-shot tuning: who learns on what, who is asked what; means, harmonic means and collapsed runs over seeds."""

import math

import numpy as np
import pytest
import torch
from toy_tuning import ATTACK

from robustvlm_lite import data, fewshot
from robustvlm_lite.attacks import get_attack
from robustvlm_lite.clip import random_clip as make_random_clip
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses import PromptTraining, build_prompts
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.records import Row, records_table
from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import harmonic_mean, wilson
from robustvlm_lite.threat import ThreatModel

NAMES = ("ant", "bee", "cat", "dog", "elk")


def images(n_each=4, name="toy", names=NAMES, split="test", seed=0) -> ImageSet:
    n = n_each * len(names)
    pixels = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ids = tuple(f"{('photo', 'sketch')[(i // len(names)) % 2]}/{split}-{i}" for i in range(n))
    return ImageSet(name, pixels, torch.arange(n) % len(names), tuple(names), ("a photo of a {}.",), split, ids=ids)


TRAIN, TEST = images(8, split="train", seed=1), images()


# --- scenarios


def test_shots_follow_the_seed_and_tests_do_not():
    scenario = fewshot.in_distribution(TRAIN, TEST, 2)
    one, again, two = (scenario.train(seed) for seed in (1, 1, 2))
    assert one.labels.bincount().tolist() == [2] * 5 and one.ids == again.ids != two.ids
    assert scenario.tests["all"].ids == TEST.ids and scenario.tests["all"].name == "toy:all"
    assert len(fewshot.in_distribution(TRAIN, TEST, 0).train(1)) == len(TRAIN)


def test_base_to_new_never_shows_a_new_class():
    scenario = fewshot.base_to_new(TRAIN, TEST, 2)
    shots, base, new = scenario.train(1), scenario.tests["base"], scenario.tests["new"]
    assert shots.class_names == base.class_names == NAMES[:3] and new.class_names == NAMES[3:]
    assert set(shots.ids) <= {i for i, y in zip(TRAIN.ids, TRAIN.labels, strict=True) if y < 3}
    assert set(new.labels.tolist()) == {0, 1} and len(base) + len(new) == len(TEST)
    assert {part.name for part in (base, new)} == {"toy:base", "toy:new"}, "rows of two parts are told apart"


def test_across_takes_the_other_sets_with_their_own_names():
    other = images(3, "zoo", ("yak", "zebra"))
    scenario = fewshot.across(TRAIN, TEST, [other], 1)
    assert list(scenario.tests) == ["source", "zoo"] and scenario.tests["zoo"].class_names == ("yak", "zebra")


def test_the_domain_that_is_left_out_is_in_no_shot():
    scenario = fewshot.domain_out(TRAIN, TEST, "sketch", 2)
    assert all(name.startswith("photo/") for name in scenario.train(3).ids)
    assert all(name.startswith("sketch/") for name in scenario.tests["sketch"].ids)
    assert all(name.startswith("photo/") for name in scenario.tests["other domains"].ids)


def test_bad_scenarios_are_one_clear_line():
    other = images(3, "zoo", ("yak", "zebra"))
    cases = {
        "expected one list of classes in training and test, got 5 and 2 of toy and zoo": lambda: fewshot.base_to_new(TRAIN, other, 1),
        "expected 1 to 8 shots of class 0 of toy, got 9; ask for fewer": lambda: fewshot.in_distribution(TRAIN, TEST, 9).train(1),
        "unknown domain 'cartoon' of toy": lambda: fewshot.domain_out(TRAIN, TEST, "cartoon", 1),
    }  # fmt: skip
    for line, call in cases.items():
        with pytest.raises(UserError) as error:
            call()
        assert line in str(error.value) and "\n" not in str(error.value)


# --- what several seeds say


def row(method, dataset, metric, seed, right, n=20, prediction=None, attack="none", eps=0.0):
    """A row whose first `right` images are answered correctly."""
    labels = np.arange(n) % 2
    answers = np.where(np.arange(n) < right, labels, 1 - labels) if prediction is None else np.full(n, prediction)
    correct = answers == labels
    records = records_table(
        n=n, method=method, dataset=dataset, attack=attack, eps_255=eps, seed=seed, index=np.arange(n), label=labels,
        prediction=answers, correct=correct, margin=0.0, prediction_8bit=answers, correct_8bit=correct, linf_255=0.0,
    )  # fmt: skip
    hits = int(correct.sum())
    return Row(method, dataset, attack, eps, metric, n, hits / n, wilson(hits, n), extra={"seed": seed}, records=records)


@pytest.fixture(scope="module")
def scenario():
    two = images(10, names=("ant", "bee", "cat", "dog"), split="test")
    return fewshot.base_to_new(images(10, names=("ant", "bee", "cat", "dog"), split="train"), two, 1)


def rows_of(scores, method="M"):
    """scores[part][seed] = (clean hits, robust hits) of 20."""
    out = []
    for part, seeds in scores.items():
        for seed, (clean, robust) in seeds.items():
            out.append(row(method, f"toy:{part}", "clean_acc", seed, clean))
            out.append(row(method, f"toy:{part}", "robust_acc", seed, robust, attack="pgd-10", eps=1.0))
    return out


def test_means_spreads_and_harmonic_means(scenario):
    rows = rows_of({"base": {1: (16, 8), 2: (18, 10)}, "new": {1: (12, 4), 2: (10, 6)}})
    rows.append(row("M", "toy:base", "robust_acc", 1, 20, attack="pgd-10", eps=2.0))  # another budget
    rows.append(row("M", "toy:base", "robust_acc", 1, 20, attack="cw-10", eps=1.0))  # another attack
    (s,) = fewshot.summarize(rows, scenario, attack="pgd-10", eps_255=1.0)
    assert (s.method, s.seeds, s.collapsed) == ("M", 2, 0)
    assert s.natural["base"] == pytest.approx((0.85, 0.1 / math.sqrt(2))) and s.robust["new"][0] == pytest.approx(0.25)
    expected = [harmonic_mean(0.8, 0.6), harmonic_mean(0.9, 0.5)]
    assert s.hm_natural == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert s.h4[0] == pytest.approx((harmonic_mean(0.8, 0.6, 0.4, 0.2) + harmonic_mean(0.9, 0.5, 0.5, 0.3)) / 2)


def test_one_seed_has_no_spread_and_a_missing_row_is_named(scenario):
    (s,) = fewshot.summarize(rows_of({"base": {1: (16, 8)}, "new": {1: (12, 4)}}), scenario, attack="pgd-10", eps_255=1.0)
    assert s.seeds == 1 and math.isnan(s.natural["base"][1]) and s.hm_robust[0] > 0
    short = rows_of({"base": {1: (16, 8), 2: (16, 8)}, "new": {1: (12, 4)}})
    with pytest.raises(UserError, match=r"none for \('M', 'toy:new', 'clean_acc', 2\); evaluate it, too"):
        fewshot.summarize(short, scenario, attack="pgd-10", eps_255=1.0)


def test_a_collapsed_run_is_counted_and_stays_in_the_mean(scenario):
    rows = rows_of({"base": {1: (16, 8)}, "new": {1: (12, 4)}})
    for part in ("base", "new"):
        rows.append(row("M", f"toy:{part}", "clean_acc", 2, 0, prediction=1))
        rows.append(row("M", f"toy:{part}", "robust_acc", 2, 10, attack="pgd-10", eps=1.0))
    (s,) = fewshot.summarize(rows, scenario, attack="pgd-10", eps_255=1.0)
    assert s.collapsed == 1 and s.natural["base"][0] == pytest.approx((0.8 + 0.5) / 2)
    (s,) = fewshot.summarize(rows, scenario, attack="pgd-10", eps_255=1.0, marked=[("M", 1), ("other", 2)])
    assert s.collapsed == 2, "what training saw counts, too, and the same run once"


def test_collapse_is_one_answer_and_no_more_accuracy_than_it_gives():
    assert fewshot.has_collapsed(row("M", "d", "clean_acc", 1, 0, prediction=0), 2)
    assert not fewshot.has_collapsed(row("M", "d", "clean_acc", 1, 20), 2)
    assert not fewshot.has_collapsed(row("M", "d", "clean_acc", 1, 0), 2), "wrong, but with both answers"


def test_a_scenario_runs_from_shots_to_summary():
    """Two methods, two seeds, base to new, with CLIP's shapes and random weights."""
    scenario, rows = fewshot.base_to_new(TRAIN, TEST, 1), []
    clip, attack = make_random_clip("nano"), (get_attack("pgd-1"), ThreatModel(1.0))
    for name in ("APT", "FAP"):
        for seed in (1, 2):
            defense = build_prompts(name, clip)
            training = PromptTraining(steps=1, batch=3, lr=0.01, epoch=1, precision=None)
            defense.fit(scenario.train(seed), attack=ATTACK, training=training, seed=seed, progress=False)
            for part in scenario.tests.values():
                model = defense.classifier(part.class_names)
                rows += evaluate(model, part, [attack], method=name, seed=seed, progress=False)
    found = fewshot.summarize(rows, scenario, attack="pgd-1", eps_255=1.0)
    assert [s.method for s in found] == ["APT", "FAP"] and all(s.seeds == 2 for s in found)
    for s in found:
        assert all(robust[0] <= s.natural[part][0] for part, robust in s.robust.items())
    assert set(data.FEW_SHOT_SEEDS) == {1, 2, 3} and data.SHOTS == (1, 2, 4, 8, 16)
