"""The result card on disk: schema, order of writing, damage, recomputation. All numbers are toys."""

import json
import math
from dataclasses import replace

import pytest

from robustvlm_lite import cards
from robustvlm_lite.cards import Card, comparable, is_stale, load_card, load_examples, recompute
from robustvlm_lite.evaluate import _row, worst_case
from robustvlm_lite.records import SCHEMA, Cell, Row, column, records_table
from robustvlm_lite.runtime import UserError


def cell(correct, method="TeCoA", attack="pgd-20", eps_255=1.0, seed=0, correct_8bit=None):
    """A cell whose verdicts are given; labels are all 1."""
    right = [int(c) for c in correct]
    right_8bit = [int(c) for c in correct_8bit or correct]
    return Cell(
        records_table(
            n=len(right),
            **{"method": method, "dataset": "toy/gray", "attack": attack, "eps_255": eps_255, "seed": seed},
            **{"index": range(len(right)), "label": 1, "prediction": right, "margin": [c - 0.5 for c in right]},
            **{"correct": [c == 1 for c in right], "linf_255": eps_255},
            **{"prediction_8bit": right_8bit, "correct_8bit": [c == 1 for c in right_8bit]},
        ),
        seconds=0.5,
        image_forwards=60,
        image_backwards=40,
    )


def row(correct, metric="robust_acc", **where):
    made = cell(correct, **where)
    first = made.records.slice(0, 1).to_pylist()[0]
    hashes = {"weights_sha256": "w" + first["method"], "data_sha256": "d"}
    return _row(made, metric, hashes, {"seed": first["seed"], "n_steps": 20})


def rows():
    pgd, cw = row([1, 1, 0, 0]), row([1, 0, 1, 0], attack="cw-20")
    clean = row([1, 1, 1, 0], "clean_acc", attack="none", eps_255=0.0)
    eight = row([1, 1, 0, 0], "robust_acc_8bit", correct_8bit=[1, 1, 1, 0])
    return [clean, replace(pgd, records=eight.records), eight, cw, worst_case([pgd, cw])]


def card(**options):
    made = Card("04_tga_zsr", "tiny", 0, {"eps_255": 1.0}, device="cpu", **options).add(rows())
    return made.claim("TGA-C1", "partly", "because")


def test_schema_is_the_documented_one(tmp_path):
    path = card().write(tmp_path / "eps=1")  # a folder name that Parquet readers like to turn into a column
    assert path == tmp_path / "eps=1" / "card.json"
    made = load_card(path)
    assert list(made) == ["schema", "chapter", "profile", "seed", "parameters", "rows", "claims", "provenance"]
    assert made["schema"] == 1
    documented = "method dataset attack eps_255 metric n value ci95 seconds image_forwards image_backwards".split()
    assert list(made["rows"][0])[:11] == documented
    assert list(made["rows"][0])[11:] == ["extra"]
    assert made["claims"] == [{"id": "TGA-C1", "verdict": "partly", "why": "because"}]
    provenance = made["provenance"]
    stamp = "commit dirty package torch device weights_sha256 data_sha256 wall_s started".split()
    assert {*stamp, "code_sha256"} <= set(provenance)
    assert provenance["data"] == {"toy/gray": "d"} and provenance["data_sha256"] == "d"
    assert provenance["weights"] == {"TeCoA": "wTeCoA"}
    assert load_examples(path).schema.names == SCHEMA.names
    assert sorted(p.name for p in path.parent.iterdir()) == ["card.json", "examples.parquet"]


def test_every_accuracy_follows_from_the_examples(tmp_path):
    card().write(tmp_path)
    written = load_card(tmp_path)["rows"]
    assert [r["value"] for r in written] == [0.75, 0.5, 0.75, 0.5, 0.25]
    assert recompute(tmp_path) == [(said, said) for said in written]
    assert len(load_examples(tmp_path)) == 3 * 4  # clean, pgd, cw; the 8-bit row shares a cell, the worst case follows


def test_recompute_notices_a_typed_number(tmp_path):
    path = card().write(tmp_path)
    text = path.read_text().replace('"value": 0.5', '"value": 0.51', 1)
    path.write_text(text)
    differing = [(said["value"], found["value"]) for said, found in recompute(tmp_path) if said != found]
    assert differing == [(0.51, 0.5)]


def test_a_row_that_its_examples_do_not_support_is_not_written(tmp_path):
    invented = replace(rows()[1], value=0.6)
    with pytest.raises(UserError, match="does not follow from its examples"):
        Card("04_tga_zsr", "tiny", 0, {}).add(invented).write(tmp_path)
    parts_missing = Card("04_tga_zsr", "tiny", 0, {}).add(rows()[-1])
    with pytest.raises(UserError, match="one record per image"):
        parts_missing.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_card_comes_last_and_an_old_one_never_vouches_for_new_examples(tmp_path, monkeypatch):
    card().write(tmp_path)
    written = []
    whole = cards.write_whole

    def watched(path, write):
        if path.name == "card.json":
            assert not path.exists() and (tmp_path / "examples.parquet").exists()
        written.append(path.name)
        return whole(path, write)

    monkeypatch.setattr(cards, "write_whole", watched)
    card().write(tmp_path)
    assert written == ["examples.parquet", "card.json"]


def test_adding_again_replaces_and_a_name_clash_is_refused():
    made = card()
    n = len(made.as_dict()["rows"])
    made.add(rows())
    assert len(made.as_dict()["rows"]) == n and len(made.examples) == 12
    with pytest.raises(UserError, match="share the name"):
        made.add(replace(rows()[1], extra={"seed": 0, "n_steps": 50}))
    made.add(row([1, 1, 1, 1], seed=1))  # another seed is another row
    assert len(made.as_dict()["rows"]) == n + 1 and set(column(made.examples, "seed")) == {0, 1}


def test_attention_metrics_need_no_records(tmp_path):
    shift = Row("TeCoA", "toy/gray", "pgd-20", 1.0, "map_shift", 4, -3.5, (-4.0, -3.0))
    path = card().add(shift).write(tmp_path)
    assert load_card(path)["rows"][-1]["metric"] == "map_shift"
    with pytest.raises(UserError, match="records behind clean_acc"):
        card().add(replace(shift, metric="clean_acc", value=0.5, ci95=(0.4, 0.6)))


def test_bad_verdicts_and_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="maybe"):
        card().claim("TGA-C1", "maybe", "")
    nan = Row("TeCoA", "toy/gray", "pgd-20", 1.0, "map_shift", 4, math.nan, (0.0, 1.0))
    with pytest.raises(UserError, match="ci95 around"):
        card().add(nan).write(tmp_path)


def test_several_weights_have_one_joint_hash():
    several = card().add(row([1, 0, 0, 0], method="CLIP")).as_dict()["provenance"]
    assert len(several["weights_sha256"]) == 64 and set(several["weights"]) == {"TeCoA", "CLIP"}
    assert card(weights_sha256="file hash").as_dict()["provenance"]["weights_sha256"] == "file hash"


def test_stale_when_the_code_moved(tmp_path, monkeypatch):
    made = load_card(card().write(tmp_path))
    assert not is_stale(made)
    monkeypatch.setattr(cards, "code_sha256", lambda *_: "moved")
    assert is_stale(made)


def test_comparable_leaves_out_time_and_nothing_else(tmp_path):
    a, b = (load_card(card().write(tmp_path / name)) for name in "ab")
    b["provenance"] |= {"wall_s": 1e6, "started": "later"}
    for written in b["rows"]:
        written["seconds"] += 1
    assert comparable(a) == comparable(b) and a != b
    for change in (lambda c: c["rows"][0].update(value=0.1), lambda c: c["provenance"].update(data_sha256="x")):
        other = json.loads(json.dumps(a))
        change(other)
        assert comparable(other) != comparable(a)
    assert a["rows"][0]["seconds"] == 0.5  # the argument is left alone
    slow = json.loads(json.dumps(a))
    for made, seconds in ((a, 0.4), (slow, 0.9)):
        made["rows"].append(made["rows"][0] | {"metric": "train_s", "value": seconds, "ci95": [seconds, seconds]})
    assert comparable(a) == comparable(slow)


def drop(part, key):
    def damage(made):
        del made[part][0][key]

    return damage


DAMAGE = {
    "other schema": (lambda c: c.update(schema=2), "expected schema 1, got 2"),
    "no provenance": (lambda c: c.pop("provenance"), "lacks provenance"),
    "row key": (drop("rows", "ci95"), "row 0 lacks ci95"),
    "row type": (lambda c: c["rows"][0].update(n="many"), "row 0: unexpected n 'many'"),
    "row shape": (lambda c: c["rows"].append("row"), "row 5 as an object"),
    "percent": (lambda c: c["rows"][0].update(value=75.0, ci95=[70.0, 80.0]), "as a fraction, got 75"),
    "interval": (lambda c: c["rows"][0].update(ci95=[0.9, 0.95]), "ci95 around the value 0.75"),
    "no examples": (lambda c: c["rows"][0].update(n=0), "n >= 1"),
    "claim": (drop("claims", "why"), "claim 0 lacks why"),
    "verdict": (lambda c: c["claims"][0].update(verdict="yes"), "got 'yes'"),
    "stamp": (lambda c: c["provenance"].pop("code_sha256"), "provenance lacks code_sha256"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_load_refuses_what_is_no_card(tmp_path, name):
    damage, message = DAMAGE[name]
    path = card().write(tmp_path)
    made = json.loads(path.read_text())
    damage(made)
    path.write_text(json.dumps(made))
    with pytest.raises(UserError, match=message) as error:
        load_card(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_and_truncated_files_are_one_line(tmp_path):
    path = card().write(tmp_path)
    whole = path.read_text()
    for text, message in ((whole[:50], "no whole JSON"), ("", "no whole JSON"), ("[]", "expected schema 1")):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            load_card(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="no card at .*not finished"):
        load_card(tmp_path)
    examples = tmp_path / "examples.parquet"
    examples.write_bytes(examples.read_bytes()[:100])
    with pytest.raises(UserError, match="no whole Parquet"):
        load_examples(tmp_path)
    examples.unlink()
    with pytest.raises(UserError, match="no examples at"):
        load_examples(tmp_path)


def test_foreign_columns_are_refused(tmp_path):
    import pyarrow.parquet as pq

    path = card().write(tmp_path)
    pq.write_table(load_examples(path).drop(["margin"]), tmp_path / "examples.parquet")
    with pytest.raises(UserError, match="expected the columns"):
        load_examples(path)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*choose another output folder"):
        card().write(tmp_path / "file" / "run")
