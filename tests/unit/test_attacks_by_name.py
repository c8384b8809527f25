"""Names, labels, ensembles and what `Attack.run` refuses."""

import pytest
import torch
from toy_net import LINF, Net, batch, keys, predicted

from robustvlm_lite.attacks import attack_on, get_attack, margin, pgd, registry
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel


def test_ensemble_attacks_only_what_is_still_correct():
    model, x = Net(), batch()
    y = predicted(model, x)
    y[0] = (y[0] + 1) % 6  # wrong before any attack
    sizes = []
    hook = model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    x_adv = get_attack("noise+pgd-5+apgd-ce-5").run(model, x, y, ThreatModel(16), keys(5))
    hook.remove()
    assert torch.equal(x_adv[0], x[0])
    assert sizes[0] == 5 and set(sizes[1:]) <= {1, 2, 3, 4}
    assert (predicted(model, x_adv) != y).all()


def test_ensemble_is_at_least_as_strong_as_each_component():
    model, x, threat = Net(), batch(6), ThreatModel(1)
    y = predicted(model, x)
    robust = {
        spec: (predicted(model, get_attack(spec).run(model, x, y, threat, keys(6))) == y)
        for spec in ("apgd-ce-10", "apgd-t-10", "apgd-ce-10+apgd-t-10")
    }
    both = robust["apgd-ce-10+apgd-t-10"]
    assert both.sum() <= min(robust["apgd-ce-10"].sum(), robust["apgd-t-10"].sum()) < 6


def test_ensemble_keeps_the_candidate_with_the_highest_margin():
    model, x, tiny = Net(), batch(), ThreatModel(0.2)
    y = predicted(model, x)
    first = get_attack("pgd-5").run(model, x, y, tiny, [(0, "test", "pgd-5", i) for i in range(5)])
    assert (predicted(model, first) == y).sum() >= 3  # the second component has something to try
    assert torch.equal(get_attack("pgd-5+noise").run(model, x, y, tiny, keys(5)), first)


def test_components_draw_different_random_numbers(monkeypatch):
    seen = []
    monkeypatch.setattr(registry, "generator", lambda *key: seen.append(key) or generator(*key))
    model, x = Net(), batch()
    get_attack("noise+noise-corner").run(model, x, predicted(model, x), ThreatModel(0.2), keys(5))
    assert len(seen) == len(set(seen)) == 10 and {key[-1] for key in seen} == set(range(5))


def test_an_attack_on_an_objective_of_ones_own_is_pgd_on_it():
    model, x = Net(), batch()
    y = predicted(model, x)

    def against_blue(model, x, y):
        return lambda x_adv: margin(model, y)(x_adv) - x_adv[:, 2].mean((1, 2))

    attack = attack_on(against_blue, "blue-pgd", n_steps=3)
    expected = pgd(against_blue(model, x, y), x, LINF, n_steps=3, generators=[generator(*key) for key in keys(5)])
    assert torch.equal(attack.run(model, x, y, LINF, keys(5)), expected)
    assert (attack.name, attack.n_steps, attack.step_255(LINF)) == ("blue-pgd", 3, 1.0)


def test_run_refuses_what_does_not_fit():
    model, x = Net(), batch()
    y, attack = predicted(model, x), get_attack("pgd-1")
    with pytest.raises(UserError, match="before CLIP normalisation"):
        attack.run(model, 4 * x - 2, y, LINF, keys(5))
    with pytest.raises(UserError, match="torch module"):
        attack.run(lambda z: model(z), x, y, LINF, keys(5))
    with pytest.raises(UserError, match="5 int64 labels"):
        attack.run(model, x, y.float(), LINF, keys(5))
    with pytest.raises(UserError, match="keys"):
        attack.run(model, x, y, LINF, keys(4))


def test_the_model_is_given_back_after_an_error():
    class Broken(Net):
        def forward(self, x):
            raise ValueError("broken")

    model = Broken().train()
    model.head.bias.grad = torch.ones(6)
    for spec in ("pgd-2", "apgd-ce-2"):
        with pytest.raises(ValueError, match="broken"):
            get_attack(spec).run(model, batch(), torch.zeros(5, dtype=torch.int64), LINF, keys(5))
        assert model.training and model.drop.training and model.head.bias.grad is not None


def test_run_leaves_the_callers_autocast_out():
    model, x, seen = Net(), batch(), []
    model.head.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        get_attack("pgd-1").run(model, x, predicted(model, x), LINF, keys(5))
    assert seen[0] == torch.bfloat16 and set(seen[1:]) == {torch.float32}


@pytest.mark.parametrize(
    "spec, source, n_steps, step_255",
    [
        ("pgd", "own", 20, 0.25),
        ("pgd-40x5", "own", 40, 0.25),
        ("pgd-100-paper", "own", 100, 1.0),
        ("noise", "own", 0, None),
        ("apgd-ce", "torchattacks", 100, None),
        ("square-200", "torchattacks", 200, None),
        ("autoattack", "torchattacks", 3 * 100 + 5000, None),
        ("autoattack-20", "torchattacks", 3 * 20 + 1000, None),
        ("pgd-20+apgd-ce-20", "own", 40, None),
    ],
)
def test_names_are_parsed(spec, source, n_steps, step_255):
    attack = get_attack(spec)
    assert (attack.name, attack.source, attack.n_steps) == (spec, source, n_steps)
    assert attack.step_255(ThreatModel(1)) == step_255


def test_labels_say_what_runs():
    assert get_attack("pgd-20x5").label == "PGD-20 (cross-entropy, step ε/4, uniform start, best iterate, 5 restarts)"
    assert get_attack("cw-100-paper").label == "PGD-100 (margin, step ε, uniform start, last iterate)"
    assert "float16 batch mean" in get_attack("pgd-100-released").label
    assert get_attack("noisex3").label == "random noise (uniform in the ball, no gradient, 3 restarts)"
    components = [part.name for part in get_attack("autoattack").components]
    assert components == ["apgd-ce-100", "apgd-t-100", "fab-t-100", "square-5000"]
    assert all(name.rsplit("-", 1)[0] in get_attack("autoattack").label for name in components)
    assert [p.name for p in get_attack("autoattack-released").components] == ["apgd-ce-100", "apgd-dlr-100"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("pdg-20", "did you mean 'pgd'"),
        ("PGD-20", "did you mean 'pgd'"),
        ("autoatack", "did you mean 'autoattack'"),
        ("zzzz", "known: "),
        ("", "unknown attack"),
        ("pgd-20+", "unknown attack"),
        ("pgd-0", "at least 1 step"),
        ("pgd-20x0", "at least 1 restart"),
        ("fgsm-3", "no number of steps"),
        ("apgd-ce-20x5", "for pgd, cw, noise, noise-corner only"),
        ("bim-10-paper", "expected a variant among pgd-paper"),
        ("cw-10-released", "expected a variant among"),
        (20, "expected a name"),
    ],
)
def test_wrong_names_are_refused(spec, message):
    with pytest.raises(UserError, match=message) as error:
        get_attack(spec)
    assert "\n" not in str(error.value)
