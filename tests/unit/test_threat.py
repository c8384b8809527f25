"""The threat model against closed forms, and the audit against violations planted on purpose."""

import numpy as np
import pytest
import torch

from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.threat import AuditError, ThreatModel, audit, check_images, to_8bit


def images(n=4, size=8, seed=0, grid=False):
    x = torch.rand(n, 3, size, size, generator=generator("threat", seed))
    return (255 * x).round() / 255 if grid else x


@pytest.mark.parametrize("eps", [0, 0.0, -1, float("nan"), float("inf"), 255.1, True, "1", None])
def test_absurd_budgets_are_refused(eps):
    with pytest.raises(UserError, match="eps_255"):
        ThreatModel(eps)


def test_threat_model_accepts_numpy_numbers_and_names_its_norms():
    assert ThreatModel(np.float32(2)).eps == 2 / 255
    assert ThreatModel(255, "l2").eps == 1.0
    with pytest.raises(UserError, match="'linf' or 'l2'"):
        ThreatModel(1, "l1")


@pytest.mark.parametrize(
    "x, message",
    [
        (np.zeros((1, 3, 4, 4), np.float32), "ndarray"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8.*divide"),
        (torch.zeros(3, 4, 4), "B, 3, H, W"),
        (torch.zeros(1, 1, 4, 4), "B, 3, H, W"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), r"got \[inf, inf\]"),
        (torch.linspace(-1.92, 2.15, 48).view(1, 3, 4, 4), r"expected pixels in \[0, 1\], got \[-1.92, 2.15\]; pass"),
    ],
)
def test_check_images_says_what_came(x, message):
    with pytest.raises(UserError, match=message) as error:
        check_images(x)
    assert "\n" not in str(error.value)


def test_check_images_accepts_images_and_an_empty_batch():
    check_images(images())
    check_images(torch.empty(0, 3, 4, 4))


def test_linf_projection_is_the_nearest_point():
    """Coordinates are independent, so the nearest allowed value can be searched on a fine grid."""
    threat, x = ThreatModel(8), images(1, 4, grid=True).double()
    x_adv = x + 0.2 * torch.randn(x.shape, generator=generator("p"), dtype=torch.float64)
    out = threat.project(x_adv, x)
    for clean, wild, got in zip(*(t.flatten().tolist() for t in (x, x_adv, out)), strict=True):
        allowed = np.linspace(max(clean - threat.eps, 0), min(clean + threat.eps, 1), 2001)
        assert abs(got - allowed[np.abs(allowed - wild).argmin()]) < 1e-4


def test_l2_projection_scales_only_what_is_outside():
    threat, x = ThreatModel(255, "l2"), torch.full((2, 3, 8, 8), 0.5)
    delta = torch.zeros_like(x)
    delta[0, 0, 0, 0], delta[1, 0, 0, 0], delta[1, 1, 2, 3] = 0.3, 3.0, 4.0
    out = threat.project(x + delta, x) - x
    torch.testing.assert_close(out[0], delta[0])
    # (3, 4) has norm 5: the ball leaves (0.6, 0.8), the box then cuts at white, 0.5 above the middle
    assert out[1, 0, 0, 0].item() == pytest.approx(0.5) and out[1, 1, 2, 3].item() == pytest.approx(0.5)
    free = ThreatModel(100, "l2").project(x + delta, x) - x
    assert free[1].norm().item() == pytest.approx(100 / 255) and free[1, 0, 0, 0].item() == pytest.approx(60 / 255)
    assert torch.equal(threat.project(x, x), x)  # a zero perturbation divides by zero inside


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_projection_keeps_budget_and_dtype(norm, dtype):
    threat, x = ThreatModel(1 if norm == "linf" else 60, norm), images(6, seed=3).to(dtype)
    out = threat.project(x + 0.1 * torch.randn(x.shape, generator=generator("q")).to(dtype), x)
    assert out.dtype == dtype
    audit(x, out, threat)
    assert (out != x).any()


def test_step_is_the_steepest_ascent_of_each_norm():
    z, grad = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    grad[0, 0, 0] = torch.tensor([3.0, -4.0])
    sign = ThreatModel(1).step(z, grad, 0.1)
    unit = ThreatModel(1, "l2").step(z, grad, 0.1)
    torch.testing.assert_close(sign[0, 0, 0], torch.tensor([0.1, -0.1]))
    torch.testing.assert_close(unit[0, 0, 0], torch.tensor([0.06, -0.08]))
    assert not sign[1].any() and not unit[1].any()  # no gradient, no move, no NaN


@pytest.mark.parametrize("norm, eps", [("linf", 4), ("l2", 40)])
def test_random_starts_fill_the_ball(norm, eps):
    threat, x = ThreatModel(eps, norm), torch.full((400, 3, 2, 2), 0.5)

    def size(delta):
        return (delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)) / threat.eps

    inside = size(threat.random_start(x, generator("s")))
    assert inside.max() <= 1 + 1e-6
    # in d = 12 dimensions the largest coordinate (or the norm) of a uniform point is below r with probability r^12
    assert (inside < 0.9).float().mean().item() == pytest.approx(0.9**12, abs=0.07)
    torch.testing.assert_close(size(threat.random_start(x, generator("s"), corner=True)), torch.ones(400))


def test_random_start_depends_on_its_own_generator_and_stays_an_image():
    threat, x = ThreatModel(8), images(3)
    x[:, 0] = 1.0

    def gens(ids):
        return [generator("start", i) for i in ids]

    together = threat.random_start(x, gens([0, 1, 2]))
    torch.testing.assert_close(threat.random_start(x[1:2], gens([1])), together[1:2], rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])
    assert (x + together).max() <= 1 and together[:, 0].max() <= 0
    with pytest.raises(UserError, match="one generator per image"):
        threat.random_start(x, gens([0, 1]))


@pytest.mark.parametrize("eps", [0.5, 1, 1.5, 2, 3.7, 4, 8])
def test_8bit_images_lie_on_the_grid_inside_the_budget_and_are_the_nearest(eps):
    threat = ThreatModel(eps)
    for seed in range(20):
        x = images(2, 6, seed, grid=True)
        x_adv = threat.project(x + 0.05 * torch.randn(x.shape, generator=generator("8", seed)), x)
        out = to_8bit(x_adv, x, threat)
        levels, center, wish = (255 * out.double()).round(), (255 * x.double()).round(), 255 * x_adv.double()
        assert torch.equal(out, levels.to(torch.uint8).float() / 255)
        assert (levels - center).abs().max() <= eps
        for move in (-1, 1):  # the neighboring level is either farther from x_adv or outside the budget or the range
            other = levels + move
            farther = (other - wish).abs() >= (levels - wish).abs() - 1e-3
            barred = ((other - center).abs() > eps) | (other < 0) | (other > 255)
            assert (farther | barred).all()


def test_8bit_below_one_level_leaves_the_clean_image():
    x = images(2, grid=True)
    x_adv = ThreatModel(0.9).project(x + 0.9 / 255, x)
    assert torch.equal(to_8bit(x_adv, x, ThreatModel(0.9)), x)


def test_8bit_in_l2_keeps_the_budget_and_most_of_the_perturbation():
    threat = ThreatModel(64, "l2")
    for seed in range(20):
        x = images(3, 8, seed, grid=True)
        x_adv = threat.project(x + 0.1 * torch.randn(x.shape, generator=generator("l2", seed)), x)
        out = to_8bit(x_adv, x, threat)
        assert torch.equal(out, (255 * out).round() / 255)
        measured = audit(x, out, threat)
        assert measured.max_l2_255 > 55 and measured.changed == 1.0


def test_audit_measures_what_is_there():
    x = torch.full((4, 3, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[1, 0, 0, 0] += 1 / 255
    x_adv[2, :, 0, 0] -= 0.5 / 255
    got = audit(x, x_adv, ThreatModel(1))
    assert (got.n, got.changed) == (4, 0.5)
    assert got.max_linf_255 == pytest.approx(1, abs=1e-4) and got.max_l2_255 == pytest.approx(1, abs=1e-4)
    assert got.max == pytest.approx(0.5 + 1 / 255) and got.min == pytest.approx(0.5 - 0.5 / 255)
    assert audit(x[:0], x[:0], ThreatModel(1)).n == 0


@pytest.mark.parametrize(
    "norm, plant, message",
    [
        ("linf", lambda a: a[2, 0, 0, 0].add_(1.01 / 255), r"image 2 \(1 of 3\): linf distance 1.0100/255, allowed 1"),
        ("l2", lambda a: a[1, 0, 0].add_(0.8 / 255), r"image 1 .*l2 distance 1.13"),
        ("linf", lambda a: a[0, 0, 0, 0].fill_(float("nan")), "image 0 .*NaN"),
        ("linf", lambda a: a[1, 0, 0, 0].fill_(1.002), r"image 1 .*allowed \[0, 1\]"),
        ("linf", lambda a: a[1, 0, 0, 0].fill_(-0.002), r"image 1 .*allowed \[0, 1\]"),
    ],
)
def test_audit_catches_planted_violations(norm, plant, message):
    x = torch.full((3, 3, 2, 2), 0.5)
    x[1, 0, 0] = torch.tensor([0.0, 1.0]) if "allowed \\[0" in message else 0.5
    x_adv = x.clone()
    audit(x, x_adv, ThreatModel(1, norm))
    plant(x_adv)
    with pytest.raises(AuditError, match=message):
        audit(x, x_adv, ThreatModel(1, norm))


def test_audit_refuses_other_shapes_and_integers():
    x = images(2)
    for wrong in (x[:1], (255 * x).to(torch.uint8)):
        with pytest.raises(AuditError, match="expected floating images"):
            audit(x, wrong, ThreatModel(1))


def test_audit_agrees_that_truncation_to_8_bits_can_leave_the_budget():
    """The released A-TPT code truncates; rounding inside the budget does not have that fault."""
    threat, x = ThreatModel(4), images(8, 16, grid=True)
    x_adv = threat.random_start(x, generator("t"), corner=True) + x
    truncated = (255 * x_adv).floor() / 255
    with pytest.raises(AuditError, match="linf distance 5"):
        audit(x, truncated, threat)
    audit(x, to_8bit(x_adv, x, threat), threat)
