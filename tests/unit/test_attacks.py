"""Own PGD and its objectives against torchattacks, plain loops and finite differences from the same start."""

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn
from toy_net import L2, LINF, Net, batch, keys, predicted

from robustvlm_lite.attacks import cross_entropy, get_attack, margin, pgd, value_and_grad, zero_gradient_share
from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import ThreatModel, audit

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
