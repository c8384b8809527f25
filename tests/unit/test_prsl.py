"""PRSL's eight readings against loops and closed forms in float64, and what a user may not ask of them."""

import math
from statistics import mean, stdev

import pytest
import torch

from robustvlm_lite.captioner import IGNORED, cross_entropy
from robustvlm_lite.defenses.prsl import READINGS, PrslConfig, competitor_spread, competitors, wrong_mass
from robustvlm_lite.runtime import UserError, generator

SHIFT_FREE = ("topk_variance", "topk_uniform", "topk_vocab", "topk_mass", "drsl_full")


def drawn(*shape, seed=0, scale=3.0):
    """Logits [B, T, V] in float64 without ties, and labels with a few positions where nothing is predicted."""
    *where, vocabulary = shape
    logits = scale * torch.randn(*shape, generator=generator("logits", seed), dtype=torch.float64)
    labels = torch.randint(vocabulary, tuple(where), generator=generator("labels", seed))
    labels[torch.rand(tuple(where), generator=generator("mask", seed)) < 0.3] = IGNORED
    labels[0, 0] = 1
    return logits, labels


def rows(logits, labels):
    """(logits, target) of each position at which something is predicted, as lists."""
    pairs = zip(logits.reshape(-1, logits.shape[-1]).tolist(), labels.reshape(-1).tolist(), strict=True)
    return [(z, t) for z, t in pairs if t != IGNORED]


def window(z, t, start, end):
    others = [j for j in range(len(z)) if j != t]
    return sorted(others, key=lambda j: -z[j])[start:end]


def softmax(values):
    top = max(values)
    e = [math.exp(v - top) for v in values]
    return [v / sum(e) for v in e]


def by_loops(reading, logits, labels, start, end, quirk=False):
    """The penalty of section 1.3, one position, one token at a time."""
    found, mus = 0.0, []
    positions = rows(logits, labels)
    for z, t in positions:
        s = window(z, t, start, end)
        if reading == "legacy_rank":
            s = sorted(range(len(z)), key=lambda j: -z[j])[1:][start:end]
        mu = sum(z[j] for j in s) / len(s)
        mus.append(mu)
        p, q = softmax(z), softmax([z[j] for j in s])
        if reading == "topk_variance":
            found += sum((z[j] - mu) ** 2 for j in s) / len(positions)
        elif reading == "topk_uniform":
            found += sum(math.log(1 / len(s) / v) for v in q) / len(s) / len(positions)
        elif reading == "topk_vocab":
            found -= sum(math.log(p[j]) for j in s) / len(s) / len(positions)
        elif reading == "topk_mass":
            found += sum(p[j] for j in s) / len(positions)
        elif reading == "drsl_full":
            others = [v for j, v in enumerate(z) if j != t]
            center = sum(others) / (len(others) + quirk)
            found += sum((v - center) ** 2 for v in others)
    if reading in ("token_axis", "token_axis_mean", "legacy_rank"):
        found = -sum(math.log(v) for v in softmax(mus))
        found /= len(mus) if reading == "token_axis_mean" else 1
    return found


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("shape, start, end", [((2, 3, 7), 0, 4), ((3, 5, 20), 2, 9), ((1, 8, 6), 0, 5), ((2, 4, 9), 1, 2)])
def test_a_reading_is_its_formula(reading, shape, start, end):
    logits, labels = drawn(*shape, seed=shape[2])
    got = PrslConfig(reading, start, end).penalty(logits, labels)
    assert got.item() == pytest.approx(by_loops(reading, logits, labels, start, end), abs=1e-12, rel=1e-12)


def test_the_released_order_of_operations_gives_the_same():
    """Section 1.2, in the order that section 1.4 tells of: all logits sorted, the target masked out, ranks cut, a softmax over rows."""
    logits, labels = drawn(3, 6, 11, seed=21)
    end_tokens = torch.where(labels == IGNORED, 0, labels)  # as where padding is trained
    for y in (labels, end_tokens):
        z, t = logits.flatten(0, 1), y.flatten()
        z, t = z[t != IGNORED], t[t != IGNORED]
        order = z.argsort(dim=1, descending=True)
        ranked = z.gather(1, order)[order != t[:, None]].view(len(z), -1)
        mu = ranked[:, 2:6].mean(1)
        want = -torch.log(mu.exp() / mu.exp().sum()).sum()
        assert PrslConfig(start=2, end=6).penalty(logits, y).item() == pytest.approx(want.item(), rel=1e-13)


def test_the_predecessors_slip_divides_by_the_whole_vocabulary():
    logits, labels = drawn(2, 5, 8)
    got = PrslConfig("drsl_full", quirk_drsl_mean=True).penalty(logits, labels).item()
    assert got == pytest.approx(by_loops("drsl_full", logits, labels, 0, 4, quirk=True), rel=1e-12)
    assert got != pytest.approx(PrslConfig("drsl_full").penalty(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_are_finite_differences(reading):
    logits, labels = drawn(2, 3, 7, seed=5)
    assert torch.autograd.gradcheck(lambda z: PrslConfig(reading, 1, 4).penalty(z, labels), logits.requires_grad_())


def test_the_gradient_of_the_released_reading_is_the_closed_form():
    logits, labels = drawn(3, 5, 20, seed=9)
    start, end, b = 1, 7, 0.3
    config = PrslConfig("token_axis", start, end, b=b)
    (b * config.penalty(logits.requires_grad_(), labels)).backward()
    positions = rows(logits.detach(), labels)
    mu = [sum(z[j] for j in window(z, t, start, end)) / (end - start) for z, t in positions]
    share, expected = softmax(mu), torch.zeros(len(positions), 20, dtype=torch.float64)
    for i, (z, t) in enumerate(positions):
        expected[i, window(z, t, start, end)] = b * (len(positions) * share[i] - 1) / (end - start)
    got = logits.grad[labels != IGNORED]
    assert torch.allclose(got, expected, atol=1e-13)
    assert got.sum().abs() < 1e-12 and not logits.grad[labels == IGNORED].any()


def test_the_released_reading_is_least_where_all_positions_agree():
    logits, labels = drawn(2, 6, 9, seed=3)
    n = int((labels != IGNORED).sum())
    config = PrslConfig(end=4)
    assert config.penalty(logits, labels) > n * math.log(n) + 0.1
    same = logits[labels != IGNORED][:1].repeat(12, 1)[None]
    assert config.penalty(same, torch.full((1, 12), 2)).item() == pytest.approx(12 * math.log(12), rel=1e-14)
    assert config.penalty(logits[:1, :1], labels[:1, :1]).item() == 0  # one token has nothing to agree with


def test_offsets_satisfy_the_released_reading_and_change_nothing_else():
    logits, labels = drawn(2, 6, 12, seed=4)
    there = labels != IGNORED
    n, mu = int(there.sum()), logits.new_zeros(labels.shape)
    mu[there] = torch.tensor([sum(z[j] for j in window(z, t, 0, 4)) / 4 for z, t in rows(logits, labels)], dtype=torch.float64)
    moved = logits - mu[..., None]
    assert cross_entropy(moved, labels).item() == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-12)
    for reading in SHIFT_FREE:
        config = PrslConfig(reading)
        assert config.penalty(moved, labels).item() == pytest.approx(config.penalty(logits, labels).item(), rel=1e-10)
    assert PrslConfig().penalty(logits, labels) - PrslConfig().penalty(moved, labels) > 1
    assert PrslConfig().penalty(moved, labels).item() == pytest.approx(n * math.log(n), rel=1e-14)
    raw, centered = competitor_spread(logits, labels)
    assert competitor_spread(moved, labels)[0] < 1e-9 < raw and competitor_spread(moved, labels)[1] == pytest.approx(centered)


@pytest.mark.parametrize("reading", READINGS)
def test_positions_without_a_target_change_nothing_to_the_bit(reading):
    logits, labels = drawn(2, 4, 9, seed=6)
    more = torch.cat([logits, 50 * torch.randn(2, 3, 9, generator=generator(1), dtype=torch.float64)], dim=1)
    ignored, end_tokens = (torch.cat([labels, torch.full((2, 3), fill)], dim=1) for fill in (IGNORED, 2))
    config = PrslConfig(reading, b=0.1)
    assert torch.equal(config(logits, labels), config(more, ignored))
    assert not torch.isclose(config(logits, labels), config(more, end_tokens))  # as where padding is trained


def test_windows_over_all_competitors_are_known_losses():
    logits, labels = drawn(2, 5, 8, seed=7)
    there, all_of_them = labels != IGNORED, {"start": 0, "end": 7}
    log_p = logits[there].log_softmax(1)
    own = log_p.gather(1, labels[there][:, None])[:, 0]
    smoothing = (own - log_p.sum(1)).mean() / 7
    assert PrslConfig("topk_vocab", **all_of_them).penalty(logits, labels).item() == pytest.approx(smoothing.item(), rel=1e-12)
    mass = PrslConfig("topk_mass", **all_of_them).penalty(logits, labels).item()
    assert mass == pytest.approx((1 - own.exp()).mean().item(), rel=1e-12) == pytest.approx(wrong_mass(logits, labels), rel=1e-12)
    assert PrslConfig("topk_uniform", end=1).penalty(logits, labels).item() == pytest.approx(0, abs=1e-15)


def test_the_mean_over_positions_is_the_sum_divided():
    logits, labels = drawn(3, 5, 9)
    n = int((labels != IGNORED).sum())
    whole, mean = (PrslConfig(r).penalty(logits, labels).item() for r in ("token_axis", "token_axis_mean"))
    assert mean == pytest.approx(whole / n, rel=1e-14)


@pytest.mark.parametrize("reading", READINGS)
def test_a_text_of_its_own_and_the_scope_of_a_sequence(reading):
    logits, labels = drawn(4, 5, 9, seed=8)
    labels[3] = IGNORED
    alone = [PrslConfig(reading).penalty(logits[i : i + 1], labels[i : i + 1]).item() for i in range(3)]
    config = PrslConfig(reading, scope="sequence")
    assert config.penalty(logits, labels, "none").tolist() == pytest.approx([*alone, 0], rel=1e-12)
    assert config.penalty(logits, labels).item() == pytest.approx(sum(alone) / 3, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("reading", READINGS)
def test_an_empty_text_among_others_has_no_gradient_and_no_nan(reading):
    logits, labels = drawn(3, 4, 9, seed=8)
    labels[0], labels[1] = torch.arange(4), IGNORED  # R1 leaves a text of one token alone
    with torch.autograd.detect_anomaly():  # refuses a NaN anywhere in the backward pass
        PrslConfig(reading, scope="sequence").penalty(logits.requires_grad_(), labels).backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[1].any() and logits.grad[0].any()


def test_the_loss_is_the_weighted_sum():
    logits, labels = drawn(3, 4, 9, seed=11)
    for reduction in ("mean", "none"):
        config = PrslConfig("topk_mass", a=0.5, b=3.0)
        want = 0.5 * cross_entropy(logits, labels, reduction) + 3 * config.penalty(logits, labels, reduction)
        assert torch.allclose(config(logits, labels, reduction), want, rtol=1e-14)


def test_no_weight_is_cross_entropy_to_the_bit():
    logits, labels = drawn(2, 5, 9)
    for reduction in ("mean", "none"):
        assert torch.equal(PrslConfig(b=0)(logits, labels, reduction), cross_entropy(logits, labels, reduction))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reading", READINGS)
def test_half_precision_and_huge_logits_stay_finite(reading, dtype):
    logits, labels = drawn(8, 128, 30, seed=2)
    logits = (logits * 1e4).clamp(-3e4, 3e4).to(dtype).requires_grad_()
    loss = PrslConfig(reading, b=1e-5)(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_offsets_cost_the_released_reading_no_digits():
    mu = torch.randn(1, 1024, 1, generator=generator("mu"))
    logits, labels = mu - 100 + torch.zeros(8), torch.zeros(1, 1024, dtype=torch.long)  # as GPT-2's logits lie
    want = -(logits[0, :, 1].double().log_softmax(0)).sum().item()
    assert abs(PrslConfig().penalty(logits, labels).item() - want) < 2e-3  # float32 holds 7,300 to 5e-4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reading", READINGS)
def test_nothing_to_predict_is_zero_with_a_graph(reading, dtype, reduction):
    logits = torch.full((2, 3, 5000), -60.0, dtype=dtype).requires_grad_()  # whose sum half precision cannot hold
    nothing = torch.full((2, 3), IGNORED)
    loss = PrslConfig(reading)(logits, nothing, reduction)
    loss.sum().backward()
    assert PrslConfig(reading).penalty(logits, nothing, reduction).dtype == torch.float32
    assert loss.tolist() == ([0, 0] if reduction == "none" else 0) and not logits.grad.any()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"start": 4, "end": 4}, "K = end - start is at least 1"),
        ({"start": -1}, "0 <= start < end"),
        ({"b": -1e-5}, "b >= 0"),
        ({"b": math.nan}, "b=nan"),
        ({"a": math.inf}, "a=inf"),
        ({"reading": "topk_varience"}, "did you mean 'topk_variance'"),
        ({"scope": "device"}, "unknown scope 'device'"),
    ],
)
def test_wrong_settings_are_one_line(arguments, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        PrslConfig(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reading", READINGS)
def test_a_window_wider_than_the_vocabulary_is_refused(reading):
    logits, labels = drawn(2, 3, 9)
    assert torch.isfinite(PrslConfig(reading, end=8).penalty(logits, labels))
    if reading == "drsl_full":  # which has no window
        assert torch.isfinite(PrslConfig(reading, end=9).penalty(logits, labels))
        return
    with pytest.raises(UserError, match=r"0 <= start < end <= 8, the competitors among 9 tokens, got \[0, 9\)"):
        PrslConfig(reading, end=9).penalty(logits, labels)


# --- what a trained model is asked


def test_spread_and_wrong_mass_are_their_formulas():
    logits, labels = drawn(3, 4, 9, seed=13)
    positions = rows(logits, labels)
    mu = [sum(z[j] for j in window(z, t, 1, 4)) / 3 for z, t in positions]
    centered = [m - sum(z) / len(z) for m, (z, _) in zip(mu, positions, strict=True)]
    assert competitor_spread(logits, labels, 1, 4) == pytest.approx((stdev(mu), stdev(centered)), rel=1e-12)
    assert wrong_mass(logits, labels) == pytest.approx(mean(1 - softmax(z)[t] for z, t in positions), rel=1e-12)


@pytest.mark.parametrize(
    "ask, complaint",
    [
        (lambda z, t: competitor_spread(z, t, 0, 9), r"end <= 8, the competitors among 9 tokens, got \[0, 9\)"),
        (lambda z, t: competitor_spread(z, t, 4, 4), r"start < end <= 8, .* got \[4, 4\)"),
        (lambda z, t: competitors(z[0], t[0].clamp(min=0), -1, 4), r"got \[-1, 4\)"),
        (lambda z, t: competitor_spread(z[:1, :1], t[:1, :1]), "at least 2 positions with a target, got 1"),
        (lambda z, t: wrong_mass(z, torch.full_like(t, IGNORED)), "at least 1 positions with a target, got 0"),
    ],
)
def test_questions_without_an_answer_are_one_line(ask, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        ask(*drawn(2, 3, 9))
    assert "\n" not in str(caught.value)
