"""Scores of answers: VQA's rule and exact match."""

import numpy as np
import pytest

from robustvlm_lite import text_metrics
from robustvlm_lite.text_metrics import (
    vqa_accuracy,
)


def ten(**counts):
    return [word for word, n in counts.items() for _ in range(n)]


@pytest.mark.parametrize(
    ("answer", "people", "expected"),
    [
        ("red", ten(red=10), 1.0),
        ("red", ten(red=4, blue=6), 1.0),  # nine people hold at least three
        ("red", ten(red=3, blue=7), (3 * 2 / 3 + 7 * 1) / 10),
        ("red", ten(red=2, blue=8), (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("red", ten(red=1, blue=9), (1 * 0 + 9 * 1 / 3) / 10),
        ("green", ten(red=5, blue=5), 0.0),
        ("The Red.", ten(red=10), 1.0),
        ("an apple", ten(apple=4, pear=6), 1.0),
        ("two", ["2"] * 10, 1.0),
        ("None", ["0"] * 9 + ["no"], 1.0),
        ("dont", ["don't"] * 10, 1.0),
        ("wouldntve", ["wouldn't've"] * 10, 0.0),  # one apostrophe may be lost, not both
        ("100,978", ["100978"] * 10, 1.0),
        ("2.5", ["2.5"] * 10, 1.0),
        ("2:50 pm!", ["2:50 pm"] * 10, 1.0),
        ("black/white", ["black white"] * 10, 1.0),
        ("black / white", ["black white"] * 10, 1.0),
        ("girl's", ["girls"] * 10, 0.0),
        ("t-shirt", ["t-shirt"] * 10, 0.0),  # all people agree, so theirs keep the hyphen: the official rule says no
        ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),
        ("the end", ["the end"] * 9 + ["end"], (1 * 0 + 9 * 1 / 3) / 10),  # of people's answers, articles stay
        ("red\n", ten(red=10), 1.0),
    ],
)
def test_vqa_rule_by_hand(answer, people, expected):
    assert vqa_accuracy([answer], [people])[0] == pytest.approx(expected)


def test_vqa_rule_is_the_mean_over_the_sets_of_nine():
    rng = np.random.default_rng(2)
    people = [[str(word) for word in rng.choice(["red", "blue", "green"], 10)] for _ in range(40)]
    for answer in ("red", "pink"):
        nines = [[min(sum(w == answer for k, w in enumerate(row) if k != out) / 3, 1) for out in range(10)] for row in people]
        assert vqa_accuracy([answer] * 40, people) == pytest.approx(np.mean(nines, axis=1))


def test_exact_match():
    assert text_metrics.exact_match([" Red", "red", "a red"], ["red", "blue", "red"]).tolist() == [1, 0, 0]
