"""Masking checks and worst cases of text, on a captioner whose attack has a closed form and on broken copies of it."""

from types import SimpleNamespace

import pytest
import torch
from toy_captioner import Leaning, backwards, right_at_pictures, sparse, task_of, uneven

from robustvlm_lite.attacks import pgd
from robustvlm_lite.attacks.captions import on_texts
from robustvlm_lite.book.caption_checks import masking_checks
from robustvlm_lite.book.captioning import measure_texts, texts_of, worst_of
from robustvlm_lite.records import column
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import AuditError, ThreatModel

WEIGHT = uneven()
PLAIN = Leaning(WEIGHT)
EPS_255 = 1.3


class Rounded(Leaning):
    """Weights that are lost in float32 beside a large number, and there in float64."""

    def lean(self, x):
        coarse = (self.weight + 2e7) - 2e7 if self.weight.dtype == torch.float32 else self.weight
        return (self.normalize(x) * coarse).sum((1, 2, 3))


def failed(model, task):
    return {c.name for c in masking_checks(model, task, EPS_255) if not c.passed}


def test_a_plain_model_passes_every_check():
    assert failed(PLAIN, task_of(PLAIN)) == set()


BROKEN = {
    "most pixels have no gradient": (Leaning(WEIGHT, sparse), "a gradient reaches the image"),
    "float32 loses the weights": (Rounded(WEIGHT), "float32 is exact enough"),
    "the gradient points backwards": (Leaning(WEIGHT, backwards), "more steps, more loss"),
    "backwards, and noise does better": (Leaning(WEIGHT, backwards), "noise is weaker"),
    "a right gradient at pictures only": (Leaning(WEIGHT, right_at_pictures), "one step is weaker"),
    "nothing moves its text": (Leaning(WEIGHT, backwards), "a large budget wins"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_each_check_catches_what_it_is_for(why):
    model, name = BROKEN[why]
    assert name in failed(model, task_of(PLAIN))


# --- cells and worst cases


class Nothing:
    """A store that keeps nothing."""

    def get(self, key):
        return None

    def put(self, key, cell):
        pass


@pytest.fixture
def run():
    rows = []
    return SimpleNamespace(store=Nothing(), card=SimpleNamespace(add=rows.append, rows=rows), seed=0)


def by_pgd(model, x, truth, prompt, index, *, n_steps=8, source=None, eps_255=EPS_255):
    objective = on_texts(source or model, truth, prompt)
    return pgd(objective, x, ThreatModel(eps_255), n_steps=n_steps, generators=[generator("toy", i) for i in index])


def measured(run, model, task, name, by):
    return measure_texts(run, model, task, "toy", 0, attack=name, eps_255=EPS_255, craft=by)


def test_a_cell_is_the_closed_form(run):
    """A linear lean moves by 2 ε Σ|w| at most: exactly the images that lie nearer to 0 lose their word."""
    task, model = task_of(PLAIN, 64), PLAIN
    kept = model.lean(task.pixels).abs() > 2 * EPS_255 / 255 * WEIGHT.abs().sum()
    row = measured(run, model, task, "pgd", by_pgd)
    assert 5 < kept.sum() < 59
    assert column(row.records, "correct").tolist() == kept.tolist() and row.value == kept.float().mean().item()
    assert measure_texts(run, model, task, "toy", 0).value == 1
    assert [t == w for t, w in zip(texts_of(row), task.truth, strict=True)] == kept.tolist()


def test_the_worst_case_is_the_and_of_its_members_and_says_what_the_worst_said(run):
    """Each attack leaves every second image alone, so that neither finds what both find together."""

    def every_second(model, x, truth, prompt, index, *, parity):
        x_adv = by_pgd(model, x, truth, prompt, index)
        return torch.where(torch.tensor(index)[:, None, None, None] % 2 == parity, x_adv, x)

    task, model = task_of(PLAIN, 64), PLAIN
    rows = [measured(run, model, task, f"half-{k}", lambda *args, k=k: every_second(*args, parity=k)) for k in (0, 1)]
    whole = measured(run, model, task, "whole", by_pgd)
    worst, said = worst_of(run, rows)
    assert worst.value < min(row.value for row in rows) and worst.extra["attacks"] == ["half-0", "half-1"]
    assert column(worst.records, "correct").tolist() == column(whole.records, "correct").tolist()
    assert said == texts_of(whole) and run.card.rows[-1] is worst


def test_more_steps_never_lower_the_success_where_the_objective_decides_the_word(run):
    model = Leaning(WEIGHT, lambda x: x + 0.2 * (40 * x).sin())  # sign steps overshoot
    task = task_of(model, 64)
    rights = [
        column(measured(run, model, task, f"pgd-{k}", lambda *args, k=k: by_pgd(*args, n_steps=k)).records, "correct") for k in (1, 2, 4, 8)
    ]
    assert all((after <= before).all() for before, after in zip(rights, rights[1:], strict=False))
    assert rights[-1].sum() < rights[0].sum()


def test_transfer_lies_between_noise_and_an_attack_on_the_model_itself(run):
    models = {"one": PLAIN, "other": Leaning(WEIGHT + 0.8 * uneven(1))}
    for name, source in (("one", "other"), ("other", "one")):
        model, task = models[name], task_of(models[name], 64)
        values = [
            measured(run, model, task, "noise", lambda *args: by_pgd(*args, n_steps=0)),
            measured(run, model, task, "transfer", lambda *args, s=source: by_pgd(*args, source=models[s])),
            measured(run, model, task, "pgd", by_pgd),
        ]
        assert values[0].value > values[1].value > values[2].value


def test_an_attack_beyond_its_budget_makes_no_cell(run):
    task, model = task_of(PLAIN), PLAIN
    with pytest.raises(AuditError, match="allowed 1.3/255"):
        measured(run, model, task, "pgd", lambda *args: by_pgd(*args, eps_255=EPS_255 + 1))


def test_a_worst_case_needs_attacks_on_one_model(run):
    clean = measure_texts(run, PLAIN, task_of(PLAIN), "toy", 0)
    with pytest.raises(UserError, match="expected robust_acc rows"):
        worst_of(run, [clean])
