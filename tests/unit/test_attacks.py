"""Own attacks against torchattacks and plain loops on the same start; adapters against their traps."""

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from robustvlm_lite.attacks import (
    cross_entropy,
    get_attack,
    kl,
    margin,
    pgd,
    registry,
    value_and_grad,
    zero_gradient_share,
)
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel, audit

LINF, L2 = ThreatModel(4), ThreatModel(100, "l2")


class Net(nn.Module):
    """Smooth, small, with a dropout and a batch norm that would show a wrong mode."""

    def __init__(self, n_classes=6, size=16, seed=0, scale=25.0, smooth=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8 * (size // 2) ** 2, n_classes)
        self.scale, self.act = scale, nn.Tanh() if smooth else nn.ReLU()
        self.eval()

    def forward(self, x):
        return self.scale * self.head(self.drop(self.act(self.norm(self.conv(x)))).flatten(1))


def batch(n=5, size=16, seed=0, dtype=torch.float32):
    return torch.rand(n, 3, size, size, generator=generator("images", seed)).to(dtype)


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def keys(n, run="test"):
    return [(0, run, i) for i in range(n)]


# --- own PGD against references


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("smooth", [True, False])
def test_pgd_equals_torchattacks_from_the_same_start(random_start, smooth):
    model, x = Net(smooth=smooth), batch(4)  # a power of two: their batch mean changes no bit of a gradient's sign
    y = predicted(model, x)
    torch.manual_seed(3)
    start = torch.empty_like(x).uniform_(-LINF.eps, LINF.eps) if random_start else "zero"
    torch.manual_seed(3)
    theirs = torchattacks.PGD(model, eps=LINF.eps, alpha=LINF.eps / 4, steps=10, random_start=random_start)(x, y)
    ours = pgd(cross_entropy(model, y), x, LINF, n_steps=10, start=start, keep="last")
    assert (theirs != x).float().mean() > 0.9
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("random_start", [False, True])
def test_l2_pgd_equals_torchattacks_from_the_same_start(random_start):
    model, x = Net(), batch()
    y, alpha = predicted(model, x), 30 / 255
    start = "zero"
    if random_start:
        torch.manual_seed(3)
        delta = torch.empty_like(x).normal_()
        radius = torch.zeros(len(x), 1, 1, 1).uniform_(0, 1)
        start = delta * radius / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * L2.eps
    torch.manual_seed(3)
    theirs = torchattacks.PGDL2(model, eps=L2.eps, alpha=alpha, steps=10, random_start=random_start)(x, y)
    ours = pgd(cross_entropy(model, y), x, L2, n_steps=10, step_255=30, start=start, keep="last")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert audit(x, ours, L2).max_l2_255 > 90


def test_best_iterate_equals_a_plain_loop():
    """Steps far too large, so that the objective goes up and down and the last iterate is not the best."""
    model, x = Net(), batch()
    y = predicted(model, x)
    threat, step, objective = ThreatModel(16), 24 / 255, margin(Net(), y)
    best, best_value, last = x, torch.full((len(x),), -torch.inf), x.clone()
    for _ in range(7):
        last = last.detach().requires_grad_()
        z = model(last)
        value = z.scatter(1, y[:, None], -torch.inf).max(1).values - z.gather(1, y[:, None])[:, 0]
        better = value >= best_value
        best = torch.where(better.view(-1, 1, 1, 1), last.detach(), best)
        best_value = torch.where(better, value.detach(), best_value)
        (grad,) = torch.autograd.grad(value.sum(), last)
        moved = last.detach() + step * grad.sign()
        last = torch.max(torch.min(moved, x + threat.eps), x - threat.eps).clamp(0, 1)
    z = model(last)
    value = z.scatter(1, y[:, None], -torch.inf).max(1).values - z.gather(1, y[:, None])[:, 0]
    best = torch.where((value >= best_value).view(-1, 1, 1, 1), last, best)
    ours = {k: pgd(objective, x, threat, n_steps=7, step_255=24, start="zero", keep=k) for k in ("best", "last")}
    torch.testing.assert_close(ours["best"], best, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["last"], last, rtol=0, atol=1e-6)
    assert (ours["best"] != ours["last"]).any()


@pytest.mark.parametrize("make", [cross_entropy, margin])
def test_first_step_climbs_as_finite_differences_say(make):
    """In float64: the perturbation of one small step is the sign of the central difference at each pixel."""
    model, x = Net(size=8).double(), batch(2, 8, dtype=torch.float64) * 0.8 + 0.1
    y, h, tiny = predicted(model, x), 1e-5, ThreatModel(0.01)
    objective = make(model, y)
    step = pgd(objective, x, tiny, n_steps=1, step_255=0.01, start="zero", keep="last") - x
    for index in [(c, i, j) for c in range(3) for i in range(0, 8, 3) for j in range(0, 8, 3)]:
        up, down = x.clone(), x.clone()
        up[:, *index] += h
        down[:, *index] -= h
        slope = (objective(up) - objective(down)) / (2 * h)
        clear = slope.abs() > 1e-6
        assert torch.equal(step[:, *index].sign()[clear], slope.sign()[clear])
        _, grad = value_and_grad(objective, x)
        torch.testing.assert_close(grad[:, *index], slope.detach(), rtol=1e-5, atol=1e-7)


def test_objectives_equal_their_definitions():
    model, x = Net(), batch()
    y = torch.tensor([0, 1, 2, 3, 4])
    z = model(x).double()
    p = z.softmax(1)
    others = [[v for j, v in enumerate(row.tolist()) if j != k] for row, k in zip(z, y.tolist(), strict=True)]
    expected = {
        cross_entropy(model, y): -p[range(5), y].log(),
        margin(model, y): torch.tensor([max(o) for o in others]).double() - z[range(5), y],
        kl(model, torch.zeros(5, 6)): (1 / 6 * ((1 / 6) / p).log()).sum(1),
    }
    for objective, value in expected.items():
        torch.testing.assert_close(objective(x).double(), value, rtol=1e-4, atol=1e-5)


# --- what PGD promises


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("start", ["uniform", "corner", "zero"])
def test_pgd_stays_in_the_budget_and_hurts(threat, start):
    model, x = Net(), batch()
    objective = cross_entropy(model, predicted(model, x))
    x_adv = pgd(objective, x, threat, n_steps=5, start=start, generators=generator("b"))
    assert audit(x, x_adv, threat).changed == 1 and not x_adv.requires_grad
    assert (objective(x_adv) > objective(x) + 0.2).all()


def test_more_steps_never_lower_the_best_value():
    model, x = Net(smooth=False), batch()
    objective = cross_entropy(model, predicted(model, x))
    options = {"step_255": 12, "generators": None, "start": "zero"}
    values = [objective(pgd(objective, x, ThreatModel(8), n_steps=n, **options)) for n in range(8)]
    rises = torch.stack(values).diff(dim=0)
    assert (rises >= 0).all() and (rises > 0).any() and (rises == 0).any()  # some steps overshoot, so "best" is needed


def test_more_restarts_never_lower_the_best_value():
    model, x = Net(smooth=False), batch()
    objective = cross_entropy(model, predicted(model, x))
    for keep in ("best", "last"):
        args = {"n_steps": 2, "keep": keep}
        values = [
            objective(pgd(objective, x, LINF, n_restarts=n, generators=[generator(i) for i in range(5)], **args))
            for n in (1, 3, 6)
        ]
        rises = torch.stack(values).diff(dim=0)
        assert (rises >= 0).all() and (rises > 0).any()


def test_no_steps_return_the_projected_start():
    x = batch()
    wild = torch.full_like(x, 0.5)
    out = pgd(lambda z: z.sum((1, 2, 3)), x, LINF, n_steps=0, start=wild, keep="last")
    torch.testing.assert_close(out, (x + LINF.eps).clamp(max=1))


def test_parameter_gradients_and_the_callers_images_are_not_touched():
    model, x = Net(), batch()
    y, copy = predicted(model, x), x.clone()
    pgd(cross_entropy(model, y), x, LINF, n_steps=2, start="zero")
    assert all(p.grad is None for p in model.parameters())
    model.head.bias.grad = torch.ones(6)
    pgd(cross_entropy(model, y), x, LINF, n_steps=2, start="zero")
    assert torch.equal(model.head.bias.grad, torch.ones(6)) and torch.equal(x, copy) and not x.requires_grad


def test_pgd_works_under_no_grad_and_on_frozen_models():
    model, x = Net(), batch()
    objective = cross_entropy(model, predicted(model, x))
    expected = pgd(objective, x, LINF, n_steps=3, start="zero")
    model.requires_grad_(False)
    with torch.no_grad():
        got = pgd(objective, x, LINF, n_steps=3, start="zero")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_keeps_its_budget(dtype):
    model, x = Net().to(dtype), batch(dtype=dtype)
    objective = cross_entropy(model, predicted(model, x))
    x_adv = pgd(objective, x, ThreatModel(1), n_steps=4, generators=generator("d"))
    assert x_adv.dtype == dtype
    assert audit(x, x_adv, ThreatModel(1)).max_linf_255 > 0.5
    assert (objective(x_adv) > objective(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_steps_below_its_own_resolution(dtype):
    x = torch.full((2, 3, 4, 4), 0.75, dtype=dtype)
    x_adv = pgd(lambda z: z.flatten(1).sum(1), x, ThreatModel(4), n_steps=80, step_255=0.05, start="zero")
    assert audit(x, x_adv, ThreatModel(4)).max_linf_255 > 3.9


def test_examples_do_not_influence_each_other():
    model, x = Net().double(), batch(dtype=torch.float64)
    y = predicted(model, x)
    for spec in ("pgd-4x2", "cw-4", "noisex3", "pgd-3-paper"):
        attack = get_attack(spec)
        together = attack.run(model, x, y, LINF, keys(5))
        alone = [attack.run(model, x[i : i + 1], y[i : i + 1], LINF, keys(5)[i : i + 1]) for i in range(5)]
        backwards = attack.run(model, x.flip(0), y.flip(0), LINF, keys(5)[::-1]).flip(0)
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
        torch.testing.assert_close(together, backwards, rtol=0, atol=1e-12)
        assert not torch.equal(together, attack.run(model, x, y, LINF, keys(5, "other seed")))


@pytest.mark.parametrize("broken_step, what", [(0, "objective"), (2, "objective"), (3, "objective"), (1, "gradient")])
def test_a_nan_stops_and_names_its_step(broken_step, what):
    calls = []

    def objective(x):
        calls.append(None)
        value = x.flatten(1).sum(1)
        if len(calls) - 1 < broken_step:
            return value
        return value * float("nan") if what == "objective" else (x - x.detach()).abs().sqrt().flatten(1).sum(1)

    with pytest.raises(RuntimeError, match=f"{what} is NaN or infinite at step {broken_step}, for 5 of 5"):
        pgd(objective, batch(), LINF, n_steps=3, start="zero")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_steps": -1}, "n_steps"),
        ({"n_steps": 2.0}, "n_steps"),
        ({"n_restarts": 0}, "n_restarts"),
        ({"start": "zero", "n_restarts": 2}, "fixed start"),
        ({"step_255": 0}, "step_255"),
        ({"step_255": float("nan")}, "step_255"),
        ({"keep": "worst"}, "keep"),
        ({"start": "unifrom"}, "did you mean 'uniform'"),
        ({"start": torch.zeros(1, 3, 2, 2)}, "match the images"),
        ({"start": "uniform"}, "pass generators= or start='zero'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        pgd(lambda x: x.flatten(1).sum(1), batch(), LINF, **({"start": "zero"} | options))


def test_bad_images_and_objectives_are_refused():
    x = batch()
    with pytest.raises(UserError, match="uint8"):
        pgd(lambda z: z.flatten(1).sum(1), (255 * x).to(torch.uint8), LINF, start="zero")
    with pytest.raises(UserError, match="before CLIP normalisation"):
        pgd(lambda z: z.flatten(1).sum(1), 4 * x - 2, LINF, start="zero")
    with pytest.raises(UserError, match="one per image"):
        pgd(lambda z: z.mean(), x, LINF, start="zero")
    with pytest.raises(UserError, match="no_grad or detach"):
        pgd(lambda z: z.detach().flatten(1).sum(1), x, LINF, start="zero")


def test_an_empty_batch_comes_back_empty():
    for spec in ("pgd-2", "apgd-ce-5", "autoattack-5"):
        out = get_attack(spec).run(Net(), torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.int64), LINF, [])
        assert out.shape == (0, 3, 16, 16)


# --- the half-precision quirk


def confident(y, n_classes, size, gap):
    """A model whose true-class margin is about `gap` on every image, with a gradient that does not vanish."""

    class Confident(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(n_classes, size, scale=0.1)

        def forward(self, x):
            return self.net(x) + gap * F.one_hot(y, n_classes)

    return Confident()


def test_float16_batch_mean_loses_the_gradient_of_confident_images():
    x, y = batch(4), torch.tensor([0, 1, 2, 3])
    sure, unsure = confident(y, 6, 16, 16.0), confident(y, 6, 16, 0.0)
    try:
        share = zero_gradient_share(cross_entropy(sure, y, quirk_fp16_mean=True), x)
    except RuntimeError as error:
        pytest.skip(f"no float16 autocast on this CPU: {error}")
    assert (share == 1).all()
    assert (zero_gradient_share(cross_entropy(sure, y), x) < 0.01).all()
    assert (zero_gradient_share(cross_entropy(unsure, y, quirk_fp16_mean=True), x) < 0.5).all()
    objective = cross_entropy(sure, y, quirk_fp16_mean=True)
    assert torch.equal(pgd(objective, x, LINF, n_steps=3, start="zero"), x)  # the attack cannot move
    assert not torch.equal(pgd(cross_entropy(sure, y), x, LINF, n_steps=3, start="zero"), x)


def test_quirk_is_the_mean_over_the_released_batch():
    model, x = Net(), batch()
    y = predicted(model, x)
    ratio = cross_entropy(model, y)(x) / cross_entropy(model, y, quirk_fp16_mean=True, mean_over=128)(x)
    torch.testing.assert_close(ratio, torch.full((5,), 128.0), rtol=0.05, atol=0)


def test_zero_gradient_share_counts_pixels():
    x = batch(2)
    share = zero_gradient_share(lambda z: z[:, :, :4].flatten(1).square().sum(1), x)
    torch.testing.assert_close(share, torch.full((2,), 0.75, dtype=torch.float64))


# --- attacks by name


LINF_ATTACKS = [
    "noise",
    "noise-corner",
    "fgsm",
    "bim-5",
    "mifgsm-5",
    "ta-pgd-5",
    "pgd-5",
    "pgd-5x2",
    "pgd-5-paper",
    "pgd-5-released",
    "cw-5",
    "cw-5-paper",
    "apgd-ce-8",
    "apgd-dlr-8",
    "apgd-t-8",
    "fab-t-8",
    "square-40",
    "autoattack-5",
    "autoattack-5-released",
    "pgd-2+apgd-ce-5",
]
L2_ATTACKS = ["noise", "pgd-5", "ta-pgd-5", "cw-l2-5", "apgd-ce-8", "apgd-t-8", "fab-t-8", "square-40", "autoattack-5"]


@pytest.mark.parametrize("spec, threat", [(s, LINF) for s in LINF_ATTACKS] + [(s, L2) for s in L2_ATTACKS])
def test_every_attack_stays_in_the_budget_and_leaves_the_model_as_it_was(spec, threat):
    model, x = Net(), batch()
    y = predicted(model, x)
    model.train()
    model.norm.eval()  # torchattacks would switch it to train mode
    model.head.bias.grad = torch.ones(6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.random.get_rng_state()
    with torch.no_grad():
        x_adv = get_attack(spec).run(model, x, y, threat, keys(5))
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert model.training and model.drop.training and not model.norm.training
    assert torch.equal(model.head.bias.grad, torch.ones(6)) and model.conv.weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not x_adv.requires_grad and x_adv.dtype == x.dtype
    audit(x, x_adv, threat)
    model.eval()
    objective = margin(model, y)
    changed = (x_adv != x).flatten(1).any(1)
    if spec.startswith("noise"):
        assert changed.all()
    else:
        assert (objective(x_adv) > objective(x)).sum() >= 4 and changed.sum() >= 4


@pytest.mark.parametrize(
    "spec, threat",
    [
        *((spec, ThreatModel(1)) for spec in ("apgd-ce-6", "apgd-t-6", "square-30", "ta-pgd-4", "autoattack-4")),
        *((spec, ThreatModel(20, "l2")) for spec in ("apgd-ce-6", "apgd-t-20", "square-30", "cw-l2-12")),
    ],
)
def test_torchattacks_examples_do_not_influence_each_other(spec, threat):
    """A weak budget keeps some images correct, so that the batch shrinks from component to component."""
    model, x = Net(seed=1), batch(5)
    model.conv.weight.data *= 20  # far from linear, so that the start matters
    y = predicted(model, x)
    attack = get_attack(spec)
    together = attack.run(model, x, y, threat, keys(5))
    alone = torch.cat([attack.run(model, x[i : i + 1], y[i : i + 1], threat, keys(5)[i : i + 1]) for i in range(5)])
    same = (together - alone).abs() < 1e-5
    assert same.float().mean() > 0.999  # a gradient of 1e-9 may change sign with the batch size
    torch.manual_seed(99)
    assert torch.equal(attack.run(model, x, y, threat, keys(5)), together)
    if spec != "cw-l2-12":  # the only one without a random start
        assert not torch.equal(attack.run(model, x, y, threat, keys(5, "other seed")), together)


def test_targeted_apgd_draws_for_the_images_that_are_left(monkeypatch):
    """A stand-in that returns its start and fools the first image at once, the second at the next class."""

    def attack_single_run(self, x, y):
        start = torch.rand(x.shape)
        still_correct = torch.ones(len(x), dtype=torch.bool)
        still_correct[0] = False
        return x, still_correct, None, start

    monkeypatch.setattr(torchattacks.APGDT, "attack_single_run", attack_single_run)
    model, x = Net(), batch(3)
    found = get_attack("apgd-t-2").run(model, x, predicted(model, x), LINF, keys(3))
    for i in range(3):
        g = generator(*keys(3)[i])
        draws = [torch.rand((3, 16, 16), generator=g) for _ in range(i + 1)]
        assert torch.equal(found[i], draws[-1])


def test_adapters_pass_their_settings_on():
    model, x = Net(), batch()
    y, threat = predicted(model, x), ThreatModel(2)
    eps = threat.eps
    theirs = {
        "fgsm": torchattacks.FGSM(model, eps=eps),
        "bim-5": torchattacks.BIM(model, eps=eps, alpha=eps / 4, steps=5),
        "mifgsm-5": torchattacks.MIFGSM(model, eps=eps, alpha=eps / 4, steps=5),
    }
    for spec, attack in theirs.items():
        ours = get_attack(spec).run(model, x, y, threat, keys(5))
        torch.testing.assert_close(ours, attack(x, y), rtol=0, atol=1e-6)
    assert get_attack("fgsm").step_255(threat) == 2 and get_attack("bim-5").step_255(threat) == 0.5


def test_targeted_apgd_tries_every_wrong_class_up_to_nine():
    counts = {}
    for n_classes in (4, 12):
        model, x = Net(n_classes, scale=0.01), batch(1)  # too flat to be fooled by a tiny budget
        model.head.bias.data[0] = 1e4
        forwards = []
        model.register_forward_hook(lambda *_, log=forwards: log.append(None))
        get_attack("apgd-t-3").run(model, x, torch.tensor([0]), ThreatModel(0.01), keys(1))
        counts[n_classes] = len(forwards) - 1  # one to see what is still correct
    assert counts == {4: 3 * 5, 12: 9 * 5}  # clean logits, start, three steps; for three and for nine targets


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


def test_apgd_returns_what_fools_and_else_its_best_iterate(monkeypatch):
    def attack_single_run(self, x, y):
        assert self.get_logits(x).dtype == torch.float32
        return torch.full_like(x, 0.25), torch.tensor([True, False, True]), None, torch.full_like(x, 0.75)

    class Half(Net):
        def forward(self, x):
            return super().forward(x).half()

    monkeypatch.setattr(torchattacks.APGD, "attack_single_run", attack_single_run)
    model, x = Half(), batch(3)
    found = get_attack("apgd-ce-2").run(model, x, predicted(model, x), LINF, keys(3))
    assert found[:, 0, 0, 0].tolist() == [0.25, 0.75, 0.25]


def test_cw_moves_a_model_whose_logits_are_negative():
    """torchattacks compares the true logit with max(other logits, 0), so negative logits look already fooled."""
    model, x = Net(), batch()
    y = predicted(model, x)
    model.head.bias.data -= 100
    x_adv = get_attack("cw-l2-20").run(model, x, y, ThreatModel(255, "l2"), keys(5))
    assert (predicted(model, x_adv) != y).any()


def test_too_few_classes_are_refused_with_a_mend():
    x = batch(2)
    for spec, n_classes in (("apgd-dlr-3", 2), ("apgd-t-3", 2), ("apgd-t-3", 3), ("autoattack-3-released", 2)):
        model = Net(n_classes)
        model.head.weight.data *= 0.01  # keeps the part before it from fooling everything
        with pytest.raises(UserError, match="expected at least [34] classes.*'apgd-ce' and 'square'"):
            get_attack(spec).run(model, x, predicted(model, x), ThreatModel(0.01), keys(2))
    model = Net(2)
    audit(x, get_attack("apgd-ce-3+square-5").run(model, x, predicted(model, x), LINF, keys(2)), LINF)


def test_adapter_refuses_other_dtypes_and_norms():
    model, x = Net(), batch()
    y = predicted(model, x)
    with pytest.raises(UserError, match="float32.*x.float"):
        get_attack("fgsm").run(model.double(), x.double(), y, LINF, keys(5))
    model.float()
    with pytest.raises(UserError, match="expected norm linf, got l2"):
        get_attack("fgsm").run(model, x, y, L2, keys(5))
    with pytest.raises(UserError, match="expected norm l2, got linf"):
        get_attack("cw-l2-5").run(model, x, y, LINF, keys(5))


class NanLogits(Net):
    """From the second call on: NaN logits for the last image."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        z = super().forward(x)
        return z if self.calls == 1 else torch.cat([z[:-1], z[-1:] * float("nan")])


class NanGradient(Net):
    """Finite logits whose gradient is infinite times zero."""

    def forward(self, x):
        return super().forward(x) + (x - x.detach()).abs().sqrt().mean()


@pytest.mark.parametrize("broken", [NanLogits, NanGradient])
@pytest.mark.parametrize("spec", ["pgd-3", "fgsm", "bim-3", "mifgsm-3", "apgd-ce-3", "apgd-t-3", "fab-t-3", "cw-l2-3"])
def test_a_model_that_returns_nan_does_not_look_robust(broken, spec):
    threat, x = (L2 if spec == "cw-l2-3" else LINF), batch()
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        get_attack(spec).run(broken(), x, predicted(Net(), x), threat, keys(5))


def test_nan_logits_are_noticed_by_an_attack_without_gradients():
    x = batch()
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        get_attack("square-3").run(NanLogits(), x, predicted(Net(), x), LINF, keys(5))


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


def test_a_random_model_keeps_its_own_noise_and_is_reproducible():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn(7, 3, 16, 16)[: len(x)] + 0 * torch.rand(1))

    model, x = Noisy(), batch()
    y, tiny = predicted(model, x), ThreatModel(0.1)
    assert (predicted(model, x) == y).any()  # something is left to attack
    for spec in ("pgd-2", "apgd-ce-3", "square-5"):
        torch.manual_seed(1)
        first = get_attack(spec).run(model, x, y, tiny, keys(5))
        torch.manual_seed(2)
        assert not torch.equal(first, x)
        assert torch.equal(get_attack(spec).run(model, x, y, tiny, keys(5)), first)


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
