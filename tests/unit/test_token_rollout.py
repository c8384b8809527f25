"""Token-gradient rollout, GAR, the maps of a ResNet and total variation, against loops in float64 over open_clip's own passes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_maps import moved, normal, score, unit_text

from robustvlm_lite import attention, scenes, transformer
from robustvlm_lite.runtime import UserError, generator


@pytest.fixture(scope="module")
def clip(random_clip):
    return moved(random_clip, 0.02)


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 3, 64, 64, generator=generator("pixels"), dtype=torch.float64)


def seen_by_open_clip(clip, image, text):
    """Of one image: input tokens [T, D] of the last two blocks, the slope of the largest logit there, the attention
    matrices averaged over heads [T, T], and the slope at the output of the last block. Read by hooks."""
    visual, inputs, outputs = clip.visual, [], []
    blocks = visual.transformer.resblocks

    def enter(module, args):
        inputs.append(args[0] if args[0].requires_grad else args[0].clone().requires_grad_())
        return (inputs[-1], *args[1:])

    handles = [b.register_forward_pre_hook(enter) for b in blocks[-2:]]
    handles.append(blocks[-1].register_forward_hook(lambda m, args, out: outputs.append(out)))
    s = score(clip, visual(clip.normalize(image[None])), text)
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(s.sum(), [*inputs, *outputs])
    matrices = []
    for block, t in zip(blocks[-2:], inputs, strict=True):
        u = block.ln_1(t.detach())
        matrices.append(block.attn(u, u, u, need_weights=True)[1][0].numpy())
    numpy = [[t.detach()[0].numpy() for t in ts] for ts in (inputs, slopes[:2])]
    return *numpy, matrices, (outputs[0].detach()[0].numpy(), slopes[2][0].numpy())


def rollout_by_loops(tokens, slopes, matrices, form):
    """The table of section 1.1, entry by entry."""
    refined, n = [], len(tokens[0])
    for token, slope, matrix in zip(tokens, slopes, matrices, strict=True):
        w = np.array([max(0.0, sum(token[j] * slope[j])) for j in range(n)])
        w = w / (w.sum() + 1e-8)
        a = np.array([[float(i == j) + max(0.0, matrix[i, j] * w[j]) for j in range(n)] for i in range(n)])
        refined.append(np.array([row / (row.sum() + 1e-8) for row in a]) if form == "released" else a)
    if form == "paper":
        average = (refined[0] + refined[1]) / 2
    else:
        average = (0.5 * refined[0] + 1.0 * refined[1]) / 1.5
        average = np.array([row / (row.sum() + 1e-8) for row in average])
    cam = (refined[1] @ average)[0, 1:]
    return np.minimum(cam, np.quantile(cam, 0.99)) if form == "released" else cam


# --- token-gradient rollout


@pytest.mark.parametrize("form", ["paper", "released"])
def test_rollout_equals_the_formula_on_what_open_clip_computes(clip, x, form):
    text = unit_text(clip)
    own = attention.token_rollout(clip, x, text, form)
    assert own.shape == (2, 3, 64) and not own.requires_grad and own.min() >= 0
    for i, v in np.ndindex(2, 3):
        tokens, slopes, matrices, _ = seen_by_open_clip(clip, x[i, v], text)
        expected = rollout_by_loops(tokens, slopes, matrices, form)
        assert np.abs(own[i, v].numpy() - expected).max() < 1e-7 * expected.max()
    other = attention.token_rollout(clip, x, text, {"paper": "released", "released": "paper"}[form])
    assert (own / own.sum(-1, keepdim=True) - other / other.sum(-1, keepdim=True)).abs().max() > 1e-4


@pytest.mark.parametrize("form, ratio", [("paper", 3), ("released", 5)])
def test_rollout_is_to_first_order_a_sum_of_two_blocks(clip, x, form, ratio):
    tokens, slopes, matrices, _ = seen_by_open_clip(clip, x[0, 0], unit_text(clip))
    tokens, slopes, matrices = (torch.from_numpy(np.stack(t)) for t in (tokens, slopes, matrices))
    w = attention.token_relevance((tokens * slopes).sum(2))
    cam = attention.cls_row((matrices[:1], matrices[1:]), (w[:1], w[1:]), form)[0]
    first_order = (matrices[0, 0] * w[0] + ratio * matrices[1, 0] * w[1])[1:]
    assert torch.corrcoef(torch.stack([cam, first_order]))[0, 1] > 0.999


@pytest.mark.parametrize("form", attention.FORMS)
def test_batched_maps_equal_those_of_one_view_at_a_time(clip, x, form):
    text = unit_text(clip)
    own = attention.guide(clip, x, text, form)
    for i, v in np.ndindex(2, 3):
        alone = attention.guide(clip, x[i, v], text, form)
        assert alone.shape == (64,) and (alone - own[i, v]).abs().max() < 1e-9 * own[i, v].max()
    assert (attention.guide(clip, x[0], text, form) - own[0]).abs().max() < 1e-9 * own[0].max()


def test_each_image_may_have_its_own_text(clip, x):
    texts = torch.stack([unit_text(clip), -unit_text(clip)])
    own = attention.token_rollout(clip, x, texts[:, None])
    for i in range(2):
        assert torch.allclose(own[i], attention.token_rollout(clip, x[i], texts[i]), rtol=1e-9)
    assert (own[1] - attention.token_rollout(clip, x[1], texts[0])).abs().max() > 0.1 * own[1].max()


def test_at_the_output_of_the_last_block_nothing_could_be_read(clip, x):
    """Patches feed no logit, and a layer norm ignores the length of CLS: a hook on the wrong tokens would see zeros."""
    tokens, slopes, _, (output, slope) = seen_by_open_clip(clip, x[0, 0], unit_text(clip))
    assert np.abs(slope[1:]).max() == 0
    length = np.linalg.norm(output[0]) * np.linalg.norm(slope[0])
    assert abs(output[0] @ slope[0]) < 1e-5 * length
    assert np.abs(slopes[1][1:]).max() > 0 and attention.token_rollout(clip, x[0, 0], unit_text(clip)).max() > 0


def test_a_patch_of_the_last_block_is_worth_what_the_norms_eps_leaves(clip, x):
    """A thousandth, at most, of what it is worth in the block before; and `through_norm` gives that remainder."""
    tokens, slopes, _, _ = seen_by_open_clip(clip, x[0, 0], unit_text(clip))
    lengths = [np.linalg.norm(t, axis=1) * np.linalg.norm(g, axis=1) for t, g in zip(tokens, slopes, strict=True)]
    before, last = (np.abs((t * g).sum(1)) / n for t, g, n in zip(tokens, slopes, lengths, strict=True))
    assert np.median(last[1:]) < 1e-3 * np.median(before[1:])
    norm = nn.LayerNorm(6, eps=0.01).double()
    with torch.no_grad():
        norm.weight.copy_(normal(6, seed=1)), norm.bias.copy_(normal(6, seed=2))
    token, readout = normal(2, 3, 6, seed=3).requires_grad_(), normal(2, 3, 6, seed=4)
    (slope,) = torch.autograd.grad((norm(token) * readout).sin().sum(), token)
    normed = norm(token).detach().requires_grad_()
    (at_norm,) = torch.autograd.grad((normed * readout).sin().sum(), normed)
    with torch.no_grad():
        own = attention.through_norm(norm, token, at_norm)
    assert torch.allclose(own, (token * slope).sum(2).detach(), rtol=1e-9)


def test_maps_are_zero_and_counted_where_no_token_adds(clip, x):
    tokens = normal(2, 5, 4)
    w = attention.token_relevance(torch.stack([-tokens[0], tokens[1]]).mul(tokens).sum(2))  # none adds in the first
    assert (w[0] == 0).all() and w[1].sum() == pytest.approx(1)
    matrices = normal(2, 5, 5).softmax(2)
    rows = attention.cls_row((matrices, matrices), (w, w), "paper")
    assert attention.is_flat(rows).tolist() == [True, False]
    assert attention.guide_pixels(clip, torch.zeros(2, 64)).abs().max() == 0, "not NaN"


def test_only_the_last_two_blocks_are_in_the_graph(clip, x, monkeypatch):
    """Nothing reaches .grad, the image or the blocks before; the attention of those is never asked for."""
    tower = copy.deepcopy(clip).requires_grad_(True)
    image = x[0].clone().requires_grad_()
    seen = []
    monkeypatch.setattr(transformer, "run_block", spy(transformer.run_block, seen))
    for form in ("paper", "gar_last_two"):
        attention.guide(tower, image, unit_text(clip), form)
    assert seen == 2 * 2 * [False], "blocks before the last two, and whether their output had a graph"
    assert image.grad is None and all(p.grad is None for p in tower.parameters())
    with torch.no_grad():
        assert torch.equal(attention.guide(tower, image, unit_text(clip)), attention.guide(clip, x[0], unit_text(clip)))


def spy(function, seen):
    def call(*args):
        out = function(*args)
        seen.append(out.requires_grad)
        return out

    return call


@torch.no_grad()
def test_the_cls_block_is_the_whole_block(clip, x):
    block = clip.visual.transformer.resblocks[-1]
    tokens = transformer.tokens_before(clip.visual, clip.normalize(x[0]), 1)
    u = block.ln_1(tokens)
    own, weights = transformer.cls_block(block, tokens, u)
    assert torch.allclose(own, block(tokens)[:, :1], rtol=1e-9)
    assert torch.allclose(weights, block.attn(u, u, u, need_weights=True)[1], rtol=1e-9)


# --- original gradient attention rollout


@pytest.mark.parametrize("last", [2, None])
def test_gar_is_the_product_of_positive_attention_times_its_slope(clip, x, last):
    """Matrices and slopes from a pass written out here; one slope is checked by finite differences."""
    text, image = unit_text(clip), x[0, 0]
    blocks = clip.visual.transformer.resblocks

    def forward(bump):
        """The largest logit with `bump` added to the attention matrices, and the matrices."""
        h, matrices = transformer.embed(clip.visual, clip.normalize(image[None])), []
        for block, extra in zip(blocks, bump, strict=True):
            qkv = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).view(1, 65, 3, 4, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            matrices.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(3) + extra)
            h = h + block.attn.out_proj((matrices[-1] @ v).transpose(1, 2).flatten(2))
            h = h + block.mlp(block.ln_2(h))
        return score(clip, clip.visual.ln_post(h[:, 0]) @ clip.visual.proj, text).sum(), matrices

    bump = [torch.zeros(1, 4, 65, 65, dtype=torch.float64, requires_grad=True) for _ in blocks]
    value, matrices = forward(bump)
    slopes = torch.autograd.grad(value, bump)
    at, step = (0, 1, 0, 7), 1e-6
    for k in (1, 3):
        push = [torch.zeros_like(b) for b in bump]
        push[k][at] = step
        with torch.no_grad():
            measured = (forward(push)[0] - forward([-p for p in push])[0]) / (2 * step)
        assert slopes[k][at].item() == pytest.approx(measured.item(), rel=1e-4, abs=1e-6)
    expected = np.eye(65)
    for m, s in list(zip(matrices, slopes, strict=True))[-(last or 4) :]:
        positive = np.maximum(0, m.detach()[0].numpy() * s[0].numpy())
        expected = (np.eye(65) + sum(positive) / 4) @ expected
    own = attention.gar(clip, image, text, last)
    assert np.allclose(own.numpy(), expected[0, 1:], rtol=1e-6)


# --- total variation


def loop_tv(m):
    n = len(m)
    return sum(abs(m[u + 1, v] - m[u, v]) for u in range(n - 1) for v in range(n)) + sum(
        abs(m[u, v + 1] - m[u, v]) for u in range(n) for v in range(n - 1)
    )


def test_total_variation_equals_loops_on_every_scale():
    maps = normal(2, 3, 49).abs()
    for i, v in np.ndindex(2, 3):
        grid = maps[i, v].view(7, 7)
        stretched = (grid - grid.min()) / (grid.max() - grid.min())
        big = F.interpolate(stretched[None, None], (28, 28), mode="bilinear", align_corners=False)[0, 0]
        for scale, m in (("l1_grid", grid / grid.sum()), ("minmax_grid", stretched), ("minmax_full", big)):
            own = attention.total_variation(maps, scale, side=28)
            assert own.shape == (2, 3) and own[i, v].item() == pytest.approx(loop_tv(m.numpy()), rel=1e-9)


@pytest.mark.parametrize("scale", attention.SCALES)
def test_a_constant_map_has_no_variation(scale):
    maps = torch.stack([torch.zeros(49), torch.full((49,), 0.3), normal(49).abs().float()])
    own = attention.total_variation(maps, scale)
    assert own[:2].abs().max() < 1e-5 < own[2]
    assert torch.allclose(attention.total_variation(1000 * maps[2:], scale), own[2:], rtol=1e-3), "scale free"


# --- against masks, and what is refused


def test_maps_can_be_measured_against_objects(random_clip):
    """Of untrained weights: the helper takes the maps as they come, and one mask is compared with another."""
    made = scenes.sample(4, generator("scenes"), task="shape")
    maps = attention.guide(random_clip, made.images / 255, F.normalize(normal(5, 128).float(), dim=1))
    covered = attention.map_iou(maps, made.masks)
    assert covered.shape == (4,) and 0 <= covered.min() and covered.max() < 1
    a = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    b = a.clone()
    a[..., :4], b[..., 2:4] = True, True
    assert (attention.iou(a, b) == 0.5).all() and attention.iou(a, b).shape == (2, 3)
    assert attention.iou(a & ~a, b & ~b).max() == 0, "two empty masks"


class Bare(nn.Module):
    image_size, output_dim = 64, 8


@pytest.mark.parametrize("build, form, match", [
    ("vit", "released_", "unknown form of attention 'released_'; did you mean 'released'"),
    ("resnet", "gar", "expected a vision transformer for attention 'gar', got rollout-resnet; a ResNet takes paper or released"),
    ("bare", "paper", "expected a ViT or a ResNet with attention pool, got bare"),
    ("shallow", "paper", "expected a transformer of at least 2 blocks for attention, got 1 in shallow"),
])  # fmt: skip
def test_a_backbone_without_the_tokens_is_refused(clip, resnet, x, wide, build, form, match):
    if build == "shallow":
        tower = copy.deepcopy(clip)
        tower.visual.transformer.resblocks, tower.name = tower.visual.transformer.resblocks[:1], "shallow"
    elif build == "bare":
        tower = copy.deepcopy(clip)
        tower.model.visual, tower.is_vit, tower.name = Bare(), False, "bare"
    else:
        tower = {"vit": clip, "resnet": resnet}[build]
    with pytest.raises(UserError, match=match):
        attention.guide(tower, x[0], unit_text(clip), form)


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="unknown scale of total variation 'l1'; did you mean 'l1_grid'|known"):
        attention.total_variation(torch.rand(2, 16), "l1")
