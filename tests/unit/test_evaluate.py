"""Evaluation, its records, its store. Models and attacks are toys whose right answers are known by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from toy_gray import DATA, Jitter, Shift, Threshold, run, toy

from robustvlm_lite.evaluate import PassCounter, clean_row, evaluate, images_row, paired, weights_sha256, worst_case
from robustvlm_lite.records import CELL, SCHEMA, column, select, verdicts
from robustvlm_lite.runtime import UserError, eval_mode
from robustvlm_lite.stats import wilson
from robustvlm_lite.threat import AuditError, ThreatModel


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
