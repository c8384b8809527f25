"""Evaluation, its records, its store. Models and attacks are toys whose right answers are known by hand."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from robustvlm_lite import records as records_module
from robustvlm_lite.data.imageset import ImageSet
from robustvlm_lite.evaluate import PassCounter, clean_row, evaluate, images_row, paired, weights_sha256, worst_case
from robustvlm_lite.records import CELL, SCHEMA, Store, column, select, verdicts, write_whole
from robustvlm_lite.runtime import UserError, eval_mode, generator
from robustvlm_lite.stats import wilson
from robustvlm_lite.threat import AuditError, ThreatModel


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above 0.5; the margin is twice the distance to it, times a scale."""

    def __init__(self, scale=10.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        z = self.scale * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-z, z], dim=1)


@dataclass(frozen=True)
class Shift:
    """Moves every pixel by `share` of the budget against the label; `calls` counts the images it was given."""

    name: str = "shift-1"
    share: float = 1.0
    source: str = "own"
    params: dict = field(default_factory=dict)
    n_steps: int = 1
    calls: list = field(default_factory=list, compare=False)

    def step_255(self, threat):
        return threat.eps_255

    def run(self, model, x, y, threat, keys):
        self.calls.append(list(keys))
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
        away = (1 - 2 * y.float())[:, None, None, None]
        return (x.detach() + self.share * threat.eps * away).clamp(0, 1)


class Jitter(Shift):
    """A random perturbation that depends on the image's key only."""

    def run(self, model, x, y, threat, keys):
        noise = torch.stack([torch.rand(x.shape[1:], generator=generator(*key)) for key in keys])
        return (x + threat.eps * (2 * noise - 1)).clamp(0, 1)


def toy(levels, labels, name="toy/gray"):
    """Gray 4x4 images of the given 8-bit levels."""
    images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return ImageSet(name, images, torch.tensor(labels), ("dark", "bright"), ("a {} image",))


# Distances to 127.5:           62.5, 2.5, 0.5, wrong, 1.5, 72.5
DATA = toy([65, 125, 127, 140, 129, 200], [0, 0, 0, 0, 1, 1])


def run(model=None, data=DATA, attacks=(), **options):
    options = {"method": "toy", "batch_size": 4, "progress": False} | options
    return evaluate(model or Threshold(), data, list(attacks), **options)


def test_rows_values_and_records():
    clean, robust, robust_8bit = run(attacks=[(Shift(), ThreatModel(2))])
    assert (clean.metric, clean.attack, clean.eps_255, clean.n, clean.value) == ("clean_acc", "none", 0.0, 6, 5 / 6)
    assert clean.ci95 == wilson(5, 6)
    # ε = 2 flips the images at distance 0.5 and 1.5; the one that was wrong stays wrong.
    assert (robust.metric, robust.attack, robust.eps_255, robust.value) == ("robust_acc", "shift-1", 2.0, 3 / 6)
    assert robust_8bit.metric == "robust_acc_8bit" and robust_8bit.value == 3 / 6
    assert robust.records.schema == SCHEMA
    assert SCHEMA.names[:10] == [*CELL, "index", "label", "prediction", "correct", "margin"]
    assert SCHEMA.names[10:] == ["prediction_8bit", "correct_8bit", "linf_255"]
    assert column(robust.records, "correct").tolist() == [True, True, False, False, False, True]
    assert column(robust.records, "index").tolist() == list(range(6))
    assert column(robust.records, "linf_255") == pytest.approx([2, 2, 2, 0, 2, 2], abs=1e-3)  # image 3: not attacked
    # margin = 2 * 10 * distance / 255, minus the move of 2 levels where attacked
    expected = [20 * d / 255 for d in (60.5, 0.5, -1.5, -12.5, -0.5, 70.5)]
    assert column(robust.records, "margin") == pytest.approx(expected, abs=1e-4)


def test_only_correct_images_are_attacked_and_that_changes_nothing():
    attack = Shift(calls=[])
    threat = ThreatModel(20)
    robust = run(attacks=[(attack, threat)])[1]
    assert [key[-1] for keys in attack.calls for key in keys] == [0, 1, 2, 4, 5]
    # Attacking all: image 3 (wrong when clean) would be pushed further away; an attacker who may also leave an image
    # alone wins exactly where the clean or the attacked image is wrong.
    x, y = DATA.pixels(), DATA.labels
    model = Threshold()
    fooled = model(Shift(calls=[]).run(model, x, y, threat, range(6))).argmax(1) != y
    wrong = model(x).argmax(1) != y
    assert column(robust.records, "correct").tolist() == (~(fooled | wrong)).tolist()


def test_a_lucky_attack_does_not_repair_a_clean_error():
    class Helpful(Shift):
        def run(self, model, x, y, threat, keys):
            return (x + threat.eps * (2 * y.float() - 1)[:, None, None, None]).clamp(0, 1)

    robust = run(attacks=[(Helpful(), ThreatModel(20))])[1]
    assert not column(robust.records, "correct")[3]


def test_keys_make_results_independent_of_batch_size_and_order():
    attacks = [(Jitter(name="jitter"), ThreatModel(3))]
    one, many = run(attacks=attacks, batch_size=1)[1], run(attacks=attacks, batch_size=6)[1]
    assert column(one.records, "margin") == pytest.approx(column(many.records, "margin"), abs=1e-5)
    assert one.records.drop(["margin"]) == many.records.drop(["margin"])
    other = run(attacks=attacks, seed=1)[1]
    assert not np.allclose(column(one.records, "margin"), column(other.records, "margin"), atol=1e-5)
    attack = Shift(calls=[])
    run(attacks=[(attack, ThreatModel(2))], seed=7)
    assert attack.calls[0][1] == (7, "toy/gray", "shift-1", 2.0, 1)


def test_8bit_verdict_differs_where_rounding_undoes_the_attack():
    # A move of 0.6 levels crosses the border at 127.5 in floats, but the only 8-bit image within 0.75 is the clean one.
    data = toy([127, 127], [0, 0])
    model = Threshold()
    robust, rounded = run(model, data, [(Shift(share=0.8), ThreatModel(0.75))])[1:]
    assert robust.value == 0.0 and rounded.value == 1.0
    assert column(robust.records, "correct_8bit").all()


def test_passes_are_counted_on_the_attack_only():
    clean, robust, _ = run(attacks=[(Shift(), ThreatModel(2))])
    assert (clean.image_forwards, clean.image_backwards) == (6, 0)
    assert (robust.image_forwards, robust.image_backwards) == (5, 5)
    assert robust.seconds > 0


def test_pass_counter_sees_every_backward():
    model = Threshold()
    x = torch.rand(3, 3, 4, 4, requires_grad=True)
    with PassCounter(model) as counter:
        loss = model(x).sum()
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x)
        with torch.no_grad():
            model(x)
    model(x)
    assert (counter.forwards, counter.backwards) == (6, 6)


def test_the_attack_meets_the_surface_and_the_verdict_the_model():
    class Watched(Threshold):
        seen = 0

        def forward(self, x):
            self.seen += len(x)
            return super().forward(x)

    model, surface = Watched(), Watched()
    robust = run(model, attacks=[(Shift(), ThreatModel(2))], surface=surface)[1]
    assert surface.seen == 5 == robust.image_forwards
    assert model.seen == 6 + 2 * 5  # clean, float verdict, 8-bit verdict


def test_eval_mode_inside_own_mode_after():
    model = nn.Sequential(Threshold(), nn.Dropout(0.9))
    model[0].eval()
    assert run(model)[0].value == 5 / 6  # dropout off
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert model[1].training


def test_verdict_ignores_autocast():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    z, y = model(DATA.pixels()).detach(), DATA.labels
    full = z.gather(1, y[:, None]) - z.gather(1, 1 - y[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(DATA.pixels()).dtype == torch.bfloat16  # what a verdict must not use
        assert column(run(model)[0].records, "margin") == pytest.approx(full[:, 0].numpy(), abs=1e-6)


def test_l2_rows_have_their_own_name():
    class L2Shift(Shift):
        def run(self, model, x, y, threat, keys):
            return x

    rows = run(attacks=[(Shift(), ThreatModel(2)), (L2Shift(), ThreatModel(2, "l2"))])
    assert [row.attack for row in rows[1::2]] == ["shift-1", "l2-shift-1"]
    assert rows[3].extra["norm"] == "l2"


def test_extra_tells_the_caption():
    robust = run(attacks=[(Shift(params={"n_restarts": 3}), ThreatModel(2))], seed=5)[1]
    assert robust.extra == {"seed": 5, "norm": "linf", "source": "own", "n_restarts": 3, "n_steps": 1, "step_255": 2.0}
    assert "records" not in robust.as_dict() and robust.as_dict()["ci95"] == list(robust.ci95)


class Overshoot(Shift):
    def run(self, model, x, y, threat, keys):
        return (x + 1.5 * threat.eps).clamp(0, 1)


def test_every_batch_is_audited():
    with pytest.raises(AuditError, match="linf"):
        run(attacks=[(Overshoot(), ThreatModel(2))])


def test_nan_logits_name_data_set_and_batch():
    class Broken(Threshold):
        def forward(self, x):
            z = super().forward(x)
            return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.7, torch.nan, z)

    with pytest.raises(UserError, match=r"toy · toy/gray · clean: .*images 4 to 5"):
        run(Broken())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": DATA.take(torch.arange(0))}, "0 images"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"attacks": [(Shift(), ThreatModel(2)), (Shift(share=0.5), ThreatModel(2))]}, "once per ε"),
    ],
)
def test_unusable_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        run(**options)
    assert "\n" not in str(error.value)


# ---- worst case and pairs


def test_worst_case_is_the_and_of_the_attacks():
    class Odd(Shift):
        """Fools image 0 only."""

        def run(self, model, x, y, threat, keys):
            hit = torch.tensor([key[-1] == 0 for key in keys])
            return torch.where(hit[:, None, None, None], (x + threat.eps).clamp(0, 1), x)

    rows = run(attacks=[(Shift(share=0.05), ThreatModel(70)), (Odd(name="odd"), ThreatModel(70))])
    worst = worst_case(rows)
    assert [row.value for row in rows[1::2]] == [2 / 6, 4 / 6]  # {0, 5} and {1, 2, 4, 5} are left
    assert (worst.metric, worst.attack, worst.value, worst.n) == ("robust_acc_worst", "worst", 1 / 6, 6)
    assert worst.ci95 == wilson(1, 6)
    assert worst.extra["attacks"] == ["shift-1", "odd"]
    assert worst.image_forwards == sum(row.image_forwards for row in rows[1::2])
    correct, margin = column(worst.records, "correct"), column(worst.records, "margin")
    assert correct.tolist() == [False] * 5 + [True] and ((margin > 0) == correct).all()
    assert (column(worst.records, "prediction") == column(worst.records, "label")).tolist() == correct.tolist()


def test_worst_case_refuses_a_mixture():
    rows = run(attacks=[(Shift(), ThreatModel(1)), (Shift(), ThreatModel(2))])
    with pytest.raises(UserError, match="one method"):
        worst_case(rows)
    with pytest.raises(UserError, match="none"):
        worst_case(rows[:1])


def test_paired_difference_and_its_refusal():
    a, b = run()[0].records, run(attacks=[(Shift(), ThreatModel(2))])[1].records
    diff, lo, hi = paired(a, b)
    assert diff == pytest.approx(2 / 6) and lo <= diff <= hi
    with pytest.raises(UserError, match="same images"):
        paired(a, run(data=DATA.take([0, 1]))[0].records)
    with pytest.raises(UserError, match="unequal label"):
        paired(a, run(data=DATA.take([5, 4, 3, 2, 1, 0]))[0].records)


def test_verdicts_of_a_row_come_back_from_all_records():
    import pyarrow as pa

    rows = run(attacks=[(Shift(), ThreatModel(2)), (Shift(name="half", share=0.5), ThreatModel(2))])
    everything = pa.concat_tables([row.records for row in rows[::-2]])
    for row in [*rows, worst_case(rows)]:
        index, correct = verdicts(everything, row.as_dict())
        assert index.tolist() == list(range(6)) and correct.mean() == row.value
    assert len(select(everything, attack="half", eps_255=2)) == 6
    with pytest.raises(UserError, match="one record per image"):
        verdicts(everything, rows[1].as_dict() | {"method": "absent"})


# ---- the store


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


def test_weights_hash():
    a, b = Threshold(), Threshold()
    assert weights_sha256(a) == weights_sha256(b)
    with torch.no_grad():
        b.scale += 1e-6
    assert weights_sha256(a) != weights_sha256(b)
    half = nn.Linear(2, 2).to(torch.bfloat16)
    assert len(weights_sha256(half)) == 64


def test_progress_bar_names_the_cell_and_can_be_silent(capfd):
    run(attacks=[(Shift(), ThreatModel(2))], progress=False)
    assert capfd.readouterr().err == ""
    run(attacks=[(Shift(), ThreatModel(2))], progress=True)
    assert "toy · toy/gray · shift-1" in capfd.readouterr().err


def test_clean_row_of_ready_logits_is_that_of_evaluate():
    data, model = toy([40, 200, 100, 160], [0, 1, 1, 0]), Threshold()
    with torch.no_grad():
        logits = model(data.pixels())
    ready = clean_row(logits, data, method="toy", seed=3)
    (row,) = evaluate(model, data, [], method="toy", seed=3, progress=False)
    assert (ready.value, ready.n, ready.ci95, ready.metric) == (row.value, row.n, row.ci95, "clean_acc")
    assert ready.records.equals(row.records) and ready.data_sha256 == row.data_sha256
    with pytest.raises(UserError, match=f"logits .N, C. of every image of {data.name}"):
        clean_row(logits[:-1], data, method="toy")
    with pytest.raises(UserError, match="finite logits"):
        clean_row(logits * torch.nan, data, method="toy")


def test_row_of_images_made_elsewhere_tells_how_far_each_moved():
    data, model = toy([40, 200, 100, 160], [0, 1, 1, 0]), Threshold()
    x_adv = data.pixels() + torch.tensor([0.0, -0.5, 0.25, 3.0])[:, None, None, None] / 255  # the last far out of range
    x_adv[1] = 0.1  # and one that is another picture
    with torch.no_grad():
        logits = model(x_adv)
    row = images_row(logits, x_adv, data, method="toy ← other", attack="shift-1", eps_255=1.0, seed=3)
    assert (row.metric, row.attack, row.eps_255, row.n, row.extra) == ("robust_acc", "shift-1", 1.0, 4, {"seed": 3})
    assert column(row.records, "correct").tolist() == [True, False, False, False] and row.value == 1 / 4
    assert column(row.records, "linf_255") == pytest.approx([0, 200 - 25.5, 0.25, 3], abs=1e-3)
    clean = images_row(model(data.pixels()).detach(), data.pixels(), data, method="toy", attack="none", eps_255=0.0, seed=3)
    assert clean.metric == "clean_acc"
    assert clean.records.equals(evaluate(model, data, [], method="toy", seed=3, progress=False)[0].records)
    with pytest.raises(UserError, match=r"expected attacked images \[4, 3, 4, 4\], got \[3, 3, 4, 4\]"):
        images_row(logits, x_adv[:3], data, method="toy", attack="shift-1", eps_255=1.0)
