"""What chapter 08 measures, on a random captioner: rows, texts, worst cases and gains against what is computed apart."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robustvlm_lite.attacks import pgd
from robustvlm_lite.attacks.captions import on_texts
from robustvlm_lite.book import caption_checks, captioning, exercises_prsl, text_methods, text_tuning
from robustvlm_lite.captioner import cross_entropy, new_captioner
from robustvlm_lite.defenses.caption_tuning import load_tuned, save_tuned
from robustvlm_lite.defenses.prsl import PrslConfig
from robustvlm_lite.defenses.training import Training
from robustvlm_lite.records import select
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.scenes.duo import sample_duos, slots_right
from robustvlm_lite.stats import paired_bootstrap
from robustvlm_lite.text_metrics import CaptionMetrics
from robustvlm_lite.threat import AuditError, ThreatModel

SCENES = sample_duos(10, generator("captioning"))
SIZES = {"steps": 2, "batch": 4, "optimizer": "adamw", "lr": 1e-3, "warmup": 1, "precision": None}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(text_tuning.tuning_data, "__defaults__", (64,))


@pytest.fixture
def run(begin):
    return begin()


@pytest.fixture(scope="module")
def model():
    return new_captioner("tiny-vit-gpt2", seed=2).eval().requires_grad_(False)


class Parrot(torch.nn.Module):
    """Says one given text about each image, in their order, and another where a pixel was moved."""

    def __init__(self, clean, moved):
        super().__init__()
        self.clean, self.moved, self.pixels = clean, moved, SCENES.pixels()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, x, prompt=None):
        said = []
        for image in x:
            nearest = (self.pixels - image).abs().flatten(1).amax(1)
            i = int(nearest.argmin())
            said.append(self.moved[i] if nearest[i] > 0.5 / 255 else self.clean[i])
        return said


def push(model, x, truth, prompt, index):
    """Moves every image by one gray level."""
    return (x + 1 / 255).clamp(0, 1)


TRUE = SCENES.captions()
HALF = [t if i % 2 else "a " + t.split(" ", 1)[1].replace("big", "small") for i, t in enumerate(TRUE)]


def test_a_row_counts_right_texts_and_keeps_them(run):
    task = captioning.caption_task(SCENES)
    parrot = Parrot(TRUE, ["nothing"] * 3 + TRUE[3:])
    clean = captioning.measure_texts(run, parrot, task, "parrot", 0)
    row = captioning.measure_texts(run, parrot, task, "parrot", 0, attack="push", eps_255=1.0, craft=push, settings={"k": 1})
    assert (clean.value, clean.metric, row.value, row.metric) == (1.0, "clean_acc", 0.7, "robust_acc")
    assert captioning.texts_of(row) == ["nothing"] * 3 + TRUE[3:]
    right = slots_right(captioning.texts_of(row), SCENES.duos)
    margins = row.records["margin"].to_numpy()
    assert np.allclose(margins, np.where(right.all(1), 1, right.float().mean(1) - 1))
    assert row.records["linf_255"].to_numpy() == pytest.approx(1, abs=1e-3) and not clean.records["linf_255"].to_numpy().any()
    assert run.card.examples["text"].to_pylist() == TRUE + captioning.texts_of(row)
    assert select(run.card.examples, attack="push").num_rows == 10


def test_a_finished_cell_is_not_computed_again(run):
    task, calls = captioning.caption_task(SCENES), []

    def counted(*args):
        calls.append(1)
        return push(*args)

    rows = [captioning.measure_texts(run, Parrot(TRUE, HALF), task, "p", s, attack="push", eps_255=1.0, craft=counted) for s in (0, 0, 1)]
    assert len(calls) == 2 and rows[0].value == rows[1].value  # another training seed is another cell
    assert [row.extra["seed"] for row in rows] == [0, 0, 1]


def test_an_attack_outside_its_budget_is_refused(run):
    with pytest.raises(AuditError):
        captioning.measure_texts(run, Parrot(TRUE, TRUE), captioning.caption_task(SCENES), "p", 0, attack="push", eps_255=0.5, craft=push)


def test_the_worst_case_takes_the_text_with_the_fewest_right_slots(run):
    task, rows = captioning.caption_task(SCENES), []
    for name, moved in (("one", ["nothing", *TRUE[1:]]), ("two", [*TRUE[:1], *HALF[1:5], *TRUE[5:]])):
        rows.append(captioning.measure_texts(run, Parrot(TRUE, moved), task, "p", 0, attack=name, eps_255=1.0, craft=push))
    worst, texts = captioning.worst_of(run, rows)
    both = [slots_right(captioning.texts_of(row), SCENES.duos).all(1) for row in rows]
    assert worst.value == (both[0] & both[1]).double().mean().item() and worst.value <= min(row.value for row in rows)
    assert texts == ["nothing", *HALF[1:5], *TRUE[5:]]


def test_answers_are_right_where_they_equal_the_truth(run):
    task = captioning.answer_task(SCENES, 0)
    assert len(task.prompt) == 10 and set(task.truth[2::4]) == {"yes"} and set(task.truth[3::4]) == {"no"}
    given = [*task.truth[:6], *["zebra"] * 4]
    assert task.judge(given, range(10)).flatten().tolist() == [True] * 6 + [False] * 4


def test_differences_average_training_seeds_and_pair_images(run):
    task = captioning.caption_task(SCENES)
    said = {"a": [TRUE, HALF], "b": [HALF, HALF]}
    rows = {m: [captioning.measure_texts(run, Parrot(t, t), task, m, s) for s, t in enumerate(texts)] for m, texts in said.items()}
    half = slots_right(HALF, SCENES.duos).all(1).double().numpy()
    assert captioning.pooled_difference(rows["a"], rows["b"]) == paired_bootstrap((1 + half) / 2, half)


def test_gains_are_corrected_for_the_floor_and_a_constant_earns_nothing(run):
    metrics = CaptionMetrics(("rouge_l", "cider"))
    said = {"CE": (TRUE, HALF), "kept": (TRUE, TRUE), "constant": (["a thing"] * 10, ["a thing"] * 10)}
    kept = captioning.text_gains(run, metrics, said, base="CE", attack="worst", eps_255=1.0, dataset="toy")
    rows = {(r["method"], r["metric"]): r["value"] for r in run.card.as_dict()["rows"]}
    assert rows["kept", "rouge_l"] == pytest.approx(1) and rows["constant", "rouge_l_raw"] == rows["constant", "rouge_l_floor"] == 1
    assert ("constant", "rouge_l") not in rows and ("constant", "rouge_l_gain") not in rows and ("CE", "rouge_l_gain") not in rows
    score, floor = rows["CE", "rouge_l_raw"], rows["CE", "rouge_l_floor"]
    assert rows["CE", "rouge_l"] == pytest.approx((score - floor) / (1 - floor))
    assert rows["kept", "rouge_l_gain"] == pytest.approx(1 - rows["CE", "rouge_l"]) and set(kept) == set(said)


# --- fine-tuned captioners


def test_a_change_in_8_bits_comes_back_and_only_on_its_base(model, tmp_path):
    tuned = text_tuning.tune(model, cross_entropy, Training(**SIZES), progress=False)
    save_tuned(tuned, model, tmp_path / "t.safetensors", seed=0)
    loaded, facts = load_tuned(model, tmp_path / "t.safetensors")
    x = SCENES.pixels()
    step, rest = ((a.logits(x, TRUE)[0] - b.logits(x, TRUE)[0]).abs().max() for a, b in ((tuned, model), (loaded, tuned)))
    assert rest < 0.05 * step and facts["seed"] == 0
    other = new_captioner("tiny-vit-gpt2", seed=3)
    with pytest.raises(UserError, match="on the weights it was trained from"):
        load_tuned(other, tmp_path / "t.safetensors")


def test_a_method_is_trained_once_and_then_read(run, model, monkeypatch):
    run.sizes = SimpleNamespace(tuning=SIZES, eps_train=1.0)
    first = text_tuning.tuned(run, model, "PRSL, strong", 5)
    monkeypatch.setattr(text_tuning, "tune", lambda *a, **k: pytest.fail("trained again"))
    again = text_tuning.tuned(run, model, "PRSL, strong", 5)
    a, b = (m.model.state_dict() for m in (first, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(pytest.fail.Exception):
        text_tuning.tuned(run, model, "PRSL, strong", 6)


def test_training_attacks_stay_in_their_budget(model):
    x, drawn = SCENES.pixels(), generator("t")
    x_adv = text_tuning.training_attack(1.0)(model, x, TRUE, None, drawn)
    assert 0 < 255 * (x_adv - x).abs().max() <= 1 + 1e-3 and x_adv.amin() >= 0 and x_adv.amax() <= 1
    assert model.token_loss(x_adv, TRUE) > model.token_loss(x, TRUE)


def test_unknown_methods_name_the_near_miss():
    with pytest.raises(UserError, match="did you mean 'Label smoothing'"):
        text_methods.text_method("Label smothing")


def test_the_search_is_read_only_on_its_own_weights(model, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    monkeypatch.setattr(text_tuning, "asset", lambda *parts: path)
    loss = PrslConfig("topk_mass", b=1.0)
    entry = {"loss": repr(loss), "lr": 1e-3, "eps_255": 0.0, "clean": 0.9, "attacked": 0.4}
    found = {"base_sha256": model.weights_sha256, "n": 7, "eps_255": 1.5, "training": {"lr": 1e-3}}
    others = [entry | {"lr": 1e-4, "clean": 0.1}, entry | {"loss": "cross_entropy", "eps_255": 2.0}]
    path.write_text(json.dumps(found | {"runs": [entry, *others]}))
    searched = text_tuning.search_runs(model)
    assert searched[repr(loss)]["clean"] == 0.9 and (searched.n, searched.eps_255) == (7, 1.5)
    assert list(searched.each()) == ["topk_mass, K 4, b 1", "cross-entropy, images attacked at 2/255"]
    with pytest.raises(UserError, match="run data_scripts/tune_captioners.py --search again"):
        searched[repr(PrslConfig())]
    path.write_text(json.dumps(found | {"base_sha256": "other", "runs": []}))
    with pytest.raises(UserError, match="got it on others"):
        text_tuning.search_runs(model)


# --- checks of the attacks


def test_checks_pass_on_a_plain_model_and_fail_where_the_gradient_is_gone(model, monkeypatch):
    task = captioning.caption_task(SCENES)
    held = {c.name: c.passed for c in caption_checks.masking_checks(model, task, 2.0, n=4, n_steps=6)}
    assert held["a gradient reaches the image"] and held["float32 is exact enough"] and held["more steps, more loss"]
    whole = caption_checks.on_texts
    monkeypatch.setattr(caption_checks, "on_texts", lambda *a: lambda x: whole(*a)((x * 7).round() / 7 + 0 * x))
    gone = {c.name: c.passed for c in caption_checks.masking_checks(model, task, 2.0, n=4, n_steps=6)}
    assert not gone["a gradient reaches the image"] and not gone["more steps, more loss"]


def test_pgd_on_texts_is_what_the_chapter_calls(model):
    x, objective = SCENES.pixels()[:3], on_texts(model, TRUE[:3])
    found = pgd(objective, x, ThreatModel(2.0), n_steps=3, generators=[generator(i) for i in range(3)])
    assert (objective(found) > objective(x)).all()


# --- exercises


def test_exercises_accept_the_answer_and_refuse_likely_mistakes(capsys):
    exercises_prsl.check_bound(lambda n: n * np.log(n))
    exercises_prsl.check_centered(lambda z, t: PrslConfig().penalty((z - z.mean(1, keepdim=True))[None], t[None]))
    share = lambda a, b: sum(x == y for x, y in zip(a, b, strict=True)) / len(a)  # noqa: E731
    exercises_prsl.check_floor(lambda a, c: 0.0 if (f := share(a, c[1:] + c[:1])) == 1 else (share(a, c) - f) / (1 - f))
    assert capsys.readouterr().out.count("right") == 3
    for check, wrong in (
        (exercises_prsl.check_bound, lambda n: np.log(n)),
        (exercises_prsl.check_centered, lambda z, t: PrslConfig().penalty(z[None], t[None])),
        (exercises_prsl.check_floor, share),
    ):
        with pytest.raises(UserError):
            check(wrong)
