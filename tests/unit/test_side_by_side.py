"""The comparison of chapter 09: prices and orders against what can be counted by hand, attacks against their own budget."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from robustvlm_lite import attacks, data, defenses, evaluate
from robustvlm_lite.book import craft
from robustvlm_lite.book import side_by_side as side
from robustvlm_lite.book.at_test_time import without_state
from robustvlm_lite.book.memory import peak_bytes
from robustvlm_lite.cards import Card
from robustvlm_lite.clip import load_clip
from robustvlm_lite.defenses.keyed import Keyed
from robustvlm_lite.records import verdicts
from robustvlm_lite.runtime import UserError


@pytest.fixture(scope="module")
def clip():
    return load_clip("nano", device="cpu")


@pytest.fixture(scope="module")
def photos():
    return data.load("photos/caltech", n=4)


@pytest.fixture
def run(tmp_path):
    card = Card("09_side_by_side", "tiny", 0, {}, device="cpu")
    return SimpleNamespace(seed=0, device=torch.device("cpu"), out=tmp_path, card=card)


# ---- memory


def test_peak_counts_what_is_alive_at_once():
    def function():
        a = torch.zeros(1000)  # 4000 bytes
        b = torch.zeros(500)  # 6000 in all
        del a
        c = torch.zeros(250)  # 3000: the first is gone
        return b, c

    assert peak_bytes(function) == 6000


def test_views_share_their_memory_and_inputs_do_not_count():
    before = torch.zeros(1000)
    assert peak_bytes(lambda: before.view(10, 100).T[2:]) == 0
    assert peak_bytes(lambda: before + 1) == 4000


def test_peak_of_a_chain_holds_two_links_at_a_time():
    def chain():
        x = torch.zeros(100)
        for _ in range(20):
            x = x + 1
        return x

    assert peak_bytes(chain) == 800


# ---- orders


def test_the_front_is_what_a_search_over_all_pairs_leaves():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = {str(i): (float(rng.integers(1, 6)), float(rng.integers(0, 6)) / 5) for i in range(8)}
        left = [
            a
            for a, (cost, gain) in points.items()
            if not any((c <= cost and g > gain) or (c < cost and g >= gain) for c, g in points.values())
        ]
        assert set(side.front(points)) == set(left)
        costs = [points[name][0] for name in side.front(points)]
        assert costs == sorted(costs)


def test_order_kept_by_hand():
    a = {"x": 1, "y": 2, "z": 3}
    assert side.order_kept(a, a) == (3, 0, 0)
    assert side.order_kept(a, {"x": 3, "y": 2, "z": 1}) == (0, 0, 3)
    assert side.order_kept(a, {"x": 1, "y": 1, "z": 3}) == (2, 1, 0), "a tie on one side is neither kept nor reversed"
    assert side.order_kept({"x": 1, "y": 1}, {"x": 2, "y": 2}) == (0, 0, 0), "a tie on both sides says nothing"


def test_all_leaders_are_named():
    assert side.leaders({"x": 1, "y": 3, "z": 3}) == ["y", "z"]
    assert [side.listed(names) for names in ([], ["x"], ["x", "y"], ["x", "y", "z"])] == ["no method", "x", "x and y", "x, y and z"]


# ---- candidates


def test_a_static_candidate_is_the_defense_itself(clip, photos):
    defense = defenses.load_defense("TeCoA", clip)
    candidate = side.static("TeCoA", "robust training", defense, photos, ["pgd-2", "cw-2"])
    with torch.no_grad():
        same = defense.clip.classifier(photos.class_names, photos.templates)(photos.pixels())
        torch.testing.assert_close(candidate.model(photos.pixels()), same)
    assert {name: attack.n_steps for name, (attack, _) in candidate.ways.items()} == {"pgd-2": 2, "cw-2": 2}


SMALL = {"n_views": 4, "few": 2, "specs": ["pgd-2", "cw-2"], "long_steps": 2, "short_steps": 2, "short": ["margin", "step"]}
TOWER = {"pgd-2 on its tower", "cw-2 on its tower"}


@pytest.mark.parametrize(
    "method, through",
    [
        ("View ensemble", {"long", "margin"}),
        ("TTC", {"long", "margin"}),
        ("R-TPT", {"long", "margin", "step"}),
    ],
)
def test_every_way_of_a_test_time_defense_stays_in_the_budget_and_leads_through_it(clip, photos, run, method, through):
    few = photos.take(range(2))
    candidate = side.at_test_time(method, "at test time", clip, method, few, **SMALL)
    assert set(candidate.ways) == TOWER | through
    seen = {}
    for way, (attack, surface) in candidate.ways.items():
        seen[way] = side.crafted(run, attack, surface, few, 2.0, way)
        levels = 255 * seen[way]
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert (seen[way] - few.pixels()).abs().max() <= 2 / 255 + 1e-6
    # One attack, one name and so one random start for all: only what it goes through can tell the images apart.
    attack, surfaces = attacks.get_attack("pgd-2"), {way: surface for way, (_, surface) in candidate.ways.items()}
    made = {way: craft(run, attack, surface, few, 2.0, "the same start") for way, surface in surfaces.items()}
    assert torch.equal(made["long"], made["margin"]) and torch.equal(*(made[way] for way in sorted(TOWER)))
    assert not torch.equal(made["long"], made["pgd-2 on its tower"])
    if "step" in through:
        assert not torch.equal(made["long"], made["step"]), "the slope of the step changes the gradient"


def test_children_meet_all_that_their_parents_meet(clip, photos):
    specs = SMALL["specs"]
    tower = defenses.load_defense("TeCoA", clip)
    parents = [side.static("TeCoA", "", tower, photos, specs), side.at_test_time("R-TPT", "", clip, "R-TPT", photos, **SMALL)]
    child = side.at_test_time("R-TPT on TeCoA", "", tower.clip, "R-TPT", photos, **SMALL)
    attacks_of = [{w.removesuffix(" on its tower"): attack.params for w, (attack, _) in c.ways.items()} for c in (*parents, child)]
    assert attacks_of[0].items() <= attacks_of[2].items() and attacks_of[1] == attacks_of[2]
    with torch.no_grad():
        behind = child.ways["pgd-2 on its tower"][1](photos.pixels()).float()
        torch.testing.assert_close(behind, tower.clip.classifier(photos.class_names, side.PLAIN)(photos.pixels()), atol=0.3, rtol=0.05)


def test_chance_is_asked_of_random_models_alone_and_by_the_name_of_each(clip, photos, run):
    random, sure = (side.at_test_time(m, "", clip, m, photos, **SMALL) for m in ("R-TPT", "View ensemble"))
    fixed = side.static("CLIP", "", defenses.Defense(clip), photos, [])
    asked = {c.name: partial(side.measure_images, run, c.name, c.model, photos, photos.pixels()) for c in (random, sure)}
    rows = {name: [ask("none", 0.0), ask("pgd-1", 0.0)] for name, ask in asked.items()}
    worst = {name: of[0] for name, of in rows.items()}
    found = side.chances_alone(run, [random, fixed, sure], photos, rows, worst)
    assert list(found) == ["R-TPT", "View ensemble"] and all(line["method"] == name for name, (line, _) in found.items())
    alone = side.chance_alone(run, random, photos, rows["R-TPT"], worst["R-TPT"])
    assert found["R-TPT"] == alone


def test_nothing_is_carried_into_a_measurement_or_an_attack(clip, photos):
    c = side.at_test_time("A-TPT (released)", "", clip, "A-TPT (released)", photos, **SMALL)
    assert c.model.recipe.quirk_leak and not c.ways["long"][1].recipe.quirk_leak
    with torch.no_grad():
        first = evaluate.for_images(without_state(c.model), photos, range(4), 0)(photos.pixels())
        again = evaluate.for_images(without_state(c.model), photos, range(4), 0)(photos.pixels())
        torch.testing.assert_close(first, again, atol=0, rtol=0)
        evaluate.for_images(c.model, photos, range(4), 0)(photos.pixels().flip(0))
        assert len(c.model._left) and not without_state(c.model)._left
    plain = side.static("CLIP", "", defenses.Defense(clip), photos, []).model
    assert without_state(plain) is plain


def test_crafted_images_are_found_again_and_only_for_the_same_question(clip, photos, run):
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = clip.classifier(photos.class_names, photos.templates)

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    attack, model = attacks.get_attack("pgd-2"), Counted()
    first = side.crafted(run, attack, model, photos, 2.0, "a")
    made = len(calls)
    assert made and torch.equal(first, side.crafted(run, attack, model, photos, 2.0, "a")) and len(calls) == made
    longer = attacks.get_attack("pgd-3")
    for changed in ((attack, model, photos, 1.0, "a"), (attack, model, photos, 2.0, "b"), (longer, model, photos, 2.0, "a")):
        side.crafted(run, *changed)
        assert len(calls) > made
        made = len(calls)


def test_the_worst_case_is_over_all_that_was_shown(clip, photos, run):
    candidate = side.static("CLIP", "undefended", defenses.Defense(clip), photos, ["pgd-5"])
    gray = torch.full_like(photos.pixels(), 128 / 255)  # nobody is right about all of these
    rows, worst = side.besieged(run, candidate, photos, {"gray": gray}, 255.0)
    right = [row.records.sort_by("index")["correct"].to_numpy(zero_copy_only=False) for row in rows[:3]]
    assert [row.attack for row in rows] == ["none", "gray", "pgd-5", "unchanged"]
    assert worst.value == np.logical_and.reduce(right).mean() and worst.metric == "robust_acc_worst"


def test_an_attack_of_its_own_that_all_are_shown_counts_once(clip, photos, run):
    candidate = side.static("CLIP", "undefended", defenses.Defense(clip), photos, ["pgd-2", "cw-2"])
    shown = {"pgd-2 on CLIP": side.made_through(run, candidate, "pgd-2", photos, 2.0)}
    rows, _ = side.besieged(run, candidate, photos, shown, 2.0)
    assert [row.attack for row in rows] == ["none", "pgd-2 on CLIP", "cw-2", "unchanged"]


def test_the_control_asks_as_often_and_draws_anew(clip, photos, run):
    class Coin(Keyed):
        """Right where the first number that an image draws is above one half."""

        asked = 0

        def forward(self, x):
            Coin.asked += 1
            drawn = torch.tensor([torch.rand((), generator=g) for g in self.generators(len(x))])
            sure = nn.functional.one_hot(photos.labels[: len(x)], len(photos.class_names)).float()
            return torch.where(drawn[:, None] > 0.5, sure, -sure)

    candidate, shown = side.Candidate("coin", "", Coin()), {f"{k}": photos.pixels() for k in range(6)}
    rows, worst = side.besieged(run, candidate, photos, shown, 2.0)
    assert worst.value == rows[0].value, "one draw for all verdicts: no attack, no loss"
    Coin.asked = 0
    line, diff = side.chance_alone(run, candidate, photos, rows, worst)
    assert line["draws"] == Coin.asked == 7 and line["clean, right in all"] < 30
    assert math.isclose(100 * diff[0], line["worst case"] - line["clean, right in all"], abs_tol=1e-9)


def test_what_is_wrong_unchanged_is_lost_even_if_an_attack_mends_it(clip, photos, run):
    class Contrary(nn.Module):
        """Right where the image was changed, wrong where not."""

        def forward(self, x):
            changed = (x - photos.pixels()[: len(x)]).abs().amax(dim=(1, 2, 3)) > 0
            sure = nn.functional.one_hot(photos.labels[: len(x)], len(photos.class_names)).float()
            return torch.where(changed[:, None], sure, -sure)

    shown = {"gray": torch.full_like(photos.pixels(), 128 / 255)}
    rows, worst = side.besieged(run, side.Candidate("contrary", "", Contrary()), photos, shown, 255.0)
    assert (rows[0].value, rows[1].value, worst.value) == (0, 1, 0)
    examples = pa.concat_tables([row.records for row in rows])
    index, correct = verdicts(examples, worst.as_dict())  # as the rules read it from a committed card
    assert len(index) == len(photos) and not correct.any()


# ---- prices


def test_passes_are_those_of_the_recipe(clip, photos, run):
    small = SMALL | {"n_views": 3}
    methods = ("View ensemble", "R-TPT", "A-TPT (released)")
    made = {m: side.at_test_time(m, "", clip, m, photos, **small) for m in methods}
    made["CLIP"] = side.static("CLIP", "", defenses.Defense(clip), photos, [])
    priced = side.prices(run, list(made.values()), photos, rounds=2)
    classes = len(photos.class_names)
    assert (priced["CLIP"].forwards, priced["CLIP"].texts) == (1, 0)
    assert (priced["View ensemble"].forwards, priced["View ensemble"].texts) == (3, 0)
    assert (priced["R-TPT"].forwards, priced["R-TPT"].texts) == (3, 2 * classes)
    assert priced["A-TPT (released)"].forwards > 3, "its maps cost passes of their own"
    assert priced["View ensemble"].mebibytes > 1.2 * priced["CLIP"].mebibytes > 0
    assert priced["A-TPT (released)"].mebibytes > 0.9 * priced["R-TPT"].mebibytes, "alone, as everybody is asked"
    assert all(p.seconds[1] <= p.seconds[0] <= p.seconds[2] for p in priced.values())
    html = str(side.price_table(priced, caption="Prices."))
    assert "View ensemble" in html and f"<td>{2 * classes}</td>" in html.replace(' class="num"', "")


def test_a_random_model_has_one_draw_for_all_verdicts(clip, photos):
    c = side.at_test_time("View ensemble", "", clip, "View ensemble", photos, **SMALL)
    with torch.no_grad():
        ask = [evaluate.for_images(c.model, photos, range(4), 0)(photos.pixels()) for _ in range(2)]
        anew = c.model(photos.pixels())
    torch.testing.assert_close(*ask)
    assert not torch.allclose(ask[0], anew)


# ---- exercises


def test_exercises_take_the_solution_and_name_the_mistake(capsys):
    from robustvlm_lite.book import exercises_side_by_side as exercises

    exercises.check_worst(lambda correct: correct.all(0).float().mean())
    exercises.check_front(lambda points: side.front(points))
    exercises.check_needed(lambda share, half: int(np.ceil(share * (1 - share) * (1.96 / half) ** 2)))
    assert capsys.readouterr().out.count("✓") == 3
    wrong = {
        "strongest attack over all": lambda: exercises.check_worst(lambda c: c.float().mean(1).min()),
        "mean over attacks": lambda: exercises.check_worst(lambda c: c.float().mean()),
        "b beats it": lambda: exercises.check_front(list),
        "cheapest first": lambda: exercises.check_front(lambda points: ["d", "b", "a"]),
        "round up": lambda: exercises.check_needed(lambda p, h: p * (1 - p) * (1.96 / h) ** 2),
        "still wider": lambda: exercises.check_needed(lambda p, h: int(p * (1 - p) * (1.64 / h) ** 2)),
        "more than are needed": lambda: exercises.check_needed(lambda p, h: int(p * (1 - p) * (2.6 / h) ** 2)),
        "return missing": lambda: exercises.check_worst(lambda c: None),
    }
    for hint, call in wrong.items():
        with pytest.raises(AssertionError, match=hint):
            call()


# ---- figures


def test_stages_draw_every_value_and_refuse_what_is_in_no_group():
    from robustvlm_lite.plots import comparison

    values = {m: {"clean": (0.9, 0.8, 1.0), "worst": (v, 0.1, 0.6)} for m, v in (("a", 0.3), ("b", 0.5))}
    fig = comparison.stages(values, quantity="accuracy (%)", groups={"one": ["a"], "two": ["b"]})
    drawn = [line.get_xdata()[0] for line in fig.axes[0].lines if line.get_marker() in ("o", "D")]
    assert drawn == [90, 30, 90, 50]
    with pytest.raises(UserError, match=r"each method in one group, got \['b'\]"):
        comparison.stages(values, quantity="accuracy (%)", groups={"one": ["a"]})


def test_the_front_is_filled_and_named_in_bold():
    from matplotlib.colors import to_hex

    from robustvlm_lite.plots import comparison

    points = {"cheap": (1.0, 0.2, 0.1, 0.3), "dear": (50.0, 0.6, 0.5, 0.7), "beaten": (60.0, 0.5, 0.4, 0.6)}
    kinds, hues = {"cheap": "one", "dear": "two", "beaten": "two"}, {"one": "#0072B2", "two": "#D55E00", "none": "#000000"}
    fig = comparison.cost_front(points, ["cheap", "dear"], cost="ms", quantity="%", kinds=kinds, hues=hues)
    ax = fig.axes[0]
    names = {text.get_text(): text.get_weight() for text in ax.texts}
    assert names == {"cheap": "bold", "dear": "bold", "beaten": "normal"}
    drawn = {line.get_gid(): line for line in ax.lines}
    faces = {name: to_hex(drawn[name].get_markerfacecolor()).upper() for name in points}
    assert faces == {"cheap": "#0072B2", "dear": "#D55E00", "beaten": "#FFFFFF"}
    assert drawn["front"].get_xydata().tolist() == [[1, 20], [50, 60]] and drawn["front"].get_drawstyle() == "steps-post"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["one", "two"], "a kind that nobody has is not explained"
    low, high = ax.get_xlim()
    ticks = [ax.xaxis.get_major_formatter()(at) for at in ax.xaxis.get_majorticklocs() if low <= at <= high]
    assert ticks == ["1", "2", "5", "10", "20", "50"]
    with pytest.raises(UserError, match="costs above zero"):
        comparison.cost_front({"free": (0.0, 0.5, 0.4, 0.6)}, [], cost="ms", quantity="%", kinds={"free": "one"}, hues=hues)
