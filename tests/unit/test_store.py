"""The store of an evaluation: a killed run goes on, a changed one begins again, a damaged cell is made again."""

import re

import pytest
from toy_gray import DATA, Shift, Threshold, run, toy

from robustvlm_lite import records as records_module
from robustvlm_lite.records import Store, write_whole
from robustvlm_lite.runtime import UserError
from robustvlm_lite.threat import ThreatModel


def interrupted(store, fail_at, **options):
    """Two cells, of which the second dies; then the same call again with a counted attack."""

    class Dies(Shift):
        def run(self, *args):
            raise KeyboardInterrupt

    attacks = [(Shift(), ThreatModel(1)), (Dies(name="late"), ThreatModel(fail_at))]
    with pytest.raises(KeyboardInterrupt):
        run(attacks=attacks, store=store, **options)


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    store = Store(tmp_path)
    interrupted(store, 2)
    (tmp_path / "half-written.parquet.tmp").write_bytes(b"PAR1")
    again = Shift(calls=[])
    late = Shift(name="late", calls=[])
    resumed = run(attacks=[(again, ThreatModel(1)), (late, ThreatModel(2))], store=Store(tmp_path))
    assert not again.calls and late.calls
    straight = run(attacks=[(again, ThreatModel(1)), (late, ThreatModel(2))])
    for a, b in zip(resumed, straight, strict=True):
        assert a.as_dict() | {"seconds": 0} == b.as_dict() | {"seconds": 0}
        assert a.records == b.records


def test_parameters_that_share_a_name_with_the_key_do_not_hide_it(tmp_path):
    options = {"store": Store(tmp_path), "attacks": [(Shift(params={"method": "apgd-ce", "n": 3}), ThreatModel(2))]}
    names = {run(method=name, **options)[1].method for name in ("TeCoA", "FARE")}
    assert names == {"TeCoA", "FARE"} and len(list(tmp_path.glob("*.parquet"))) == 4


CHANGES = {
    "subset": {"data": DATA.take([0, 1, 2])},
    "other images": {"data": toy([65, 125, 127, 140, 129, 201], [0, 0, 0, 0, 1, 1])},
    "other labels": {"data": toy([65, 125, 127, 140, 129, 200], [0, 0, 0, 1, 1, 1])},
    "other weights": {"model": Threshold(11.0)},
    "fingerprint": {"fingerprint": "template set 2"},
    "seed": {"seed": 1},
    "method": {"method": "toy 2"},
    "surface": {"surface": Threshold(12.0)},
    "ε": {"attacks": [(Shift(calls=[]), ThreatModel(3))]},
    "parameters": {"attacks": [(Shift(calls=[], params={"n_restarts": 5}), ThreatModel(2))]},
    "source": {"attacks": [(Shift(calls=[], source="torchattacks"), ThreatModel(2))]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_key_is_computed_again(tmp_path, change):
    options = {"store": Store(tmp_path), "attacks": [(Shift(calls=[]), ThreatModel(2))]}
    run(**options)
    changed = options | CHANGES[change]
    attack = changed["attacks"][0][0]
    attack.calls.clear()
    rows = run(**changed)
    assert attack.calls
    assert rows[1].n == len(changed.get("data", DATA))


def test_changed_code_is_computed_again(tmp_path, monkeypatch):
    run(store=Store(tmp_path))
    monkeypatch.setattr(records_module, "code_sha256", lambda chapter: "other code")
    run(store=Store(tmp_path))
    assert len(list(tmp_path.glob("*.parquet"))) == 2


def test_a_damaged_or_foreign_cell_is_computed_again(tmp_path):
    run(store=Store(tmp_path))
    (path,) = tmp_path.glob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert run(store=Store(tmp_path))[0].value == 5 / 6
    assert path.read_bytes() == whole or len(path.read_bytes()) > len(whole) // 2  # mended
    run(data=DATA.take([0, 1, 2]), store=Store(tmp_path))
    small = next(p for p in tmp_path.glob("*.parquet") if p != path)
    path.write_bytes(small.read_bytes())  # a subset's file under the whole cell's name
    assert run(store=Store(tmp_path))[0].n == 6
    run(Threshold(-10.0), store=Store(tmp_path))
    other = next(p for p in tmp_path.glob("*.parquet") if p not in (path, small))
    path.write_bytes(other.read_bytes())  # as many images, but of other weights
    assert run(store=Store(tmp_path))[0].value == 5 / 6


def test_unwritable_and_full_are_one_line_with_the_path(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=re.escape(str(blocked))):
        run(store=Store(blocked / "cells"))

    def full(path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*card\.json: No space left on device"):
        write_whole(tmp_path / "card.json", full)
    assert not (tmp_path / "card.json").exists()
