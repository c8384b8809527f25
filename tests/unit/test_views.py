"""Masks, mixing, selection and weights of views against loops, NumPy and identities of the A-TPT specification."""

import math

import numpy as np
import pytest
import torch

from robustvlm_lite import views
from robustvlm_lite.runtime import UserError, generator


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator("views", seed)).to(dtype)


def unit(*shape, closeness=0.8, seed=0):
    """Unit features that look alike, as views of one image do."""
    common, own = normal(*shape[:-2], 1, shape[-1], seed=seed), normal(*shape, seed=seed + 1)
    return torch.nn.functional.normalize(closeness * common + (1 - closeness) * own, dim=-1)


# --- masks and mixing


@pytest.mark.parametrize("side", [7, 64, 224])
@pytest.mark.parametrize("r", [0.001, 0.2, 1 / 3, 0.999])
def test_the_mask_holds_exactly_the_highest_pixels(side, r):
    pictures = normal(2, 3, side, side).relu()  # half of the pixels tie at 0
    mask = views.protected(pictures, r)
    count = math.ceil(r * side * side)
    assert mask.dtype == torch.bool and (mask.sum((2, 3)) == count).all()
    for picture, chosen in zip(pictures.flatten(0, 1), mask.flatten(0, 1), strict=True):
        order = np.argsort(-picture.flatten().numpy(), kind="stable")  # among equals the first
        assert set(chosen.flatten().nonzero()[:, 0].tolist()) == set(order[:count].tolist())


def test_a_flat_map_protects_nothing_and_its_neighbors_are_left_alone():
    pictures = normal(3, 8, 8)
    pictures[1] = 0.3
    for quirk in (False, True):
        assert (views.protected(pictures, 0.2, quirk_quantile=quirk).sum((1, 2)) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("r", [0.2, 0.5, 0.77])
def test_the_released_mask_is_strictly_above_the_quantile(r):
    pictures = normal(4, 64, 64)
    pictures[0] = pictures[0].mul(2).round()  # ties
    limit = np.quantile(pictures.flatten(1).double().numpy(), 1 - r, axis=1)[:, None, None]
    own = views.protected(pictures, r, quirk_quantile=True)
    assert np.array_equal(own.numpy(), pictures.double().numpy() > limit)
    exact = views.protected(pictures, r)
    assert own[0].sum() < exact[0].sum(), "where values tie, fewer pixels are protected"
    assert torch.equal(own[1:], exact[1:]) or (exact[1:] & ~own[1:]).sum((1, 2)).max() <= 1


def test_the_mixture_is_the_equation():
    base, mix = (torch.rand(2, 3, 3, 8, 8, generator=generator(k)).double() for k in "ab")
    mask = views.protected(normal(2, 3, 8, 8), 0.2)
    own = views.guided_mix(base, mix, mask, 0.2, 0.8)
    for i, v, y, x in np.ndindex(2, 3, 8, 8):
        lam = 0.2 if mask[i, v, y, x] else 0.8
        assert torch.allclose(own[i, v, :, y, x], (1 - lam) * base[i, v, :, y, x] + lam * mix[i, v, :, y, x], rtol=1e-12)
    assert torch.equal(views.guided_mix(base, mix, mask, 0, 0), base)
    assert torch.equal(views.guided_mix(base, mix, mask, 1, 1), mix)
    share = views.guided_mix(torch.zeros_like(base), torch.ones_like(mix), mask).mean((2, 3, 4))
    count = math.ceil(0.2 * 64)
    assert torch.allclose(share, torch.full_like(share, (0.2 * count + 0.8 * (64 - count)) / 64)), "the mean of λ"


# --- entropy and selection


def test_entropy_equals_a_loop():
    logits = 5 * normal(2, 7, 4, dtype=torch.float64)
    for i, v in np.ndindex(2, 7):
        p = np.exp(logits[i, v].numpy()) / np.exp(logits[i, v].numpy()).sum()
        assert views.entropy(logits)[i, v].item() == pytest.approx(-(p * np.log(p)).sum())
    assert views.entropy(torch.tensor([[1000.0, 0.0], [0.0, 0.0]])).tolist() == pytest.approx([0, math.log(2)])


def test_entropy_of_the_mean_is_the_mean_of_entropy_plus_divergence():
    logits = 4 * normal(3, 6, 9, dtype=torch.float64)
    p = logits.softmax(2)
    mean = p.mean(1, keepdim=True)
    divergence = (p * (p.log() - mean.log())).sum(2)
    assert torch.allclose(views.marginal_entropy(logits), (views.entropy(logits) + divergence).mean(1), rtol=1e-12)
    assert torch.allclose(views.marginal_entropy(logits), -(mean * mean.log()).sum((1, 2)), rtol=1e-12)


def test_six_of_64_views_are_kept_and_the_image_itself_may_be_one():
    logits = normal(5, 64, 10)
    logits[0, 0] = 50 * torch.eye(10)[3]  # the image itself is the surest
    logits[1, 0] = 0  # and here the least sure
    kept = views.lowest_entropy(logits, int(64 * 0.1))
    assert kept.shape == (5, 6) and kept[0, 0] == 0 and 0 not in kept[1]
    p = logits.double().softmax(2).numpy()
    order = np.argsort(-(p * np.log(p.clip(1e-300))).sum(2), axis=1)
    assert np.array_equal(kept.numpy(), order[:, :6])


# --- weights


def test_neighbor_weights_equal_a_loop():
    features = unit(2, 12, 16)
    for n_neighbors, temperature in ((5, 0.01), (11, 0.1)):
        own = views.neighbor_weights(features, n_neighbors, temperature)
        for i in range(2):
            score = []
            for v in range(12):
                cosines = [float(features[i, v].double() @ features[i, u].double()) for u in range(12) if u != v]
                score.append(sum(sorted(cosines)[-n_neighbors:]) / n_neighbors / temperature)
            expected = np.exp(np.array(score) - max(score))
            assert np.allclose(own[i].numpy(), expected / expected.sum(), atol=1e-4)


def test_rounding_does_not_decide_the_weights():
    """Features longer or shorter by 1e-7, as a unit vector in float32 may be."""
    features = unit(4, 64, 128)
    scale = 1 + 1e-7 * (2 * torch.randint(2, (4, 64, 1), generator=generator("scale")) - 1)

    def moved(**quirk):
        a, b = (views.neighbor_weights(f, **quirk) for f in (features, features * scale))
        return (a - b).abs().sum(1).max() / 2

    assert moved() < 1e-4 and moved(quirk_self=True) > 0.02, "as released, the diagonal passes or fails by rounding"


def test_calm_maps_count_more_and_few_views_take_part():
    variation = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 500.0, 500.0]])
    weights = views.tv_weights(variation)
    assert np.allclose(weights[0].numpy(), np.exp([-1, -2, -3]) / np.exp([-1, -2, -3]).sum())
    assert views.effective_views(weights)[1:].tolist() == pytest.approx([3, 1])
    assert torch.allclose(views.tv_weights(variation, 1e6), torch.full((3, 3), 1 / 3), atol=1e-3)
    random = views.effective_views(normal(100, 6).softmax(1))
    assert random.min() >= 1 and random.max() <= 6 and random.std() > 0.1


# --- what is refused

PICTURES, LOGITS, FEATURES = torch.rand(1, 8, 8), torch.rand(2, 5, 3), torch.rand(2, 5, 4)


@pytest.mark.parametrize("call, match", [
    *[(lambda r=r: views.protected(PICTURES, r), "r: expected a share of pixels between 0 and 1") for r in (0, 1, -0.2, math.nan)],
    (lambda: views.guided_mix(PICTURES, PICTURES, PICTURES > 0, 0.8, 0.2), "got lam_high 0.8 and lam_low 0.2; swap them"),
    (lambda: views.guided_mix(PICTURES, PICTURES, PICTURES > 0, -0.1, 0.2), "expected 0 <= lam_high <= lam_low <= 1"),
    (lambda: views.guided_mix(PICTURES, PICTURES, PICTURES > 0, 0.2, 1.1), "expected 0 <= lam_high <= lam_low <= 1"),
    (lambda: views.lowest_entropy(LOGITS, 6), "expected to keep 1 to 5 of 5 views, got 6; draw more views"),
    (lambda: views.lowest_entropy(LOGITS, 0), "expected to keep 1 to 5 of 5 views, got 0"),
    (lambda: views.neighbor_weights(FEATURES, 5), "expected 1 to 4 neighbors among 5 views, got 5; draw more views"),
    (lambda: views.neighbor_weights(FEATURES, 0), "expected 1 to 4 neighbors among 5 views, got 0"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)
