"""Maps and distances against loops, explicit upsampling and hooks: the checks of the TGA-ZSR specification."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_maps import moved

from robustvlm_lite import attention, transformer
from robustvlm_lite.attention import map_distance, text_map
from robustvlm_lite.runtime import UserError


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(n=5, grid=7, seed=0):
    return attention.minmax(normal(n, grid * grid, seed=seed))


def enlarge(m, side=224):
    """[B, side * side], the long way."""
    grid = math.isqrt(m.shape[1])
    return F.interpolate(m.view(-1, 1, grid, grid), (side, side), mode="bilinear", align_corners=False).flatten(1)


@pytest.fixture(scope="module")
def clip(random_clip):
    """Every weight moved, so that a bias or a gain left out would show."""
    return moved(random_clip, 0.1).float()


@pytest.fixture(scope="module")
def x():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


# --- text-guided maps


def test_minmax_fills_0_to_1_and_survives_constants():
    m = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [-1e-9, 0.0, 1e-9]], requires_grad=True)
    out = attention.minmax(m)
    assert out[0].tolist() == [0, 1, 0.5] and out[1].tolist() == [0, 0, 0]
    assert out[2].abs().max() < 0.01, "noise below eps is not stretched"
    (grad,) = torch.autograd.grad(out.square().sum(), m)
    assert grad.isfinite().all()


def loop_map(tokens: np.ndarray, text: np.ndarray, token_norm: str) -> np.ndarray:
    """The specification, word by word."""
    b, n, d = tokens.shape
    out = np.zeros((b, n - 1))
    for i in range(b):
        for p in range(1, n):
            for c in range(d):
                value = tokens[i, p, c]
                if token_norm == "token_axis":
                    value /= math.sqrt(sum(tokens[i, q, c] ** 2 for q in range(n)))  # CLS counts
                elif token_norm == "feature_axis":
                    value /= math.sqrt(sum(tokens[i, p, e] ** 2 for e in range(d)))
                out[i, p - 1] += value * text[i, c]
        out[i] = (out[i] - out[i].min()) / (out[i].max() - out[i].min())
    return out


@pytest.mark.parametrize("token_norm", attention.TOKEN_NORMS)
def test_text_map_equals_a_loop(token_norm):
    tokens = normal(2, 10, 6) * torch.logspace(-1, 1, 6) * torch.linspace(0.2, 3, 10)[:, None]  # no axis is balanced
    text = F.normalize(normal(2, 6, seed=1), dim=1)
    expected = loop_map(tokens.double().numpy(), text.double().numpy(), token_norm)
    assert np.abs(text_map(tokens, text, token_norm).numpy() - expected).max() < 1e-5
    for other in set(attention.TOKEN_NORMS) - {token_norm}:
        assert (text_map(tokens, text, other) - text_map(tokens, text, token_norm)).abs().max() > 0.05


@pytest.mark.parametrize("token_norm", attention.TOKEN_NORMS)
def test_text_map_ignores_the_scale_of_the_text_but_not_its_sign(token_norm):
    tokens, text = normal(2, 10, 6), normal(2, 6, seed=1)
    own = text_map(tokens, text, token_norm)
    assert torch.allclose(text_map(tokens, 100 * text, token_norm), own, atol=1e-5)
    assert torch.allclose(text_map(tokens, -text, token_norm), 1 - own, atol=1e-5)


@pytest.mark.parametrize("token_norm", attention.TOKEN_NORMS)
def test_constant_tokens_give_no_nan(token_norm):
    tokens = torch.ones(1, 10, 6, requires_grad=True)
    m = text_map(tokens, torch.ones(1, 6), token_norm)
    assert m.abs().max() <= 1 and torch.autograd.grad(m.sum(), tokens)[0].isfinite().all()


def test_complementary_map_is_the_product():
    tokens, text, text_not = normal(2, 10, 6), normal(2, 6, seed=1), normal(2, 6, seed=2)
    expected = text_map(tokens, text, "none") * (1 - text_map(tokens, text_not, "none"))
    assert torch.equal(attention.complementary_map(tokens, text, text_not, "none"), expected)
    assert attention.complementary_map(tokens, text, text).max() <= 0.25 + 1e-6


@pytest.mark.parametrize("call, match", [
    (lambda: text_map(maps(1)[..., None], maps(1), "feature"), "token_norm 'feature'; did you mean 'feature_axis'"),
    (lambda: map_distance(maps(), maps(), "l3"), "unknown metric 'l3'; known: cosine, l1, l2, l2_sq"),
])  # fmt: skip
def test_unknown_names_are_refused(call, match):
    with pytest.raises(UserError, match=match):
        call()


# --- distances


@pytest.mark.parametrize("grid", [3, 7, 8, 14])
@pytest.mark.parametrize("metric", attention.METRICS)
def test_distances_equal_those_of_explicit_upsampling(grid, metric):
    a, b = maps(grid=grid), maps(grid=grid, seed=1)
    big_a, big_b = enlarge(a.double()), enlarge(b.double())
    expected = {
        "l2": torch.linalg.vector_norm(big_a - big_b, dim=1),
        "l2_sq": (big_a - big_b).square().sum(1),
        "l1": (big_a - big_b).abs().mean(1),
        "cosine": 1 - F.cosine_similarity(big_a, big_b, dim=1),
    }[metric]
    assert torch.allclose(map_distance(a, b, metric).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(map_distance(a, b, metric, side=32), map_distance(b, a, metric, side=32), rtol=1e-5)


@pytest.mark.parametrize("metric", attention.METRICS)
def test_gradients_equal_those_of_explicit_upsampling(metric):
    a, b = maps().requires_grad_(), maps(seed=1)
    big = enlarge(a)
    explicit = {
        "l2": lambda: torch.linalg.vector_norm(big - enlarge(b), dim=1),
        "l2_sq": lambda: (big - enlarge(b)).square().sum(1),
        "l1": lambda: (big - enlarge(b)).abs().mean(1),
        "cosine": lambda: 1 - F.cosine_similarity(big, enlarge(b), dim=1),
    }[metric]()
    (expected,) = torch.autograd.grad(explicit.sum(), a)
    (own,) = torch.autograd.grad(map_distance(a, b, metric).sum(), a)
    assert (own - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_l2_has_a_zero_gradient_where_maps_agree():
    a = maps(3).requires_grad_()
    b = a.detach().clone()
    b[1] += 0.1 * normal(49, seed=3)
    distance = map_distance(a, b)
    (grad,) = torch.autograd.grad(distance.sum(), a)
    assert distance[0] == distance[2] == 0 < distance[1]
    assert grad.isfinite().all() and grad[0].abs().max() == grad[2].abs().max() == 0 < grad[1].abs().max()


def test_a_small_difference_is_pulled_as_hard_as_a_large_one():
    """The unsquared norm: at 224 x 224 pixels its gradient has length 1 whatever the difference."""
    b, direction = maps(1), normal(1, 49, seed=3)
    lengths = []
    for size in (1e-3, 1e-1):
        a = (b + size * direction).requires_grad_()
        lengths.append(torch.autograd.grad(map_distance(a, b).sum(), a)[0].norm())
    assert torch.allclose(lengths[0], lengths[1], rtol=1e-3)


# --- maps that need the model


def test_grad_cam_equals_a_reference_with_hooks(clip, x):
    """Activations and gradients read by hooks from open_clip's own forward pass."""
    text = F.normalize(normal(5, 128, seed=4), dim=1)
    visual, seen = clip.visual, []
    block = visual.transformer.resblocks[-1]

    def keep(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = block.ln_1.register_forward_hook(keep)
    feature = F.normalize(visual(clip.normalize(x)), dim=-1)
    handle.remove()
    scores = clip.logit_scale * feature @ text.T
    (grad,) = torch.autograd.grad(scores.gather(1, scores.argmax(1, keepdim=True)).sum(), seen[0])
    weights = grad[:, 1:].mean(1)
    cam = torch.einsum("bw,bnw->bn", weights, seen[0][:, 1:].detach()).relu()
    own = attention.grad_cam(clip, x, text)
    assert not own.requires_grad and own.amax() == 1
    assert torch.allclose(own, attention.minmax(cam), atol=1e-4)


def test_grad_cam_can_be_trained(clip, x):
    """A finite difference along a random direction of the last projection agrees with the gradient of the map."""
    tower = copy.deepcopy(clip)
    tower.visual.requires_grad_(True)
    text, target = F.normalize(normal(5, 128, seed=4), dim=1), maps(3, 8, seed=6)

    def loss(**kwargs):
        return (attention.grad_cam(tower, x, text, **kwargs) - target).square().sum()

    params = list(tower.visual.parameters())
    value = loss(create_graph=True)
    gradients = torch.autograd.grad(value, params, allow_unused=True)
    assert sum(g is not None and g.abs().sum() > 0 for g in gradients) > 30
    k = next(i for i, p in enumerate(params) if p is tower.visual.proj)
    direction = F.normalize(gradients[k].flatten(), dim=0).view_as(params[k])
    step, values = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            params[k].add_(sign * step * direction)
            values.append(float(loss()))
            params[k].sub_(sign * step * direction)
    slope = float((gradients[k] * direction).sum())
    assert slope > 0 and abs((values[0] - values[1]) / (2 * step) - slope) < 0.1 * slope
    assert all(p.grad is None for p in params)


@torch.no_grad()
def test_value_map_is_the_last_block_without_mixing(clip, x):
    """With attention that lets each token see itself alone, torch's module returns exactly the value path."""
    block, seen = clip.visual.transformer.resblocks[-1], []
    handle = block.attn.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0]), with_kwargs=True)
    clip.visual(clip.normalize(x))
    handle.remove()
    alone = torch.full((65, 65), -torch.inf).fill_diagonal_(0)
    values, _ = block.attn(seen[0], seen[0], seen[0], attn_mask=alone, need_weights=False)
    tokens = clip.visual.ln_post(values) @ clip.visual.proj
    text, mean = normal(3, 128, seed=4), normal(128, seed=5)
    assert attention.value_map(clip, x, text).shape == (3, 64)
    for own, t in ((attention.value_map(clip, x, text), text), (attention.value_map(clip, x, text, mean), text - mean)):
        assert torch.allclose(own, text_map(tokens, t, "feature_axis"), atol=1e-4)


@torch.no_grad()
def test_cls_map_is_what_cls_attends_to(clip, x):
    block, seen = clip.visual.transformer.resblocks[-1], []
    handle = block.attn.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0]), with_kwargs=True)
    clip.visual(clip.normalize(x))
    handle.remove()
    _, weights = block.attn(seen[0], seen[0], seen[0], need_weights=True)  # mean over heads
    own = attention.cls_map(clip, x)
    assert own.shape == (3, 64) and torch.allclose(own, attention.minmax(weights[:, 0, 1:]), atol=1e-4)


# --- maps against masks


def test_map_iou_takes_the_first_among_equals():
    """A flat map has no order of its own: its region is the first pixels, as many as the mask has."""
    flat, masks = torch.zeros(2, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :10] = True  # the first 640 pixels
    masks[1, -10:] = True
    assert attention.map_iou(flat, masks).tolist() == [1.0, 0.0]


def test_map_iou_on_hand_made_masks():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True  # the upper half
    up = mask.float().flatten(1)
    left = mask.mT.float().flatten(1)
    cases = {"perfect": (up, 1.0), "disjoint": (1 - up, 0.0), "half right": (left + 0.01 * up, 1 / 3)}
    for name, (m, expected) in cases.items():
        assert attention.map_iou(m, mask).item() == pytest.approx(expected), name
    empty = torch.zeros_like(mask)
    assert attention.map_iou(up, empty).item() == 0
    both = attention.map_iou(torch.cat([up, 1 - up]), torch.cat([mask, mask]))
    assert both.tolist() == [1, 0], "each image with its own mask"
    large = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert attention.map_iou(up, large).item() > 0.95, "the map is enlarged to the mask"


def test_upsample_keeps_rows_and_columns():
    m = torch.zeros(1, 64)
    m[0, 1 * 8 + 6] = 1  # second row, seventh column
    picture = attention.upsample(m, 64)
    assert picture.shape == (1, 64, 64)
    row, column = divmod(int(picture.flatten().argmax()), 64)
    assert 8 <= row < 16 and 48 <= column < 56


def test_center_prior_looks_at_the_middle_and_nothing_else():
    prior = attention.center_prior(8, n=2).view(2, 8, 8)
    assert torch.equal(prior, prior.flip(1)) and torch.equal(prior, prior.flip(2)) and torch.equal(prior, prior.mT)
    assert prior[0, 3:5, 3:5].min() == 1 and prior[0, 0, 0] == 0
    middle = torch.zeros(2, 64, 64, dtype=torch.bool)
    middle[:, 24:40, 24:40] = True
    assert attention.map_iou(attention.center_prior(8, 2), middle).min() > 0.7


def test_references_random_and_the_mask_itself():
    drawn = attention.random_map(8, 400, torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 64) and drawn.std(0).min() > 0.2 and not torch.equal(drawn[0], drawn[1])
    masks = torch.zeros(400, 64, 64, dtype=torch.bool)
    masks[:, 10:40, 20:44] = True
    limit = attention.mask_map(masks, 8)
    assert limit[0].view(8, 8)[2, 3] == 1 and limit[0].view(8, 8)[1, 3] == 0.75 and limit[0].view(8, 8)[0, 0] == 0
    assert attention.map_iou(limit[:2], masks[:2]).min() > 0.85 > 0.3 > attention.map_iou(drawn, masks).mean()


# --- attention followed through the blocks


@torch.no_grad()
def test_rollout_multiplies_what_torch_calls_attention(clip, x):
    seen = []
    blocks = clip.visual.transformer.resblocks
    handles = [b.attn.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]), with_kwargs=True) for b in blocks]
    clip.visual(clip.normalize(x))
    for handle in handles:
        handle.remove()
    flow = np.eye(65)[None]
    for block, tokens in zip(blocks, seen, strict=True):
        weights = block.attn(tokens, tokens, tokens, need_weights=True)[1].double().numpy()
        flow = (0.5 * np.eye(65) + 0.5 * weights) @ flow
    assert np.abs(flow.sum(2) - 1).max() < 1e-4, "what reaches a token sums to one"
    expected = attention.minmax(torch.from_numpy(flow[:, 0, 1:]).float())
    assert torch.allclose(attention.attention_rollout(clip, x), expected, atol=1e-3)


def test_gradient_rollout_uses_the_slope_of_the_cosine(clip, x):
    """The slope at one entry of one matrix, by a finite difference through blocks written out here."""
    text, blocks = F.normalize(normal(3, 128, seed=4), dim=1), clip.visual.transformer.resblocks

    def cosine(bump, at=None):
        h = transformer.embed(clip.visual, clip.normalize(x))
        for k, block in enumerate(blocks):
            u = block.ln_1(h)
            q, key, v = F.linear(u, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=2)
            q, key, v = (p.view(3, 65, block.attn.num_heads, -1).transpose(1, 2) for p in (q, key, v))
            weights = (q @ key.mT / q.shape[-1] ** 0.5).softmax(3)
            if k == at:
                weights[:, 1, 0, 7] += bump
            h = h + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
            h = h + block.mlp(block.ln_2(h))
        return (F.normalize(transformer.project(clip.visual, h)[:, 0], dim=1) * text).sum(1)

    with torch.enable_grad():
        z = x.clone().requires_grad_()
        tokens, matrices = transformer.image_matrices(clip.visual, clip.normalize(z))
        feature = F.normalize(transformer.project(clip.visual, tokens)[:, 0], dim=1)
        slopes = torch.autograd.grad((feature * text).sum(), matrices)
    for k in (0, len(blocks) - 1):
        measured = (cosine(0.05, k) - cosine(-0.05, k)) / 0.1
        assert torch.allclose(slopes[k][:, 1, 0, 7], measured, atol=2e-3)
    relevance = torch.eye(65).expand(3, 65, 65)
    for weights, slope in zip(matrices, slopes, strict=True):
        relevance = relevance + (weights * slope).clamp_min(0).mean(1).detach() @ relevance
    own = attention.gradient_rollout(clip, x, text)
    assert torch.allclose(own, attention.minmax(relevance[:, 0, 1:]), atol=1e-4) and not own.requires_grad
    assert (own - attention.gradient_rollout(clip, x, -text)).abs().max() > 0.1, "it depends on the text"
