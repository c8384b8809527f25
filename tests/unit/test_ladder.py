"""What chapter 07 measures beside its main table: fresh draws for each rung, AutoAttack's flags, another tower, wide tables."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustvlm_lite import attacks, defenses
from robustvlm_lite.book import ladder
from robustvlm_lite.cards import Card
from robustvlm_lite.clip import random_clip
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses.keyed import Keyed
from robustvlm_lite.defenses.recipe import Passes
from robustvlm_lite.stats import wilson


class Coin(Keyed):
    """Right or wrong by a coin of each image's own draw; `sure` always says class 1."""

    def __init__(self, sure: bool = False, tunes: bool = False):
        super().__init__()
        self.sure, self.tunes, self.passes = sure, tunes, Passes()

    def forward(self, x):
        self.passes.text_backwards += len(x) * self.tunes
        heads = torch.stack([torch.rand((), generator=g) for g in self.generators(len(x))]) < 0.5
        return nn.functional.one_hot(torch.ones_like(heads).long() if self.sure else heads.long(), 2).float()


@pytest.fixture
def images():
    return ImageSet("toy", torch.zeros(400, 3, 4, 4, dtype=torch.uint8), torch.ones(400).long(), ("a", "b"), ("a {}.",))


@pytest.fixture
def run():
    return SimpleNamespace(seed=0, device=torch.device("cpu"), card=Card("07_a_tpt", "tiny", 0, {}))


def test_each_rung_is_judged_by_fresh_draws_and_the_control_by_as_many(run, images):
    clean = images.pixels()
    shown = {"coin": {f"T0 {k}": clean for k in "abc"}, "sure": {"T0 a": clean}}
    rows, worst, control = ladder.climb(run, {"coin": Coin(), "sure": Coin(sure=True)}, images, shown, 1.0)
    low, high = wilson(50, 400, 0.9999)
    assert low < worst["coin"].value < high and low < control["coin"] < high, "three coins are all heads in an eighth"
    assert worst["sure"].value == control["sure"] == 1
    assert len({tuple(r.records["correct"].to_pylist()) for r in rows if r.method == "coin"}) == 3
    again = ladder.climb(run, {"coin": Coin()}, images, {"coin": shown["coin"]}, 1.0)[1]
    assert again["coin"].value == worst["coin"].value


def test_the_figure_gets_rungs_in_their_order_and_the_control_last(run, images):
    clean = images.pixels()
    shown = {"coin": {k: clean for k in ("T0 x", "T1 y", "T5 z", "T2 v", "T3 w", "T4 q")}}
    at, groups = ladder.rungs_of(*ladder.climb(run, {"coin": Coin()}, images, shown, 1.0))
    assert list(groups.values()) == [["T0 x", "T1 y", "T5 z"], ["T2 v"], ["T3 w", "T4 q"], list(ladder.TOGETHER)]
    assert sorted(sum(groups.values(), [])) == sorted(at) and all(low <= v <= high for (v, low, high) in (c["coin"] for c in at.values()))


def test_known_images_are_not_made_again(run, images):
    few = images.take(range(3))
    plain, known = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), {"T3 b": few.pixels()}
    ways = {"T3 a": (attacks.get_attack("pgd-2"), plain), "T3 b": (None, None)}
    made = ladder.own_images(run, "toy", ways, few, 2.0, known)
    assert list(made) == ["T3 a", "T3 b"] and made["T3 b"] is known["T3 b"]
    assert 0 < 255 * made["T3 a"].max() <= 2 + 1e-3


def test_flags_tell_a_random_defense_and_one_that_tunes(run, images):
    torch.manual_seed(0)  # unkeyed coins come from torch's own stream
    tuned = str(ladder.flags_table(run, Coin(tunes=True), [Coin(tunes=True), Coin()], images))
    assert "1 of 2 methods" in tuned and tuned.count("yes") == 2
    assert str(ladder.flags_table(run, Coin(sure=True), [Coin()], images)).count("yes") == 0


def test_another_tower_names_its_rows_and_shows_everyone_the_same_images(run, monkeypatch):
    monkeypatch.setattr(ladder, "load_clip", lambda name, device: random_clip("nano", seed=0))
    size = random_clip("nano").image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tests = [ImageSet("toy", pixels, torch.arange(4) % 2, ("a dog", "a cat"), ("a {}.",))]
    recipes = {"View ensemble": defenses.TEST_TIME["View ensemble"].fewer(2)}
    rows, sets = ladder.on_another_tower(run, lambda data: recipes, tests, attacks.get_attack("pgd-2"), model="nano", n=2, eps_255=1.0)
    assert len(sets[0]) == 2 and {r.method for r in rows} == {"CLIP, nano", "View ensemble, nano"}
    assert {(r.attack, r.n) for r in rows} == {("none", 2), ("pgd-2", 2)}
    wide = [SimpleNamespace(name=f"small/s{i}") for i in range(4)]
    assert len(ladder.accuracy_tables(rows, sets, "x")) == 1
    with pytest.raises(Exception, match="no row fits"):
        ladder.accuracy_tables(rows, wide, "x")
