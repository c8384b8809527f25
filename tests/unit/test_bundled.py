"""The cards of the bundled models in tables and curves: a number stands where its card has it, a new card by itself."""

import json

import pytest
import yaml
from test_tables import cells

from robustvlm_lite import book
from robustvlm_lite.book import bundled
from robustvlm_lite.runtime import asset


def toy_card(**changed):
    curve = [(10, 0.2, 0.4, 0.9), (20, 0.5, 0.5, 0.1), (30, 0.5, 0.51, 0.8)]  # step, two packs, and the noisy one
    names = ("one", "two", bundled.NOISY[0])
    recipe = {"steps": 30, "procs": 2, "batch": 100, "rendered": 0.25, "sizes": [[32, 0.4], [64, 0.6]], "ema": 0.99}
    recipe |= {"lr_muon": 0.01, "lr_adamw": 0.002, "weight_decay_muon": 0.1, "weight_decay": 0.05}
    card = {"recipe": recipe, "images_seen": 6_000_000, "train_images": 1234, "parameters": 5000, "bytes": 2**20}
    card |= {"wall_s": 3600.0, "machine": "2 cores, abacus"}
    card |= {"validation_curve": [{"step": s, "validation": dict(zip(names, v, strict=True))} for s, *v in curve]}
    for point, side, seconds in zip(card["validation_curve"], (32, 64, 64), (100.0, 400.0, 700.0), strict=True):
        point |= {"size": side, "seconds": seconds}
    card |= {"zero_shot": {"small/one": {"classes": 8, "n": 40, "accuracy": 0.5, "ci95": [0.35, 0.65]}}}
    return card | {"map_overlap": {"center prior": 0.4, "token_norm none": 0.3, "a map": 0.1234}} | changed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of assets in place of the package's."""
    monkeypatch.setattr(bundled, "asset", lambda *parts: tmp_path.joinpath(*parts))
    (tmp_path / "clip").mkdir()
    return tmp_path / "clip"


def test_every_card_of_the_folder_is_found_the_smallest_model_first(folder):
    (folder / "b.card.json").write_text(json.dumps(toy_card(parameters=9)))
    (folder / "a.b.card.json").write_text(json.dumps(toy_card(parameters=90)))
    (folder / "c.card.json").write_text(json.dumps(toy_card(parameters=3)))
    (folder / "c.json").write_text("{}")
    assert list(book.model_cards()) == ["c", "b", "a.b"]


def test_curves_count_images_and_leave_out_the_pack_with_few_rows():
    curves = book.learning_curves(toy_card())
    assert list(curves) == ["one", "two", "mean"]
    assert curves["one"] == (pytest.approx([2.0, 4.0, 6.0]), [0.2, 0.5, 0.5])
    assert curves["mean"][1] == pytest.approx([0.3, 0.5, 0.505])


def test_a_curve_is_nearly_done_at_its_first_value_near_the_best():
    assert book.nearly_done(([1, 2, 3, 4], [0.1, 0.5, 0.9, 0.895])) == 3
    assert book.nearly_done(([1, 2, 3, 4], [0.1, 0.89, 0.9, 0.5])) == 2
    assert book.nearly_done(([1, 2, 3, 4], [0.1, 0.85, 0.9, 0.5]), within=0.06) == 2


def test_making_table_has_a_column_a_model():
    html = book.making_table({"small": toy_card(), "large": toy_card(parameters=7_000_000, machine="a GPU")})
    assert cells(html, 0) == ["", "small", "large"]
    lines = {line[0]: line[1:] for line in (cells(html, k) for k in range(1, 13))}
    assert lines["parameters, both towers"] == ["5,000", "7,000,000"]
    assert lines["took, beside other work"] == ["1.0 hours on 2 cores, abacus", "1.0 hours on a GPU"]
    assert lines["image side by share of the steps"][0] == "40 % at 32, 60 % at 64 pixels"
    assert lines["steps"][0] == "30, 2 × 100 images each" and lines["images seen"][0] == "6.00 million"


def test_least_seconds_takes_the_fastest_stretch_of_each_side():
    curve = [(0, 8, 0), (10, 8, 100), (20, 8, 120), (30, 16, 1000), (40, 16, 1050), (50, 16, 1130)]
    points = [{"step": step, "size": side, "seconds": seconds} for step, side, seconds in curve]
    recipe = {"steps": 50, "sizes": [[8, 0.4], [16, 0.4], [32, 0.2]]}
    card = {"recipe": recipe, "wall_s": 1500.0, "validation_curve": points}
    # 20 steps of 2 s, 20 of 5 s; 10 at a side without a stretch take the run's mean of 30 s. 20 → 30 mixes two sides.
    assert book.least_seconds(card) == pytest.approx(20 * 2 + 20 * 5 + 10 * 30)


def test_known_table_has_chance_and_a_dash_where_a_model_was_not_measured():
    other = {"small/one": {"classes": 8, "n": 40, "accuracy": 0.25, "ci95": [0.1, 0.4]}}
    other["small/two"] = {"classes": 2, "n": 7, "accuracy": 1.0, "ci95": [0.6, 1.0]}
    html = book.known_table({"a": toy_card(), "b": toy_card(zero_shot=other)})
    assert cells(html, 0) == ["data set", "classes", "images", "chance", "a", "b"]
    first, second = "50.0\u00a0(35.0\u2060–\u206065.0)", "25.0\u00a0(10.0\u2060–\u206040.0)"
    assert cells(html, 1) == ["small/one", "8", "40", "12.5", first, second]
    assert cells(html, 2)[:5] == ["small/two", "2", "7", "50.0", "–"]


def test_notes_of_a_section_are_shown_as_written(folder):
    entry = {"question": "Which?", "conditions": "n = 3.", "columns": ["x", "y"], "rows": {"this": [1.25, 2]}}
    other = entry | {"question": "Another?"}
    (folder / "notes.yml").write_text(yaml.safe_dump({"tried": [entry], "memory": [other, other]}))
    (html,) = book.notes_tables("tried")
    assert "Which? n = 3." in html and cells(html, 0) == ["", "x", "y"] and cells(html, 1) == ["this", "1.2", "2.0"]
    assert len(book.notes_tables("memory")) == 2


def test_committed_notes_fit_their_columns_and_the_recipe_holds_what_won():
    import pretrain_clip

    notes = yaml.safe_load(asset("clip", "notes.yml").read_text(encoding="utf-8"))
    every = [note for section in notes.values() for note in section]
    assert all(len(row) == len(note["columns"]) for note in every for row in note["rows"].values())
    assert [len(book.notes_tables(section)) for section in notes] == [len(section) for section in notes.values()]
    (whole,) = (note for note in notes["tried"] if "whole run" in note["question"])
    best = max(whole["rows"], key=lambda name: sum(whole["rows"][name]))
    assert float(best.removeprefix("decay ")) == pretrain_clip.Recipe().weight_decay_muon


def test_committed_cards_fill_every_table():
    cards = book.model_cards()
    assert "nano" in cards
    for html in (book.making_table(cards), book.known_table(cards)):
        assert all(name in cells(html, 0) for name in cards)
