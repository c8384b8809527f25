"""Maps of a ResNet: the stage before the pool, and the pool's own attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_maps import score, unit_text

from robustvlm_lite import attention


def test_stage_cam_equals_hooks_on_open_clip(resnet, wide):
    text, visual, seen = unit_text(resnet), resnet.visual, []

    def keep(module, args, out):
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    handle = visual.layer4.register_forward_hook(keep)
    s = score(resnet, visual(resnet.normalize(wide)), text)
    handle.remove()
    (slope,) = torch.autograd.grad(s.sum(), seen[0])
    stage, slope = seen[0].detach().numpy(), slope.numpy()
    own = attention.stage_cam(resnet, wide, text)
    assert own.shape == (3, 16) and own.max() > 0
    for i in range(3):
        cam = np.zeros((4, 4))
        for k in range(stage.shape[1]):
            cam += slope[i, k].mean() * stage[i, k]
        cam = np.maximum(cam, 0).flatten()
        assert np.allclose(own[i].numpy(), np.minimum(cam, np.quantile(cam, 0.99)), rtol=1e-8, atol=1e-15)


def test_pool_rollout_equals_torch_attention_and_finite_differences(resnet, wide):
    """Attention from torch's own module, the slope at the pool's tokens by differences along each token."""
    text, pool, visual = unit_text(resnet), resnet.visual.attnpool, resnet.visual
    stage = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(resnet.normalize(wide[:1]))))))
    flat = stage.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([flat.mean(0, keepdim=True), flat]) + pool.positional_embedding[:, None]  # [T, 1, D]
    module = nn.MultiheadAttention(tokens.shape[2], pool.num_heads).double()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([p.weight for p in (pool.q_proj, pool.k_proj, pool.v_proj)]))
        module.in_proj_bias.copy_(torch.cat([p.bias for p in (pool.q_proj, pool.k_proj, pool.v_proj)]))
        module.out_proj = pool.c_proj

        def forward(t):
            return module(t[:1], t, t, need_weights=True)

        feature, row = forward(tokens)
        assert torch.allclose(feature[0], visual(resnet.normalize(wide[:1]))), "these are the pool's tokens"
        relevance = []
        for j in range(17):  # <token, slope> is how fast S grows as the token grows
            grown = [tokens.clone() for _ in range(2)]
            grown[0][j] *= 1 + 1e-5
            grown[1][j] *= 1 - 1e-5
            up, down = (score(resnet, forward(t)[0][0], text) for t in grown)
            relevance.append(max(0.0, ((up - down) / 2e-5).item()))
    expected = row[0, 0].numpy() * np.array(relevance) / sum(relevance)
    own = attention.pool_rollout(resnet, wide, text)
    assert own.shape == (3, 16) and own.min() >= 0
    assert np.allclose(own[0].numpy(), expected[1:], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_resnet_is_guided_too(resnet, wide, form):
    text = unit_text(resnet)
    views = torch.stack([wide, wide.flip(3)])
    own = attention.guide(resnet, views, text, form)
    assert own.shape == (2, 3, 16) and own.dtype == torch.float64
    assert torch.allclose(own[1, 2], attention.guide(resnet, views[1, 2], text, form), rtol=1e-9, atol=1e-15)
    pixels = attention.guide_pixels(resnet, own, form)
    assert pixels.shape == (2, 3, 128, 128) and pixels.min() >= 0
    if form == "released":  # enlarged, less 0.2, relative to the highest, squared
        grid = own[0, 0].view(4, 4)
        big = F.interpolate(((grid - grid.min()) / (grid.max() - grid.min()))[None, None], (128, 128), mode="bilinear")
        assert torch.allclose(pixels[0, 0], (((big - 0.2) / (big - 0.2).max()).clamp(0))[0, 0] ** 2, atol=1e-4)
    else:
        assert (pixels - attention.upsample(attention.minmax(own, 1e-8), 128)).abs().max() <= 2**-17 + 1e-9
        column = pixels[0, 0, -16:, 0]  # half a cell from the lower edge, which interpolation repeats
        assert (column == column[0]).all(), "equal pixels are equal, whatever their weights round to"
