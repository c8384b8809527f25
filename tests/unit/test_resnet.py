"""The written-out attention pool against open_clip's and torch's, and a ResNet through the rest of the house."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite import attention, resnet
from robustvlm_lite import clip as clip_room
from robustvlm_lite.attacks import get_attack, pgd
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses import Training, build, save_change
from robustvlm_lite.defenses.checkpoints import load_change
from robustvlm_lite.runtime import UserError, asset
from robustvlm_lite.threat import ThreatModel

NAMES, TEMPLATES = ("cat", "wild dog", "red star"), ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def clip():
    """small-rn with every weight moved and statistics as of images, so that one left out would show and images differ."""
    clip, g = clip_room.random_clip("small-rn"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in clip.visual.parameters():
            p.add_(0.5 * p.std().nan_to_num(1).clamp_min(0.1) * torch.randn(p.shape, generator=g))
        for norm in norms(clip):
            norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=g))
            norm.momentum = 1.0
        clip.visual.train()(torch.randn(16, 3, 64, 64, generator=g))
        for norm in norms(clip.eval()):
            norm.momentum = 0.1
    return clip.requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return F.interpolate(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(6)), (64, 64))


def norms(clip):
    return [m for m in clip.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def statistics(clip):
    """Everything that batch norm may move on its own."""
    return {k: v.clone() for k, v in clip.visual.state_dict().items() if "running" in k or "num_batches" in k}


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def torch_pool(pool, query, keys):
    """torch's own attention with the pool's projections: query [1, B, W], keys [N, B, W] -> output, weights by head."""
    bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    projections = {f"{c}_proj_weight": getattr(pool, f"{c}_proj").weight for c in "qkv"}
    return F.multi_head_attention_forward(
        *(query, keys, keys, keys.shape[-1], pool.num_heads, None, bias, None, None, False, 0.0),
        *(pool.c_proj.weight, pool.c_proj.bias),
        training=False,
        use_separate_proj_weight=True,
        average_attn_weights=False,
        **projections,
    )


def pool_tokens(clip, x):
    """What open_clip's pool attends over, [1 + N, B, W], from a hook on its input."""
    seen = []
    handle = clip.visual.attnpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clip.visual(clip.normalize(x))
    handle.remove()
    features = seen[0].flatten(2).permute(2, 0, 1)
    return torch.cat([features.mean(0, keepdim=True), features]) + clip.visual.attnpool.positional_embedding[:, None]


# --- the pool


@torch.no_grad()
def test_the_first_token_is_open_clips_feature(clip, x):
    tokens = clip.tokens(x)
    assert clip.grid == 2 and tokens.shape == (3, 1 + 2 * 2, 128)
    expected = clip.visual(clip.normalize(x))
    close(tokens[:, 0], expected)
    close(clip.image_features(x), F.normalize(expected, dim=-1))
    assert expected.std(0).mean() > 0.1 * expected.std(1).mean(), "three different images"


@torch.no_grad()
def test_a_position_is_what_the_pool_returns_if_it_attends_there_alone(clip, x):
    keys, tokens = pool_tokens(clip, x), clip.tokens(x)
    for i in range(1, 5):
        alone, _ = torch_pool(clip.visual.attnpool, keys[:1], keys[i : i + 1])
        close(tokens[:, i], alone[0])


@torch.no_grad()
def test_pool_weights_are_those_of_torch(clip, x):
    keys = pool_tokens(clip, x)
    _, expected = torch_pool(clip.visual.attnpool, keys[:1], keys)
    ours = resnet.pool_weights(clip.visual.attnpool, resnet.pool_input(clip.visual, clip.normalize(x)))
    assert ours.shape == expected.shape == (3, clip.visual.attnpool.num_heads, 1, 5)
    close(ours, expected)
    assert expected.std(-1).min() > 1e-4, "uniform rows would hide a wrong scale"


def test_pixel_gradients_are_open_clips(clip, x):
    """In float64: through so many rectifiers float32 agrees to three digits only."""
    exact, gradients = copy.deepcopy(clip).double(), []
    for feature in (lambda x: exact.visual(exact.normalize(x)), lambda x: exact.tokens(x)[:, 0]):
        pixels = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(feature(pixels).square().sum(), pixels)
        gradients.append(gradient)
    close(gradients[1], gradients[0], 1e-9)


@torch.no_grad()
def test_given_positions_replace_the_models_own(clip, x):
    visual, z = clip.visual, clip.normalize(x)
    own = visual.attnpool.positional_embedding
    assert torch.equal(resnet.image_tokens(visual, z, own), resnet.image_tokens(visual, z))
    assert (resnet.image_tokens(visual, z, own.roll(1, 0)) - resnet.image_tokens(visual, z)).abs().max() > 1e-3
    small = F.interpolate(z, (32, 32))
    assert resnet.image_tokens(visual, small, own[:2]).shape == (3, 2, 128), "one cell of 32 pixels"


# --- through the house


def test_a_classifier_and_its_fast_twin(clip, x):
    slow = clip.classifier(NAMES, TEMPLATES)
    expected = clip.logit_scale * clip.image_features(x) @ clip.text_features(NAMES, TEMPLATES).T
    assert torch.allclose(slow(x), expected)
    gradients = []
    for classify in (slow, slow.fast()):
        pixels = x.clone().requires_grad_()
        logits = classify(pixels)
        assert logits.dtype == torch.float32
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), pixels)[0].flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


@torch.no_grad()
def test_batch_norm_stays_still_whoever_asks_for_training(clip, x):
    moving = copy.deepcopy(clip)
    before = statistics(moving)
    moving.train()
    assert moving.training and moving.visual.layer1.training and not any(n.training for n in norms(moving))
    moving.tokens(x)
    assert all(torch.equal(v, before[k]) for k, v in statistics(moving).items())
    moving.visual.train()  # behind the wrapper's back, where open_clip's own modules update
    moving.tokens(x)
    assert not all(torch.equal(v, before[k]) for k, v in statistics(moving).items()), "the check above can fail"


def test_batch_norm_stays_still_under_attack_and_in_fine_tuning(clip, x):
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photos = ImageSet("toy", images, torch.arange(6) % 3, NAMES, TEMPLATES)
    before, threat = statistics(clip), ThreatModel(4)
    attack = partial(pgd, threat=threat, n_steps=2, step_255=threat.eps_255, keep="last")
    defense = build("TeCoA", clip).fit(
        photos, attack=attack, training=Training(steps=2, batch=3, lr=0.01, optimizer="adamw"), progress=False
    )
    assert (defense.clip.visual.conv1.weight - clip.visual.conv1.weight).abs().max() > 1e-4, "it was tuned"
    classifier = defense.classifier(NAMES, TEMPLATES).train()
    for name in ("pgd-2", "mifgsm-2"):
        get_attack(name).run(classifier, x, torch.tensor([0, 1, 2]), threat, [(0, i) for i in range(3)])
    assert all(torch.equal(v, before[k]) for k, v in statistics(defense.clip).items())


def test_a_tuned_tower_comes_back_from_its_file(clip, x, tmp_path):
    defense, again = build("TeCoA", clip), build("TeCoA", clip)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in defense.clip.visual.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=g))
    save_change(defense, clip, tmp_path / "change.safetensors")
    load_change(again, tmp_path / "change.safetensors")
    moved = (defense.clip.tokens(x) - clip.tokens(x)).abs().max()
    assert (again.clip.tokens(x) - defense.clip.tokens(x)).abs().max() < 0.05 * moved


@torch.no_grad()
def test_maps_of_a_resnet_stand_on_its_final_grid(clip, x):
    text = F.normalize(torch.randn(3, 128, generator=torch.Generator().manual_seed(2)), dim=1)
    mean = torch.ones(128) / 9
    for name, m in attention.named_maps(clip, x, text, mean).items():
        assert m.shape == (3, 4) and m.min() >= 0 and m.max() <= 1, name
    cosine = torch.einsum("bnd,bd->bn", F.normalize(clip.tokens(x)[:, 1:], dim=2), text - mean)
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    close(attention.value_map(clip, x, text, mean), (cosine - low) / (high - low))
    keys = pool_tokens(clip, x)
    weights = torch_pool(clip.visual.attnpool, keys[:1], keys)[1].mean(1)[:, 0, 1:]
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    close(attention.cls_map(clip, x), (weights - low) / (high - low), 1e-3)
    for needs_blocks in (
        lambda: attention.grad_cam(clip, x, text),
        lambda: attention.attention_rollout(clip, x),
        lambda: attention.gradient_rollout(clip, x, text),
    ):
        with pytest.raises(UserError, match="expected a vision transformer for this map, got small-rn; choose a ViT"):
            needs_blocks()


@pytest.mark.parametrize("name, image_tower", [("nano", 0.85e6), ("small", 2.75e6), ("small-rn", 3.85e6)])
def test_bundled_architectures_have_the_planned_size(name, image_tower):
    clip = clip_room.random_clip(name)
    n = sum(p.numel() for p in clip.visual.parameters())
    assert 0.98 * image_tower < n <= image_tower and 2 * sum(p.numel() for p in clip.model.parameters()) < 15e6
    assert clip.image_size == 64 and clip.model.context_length == 32 and asset("clip", f"{name}.json").exists()
