"""The battery passes a plain differentiable model and catches models and attacks that are broken on purpose."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustvlm_lite import sanity
from robustvlm_lite.attacks import get_attack
from robustvlm_lite.data.imageset import ImageSet
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.runtime import UserError
from robustvlm_lite.sanity import attack_order, battery
from robustvlm_lite.threat import ThreatModel

ALL = [
    "repeated forward",
    "batch composition",
    "gradient is not zero",
    "more ε never raises accuracy",
    "large ε reaches chance",
    "iterative ≥ single step",
    "noise does less",
    "transfer does less",
    "twice the steps change little",
    "undefended model falls",
]


class Linear(nn.Module):
    """Which of two fixed patterns does the image carry? Fragile by design: every pixel votes."""

    def __init__(self, scale=20.0):
        super().__init__()
        pattern = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.5
        self.weight = nn.Parameter(scale * torch.stack([-pattern, pattern]))

    def forward(self, x):
        return torch.einsum("bchw,kchw->bk", x - 0.5, self.weight)


def patterns(n=24):
    """Gray noise of which the pattern's sign is moved by 0.5 to 7.5 levels, up or down by class."""
    g = torch.Generator().manual_seed(0)
    pattern = Linear().weight[1].detach()
    labels = torch.arange(n) % 2
    noise = 20 * torch.randn(n, 3, 8, 8, generator=g)
    carried = torch.einsum("bchw,chw->b", noise, pattern) / pattern.square().sum()
    noise = noise - carried[:, None, None, None] * pattern  # the noise itself tells nothing
    strength = torch.linspace(0.5, 7.5, n) * (2 * labels - 1)
    images = 128 + noise + strength[:, None, None, None] * pattern.sign()
    return ImageSet("toy/patterns", images.round().clamp(0, 255).to(torch.uint8), labels, ("a", "b"), ("a {}",))


DATA = patterns()


def failed(model, **options):
    options = {"n": 16, "n_steps": 6, "eps_255": 2.0} | options
    return {check.name for check in battery(model, DATA, **options) if not check.passed}


def test_a_plain_model_passes_everything():
    checks = battery(Linear(), DATA, n=16, n_steps=6, eps_255=2.0, undefended=Linear(), transfer_from=Linear(30.0))
    assert [check.name for check in checks] == ALL
    assert [check.mark for check in checks] == ["✓"] * len(ALL)
    assert all(check.value and check.why.endswith(".") for check in checks)


def test_the_surface_is_what_is_differentiated():
    """A sound model, attacked through another one that points the other way, is never hurt."""
    turned = Linear(-20.0)
    assert failed(Linear()) == set() == failed(Linear(), surface=Linear(30.0))
    assert "large ε reaches chance" in failed(Linear(), surface=turned)
    assert "gradient is not zero" in failed(Linear(), surface=Linear(0.0))


def test_what_is_not_given_is_not_checked():
    names = [check.name for check in battery(Linear(), DATA, n=8, n_steps=2)]
    assert "transfer does less" not in names and "undefended model falls" not in names and len(names) == 8


class Wrapped(Linear):
    """A Linear with its input or output tampered with by `before` and `after`."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(super().forward(self.before(x)))


def test_rounded_input_masks_the_gradient():
    masked = Wrapped(before=lambda x: (x * 255).round() / 255)
    found = failed(masked, transfer_from=Linear(), eps_255=8.0)
    assert {"gradient is not zero", "large ε reaches chance", "transfer does less"} <= found


def test_straight_through_gradient_of_the_wrong_sign_is_caught():
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    found = failed(Wrapped(before=Reversed.apply), transfer_from=Linear(), eps_255=8.0)
    assert {"large ε reaches chance", "transfer does less"} <= found and "gradient is not zero" not in found


@pytest.mark.parametrize("frozen", [False, True])
def test_detached_input_has_no_gradient_and_is_not_attacked(frozen):
    model = Wrapped(before=torch.Tensor.detach).requires_grad_(not frozen)
    checks = battery(model, DATA, n=8)
    assert [check.name for check in checks] == ALL[:3]
    assert checks[2].mark == "✗" and checks[2].value == "no gradient reaches the image"


def test_random_forward_is_caught():
    assert "repeated forward" in failed(Wrapped(after=lambda z: z + 0.01 * torch.randn_like(z)))


def test_batch_norm_in_train_mode_is_caught():
    model = nn.Sequential(nn.BatchNorm2d(3), Linear())
    assert "batch composition" in failed(model.train())
    assert "batch composition" not in failed(model.eval())


def test_batch_statistics_that_eval_mode_does_not_stop_are_caught():
    assert "batch composition" in failed(Wrapped(before=lambda x: F.batch_norm(x, None, None, training=True) / 4 + 0.5))


def test_an_undefended_model_that_stands_is_caught():
    standing = Wrapped(before=lambda x: (x * 255).round() / 255)  # what the canary is for: the attack does not reach it
    assert "undefended model falls" in failed(Linear(), undefended=standing)


class Weaker:
    """get_attack with the steps of some attacks shrunk: an attack that does not get anywhere by itself."""

    def __init__(self, share):
        self.share = share

    def __call__(self, spec):
        attack = get_attack(spec)
        return replace(attack, params=attack.params | {"step_share": self.share}) if spec[:3] == "pgd" else attack


def test_an_attack_that_has_not_converged_is_caught(monkeypatch):
    monkeypatch.setattr(sanity, "get_attack", Weaker(1 / 12))  # 6 steps go half way, 12 all the way
    found = failed(Linear(), eps_255=9.0)
    assert "twice the steps change little" in found and "iterative ≥ single step" in found


def test_noise_that_beats_the_attack_is_caught():
    class Brittle(nn.Module):
        """Wrong wherever a pixel leaves the 8-bit grid; its gradient leads nowhere near that."""

        def forward(self, x):
            off_grid = ((255 * x - (255 * x).round()).abs() > 0.02).flatten(1).float().mean(1) > 0.5
            right = Linear()(x)
            return torch.where(off_grid[:, None], -right, right)

    class Whole:
        def __call__(self, spec):  # starts on the grid and moves along it
            attack = get_attack(spec)
            on_grid = {"start": "zero", "step_share": 1.0, "keep": "last"}
            return replace(attack, params=attack.params | on_grid) if spec[:3] == "pgd" else attack

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "get_attack", Whole())
        assert "noise does less" in failed(Brittle(), eps_255=1.0)


def test_more_budget_that_leaves_more_is_caught():
    def masked_far_away(x):
        """No gradient once a pixel leaves the middle of the range, where only a large budget takes it."""
        far = ((x - 0.5).abs() > 0.4).flatten(1).any(1)[:, None, None, None]
        return torch.where(far, x.detach() + 0 * x, x)

    checks = battery(Wrapped(before=masked_far_away), DATA, n=16, n_steps=6, eps_255=8.0)
    curve = next(check for check in checks if check.name == "more ε never raises accuracy")
    assert not curve.passed and curve.value.endswith("rises at 64/255")


# ---- the order of AutoAttack, PGD and CW


def rows_of(model, *specs, eps_255=6.0, method="toy"):
    attacks = [(get_attack(spec), ThreatModel(eps_255)) for spec in specs]
    return evaluate(model, DATA, attacks, method=method, progress=False)


def as_autoattack(rows):
    return [replace(row, attack="autoattack") for row in rows if row.metric == "robust_acc"]


def test_attack_order():
    strong, weak = rows_of(Linear(), "pgd-6"), rows_of(Linear(), "noise")
    assert attack_order([*as_autoattack(strong), *strong]).passed
    check = attack_order([*as_autoattack(weak), *strong])
    assert not check.passed and "toy on toy/patterns at 6/255: autoattack" in check.value
    other_eps = rows_of(Linear(), "pgd-6", eps_255=5.0)
    with pytest.raises(UserError, match="evaluate both"):
        attack_order([*as_autoattack(weak), *other_eps])
    assert not {c.name: c for c in battery(Linear(), DATA, n=4, n_steps=2, rows=[*as_autoattack(weak), *strong])}[
        "AutoAttack ≤ min(PGD, CW)"
    ].passed
