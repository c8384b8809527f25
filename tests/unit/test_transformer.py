"""Our order of operations against open_clip's own forward passes, on the same modules."""

import pytest
import torch

from robustvlm_lite import transformer

TEXTS = ["a photo of a dog.", "cat", "two red stars and a blue ring left of a green bar, a photo of a wild cat"]


@pytest.fixture(scope="module", params=["nano", "gelu", "quickgelu"])
def model(request, random_clip, register):
    """(open_clip model, tokenizer): every weight moved, so that a bias or a gain left out would show."""
    import copy

    import open_clip

    if request.param == "nano":
        model, tokenizer = copy.deepcopy(random_clip.model), random_clip.tokenizer
    else:
        name = register(f"transformer-{request.param}", quick_gelu=request.param == "quickgelu")
        model, tokenizer = open_clip.create_model(name, load_weights=False).eval(), open_clip.get_tokenizer(name)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def x(model):
    side = model[0].visual.image_size[0]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(6))


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_the_activations_under_test_differ(register):
    import open_clip

    kinds = set()
    for quick in (True, False):
        toy = open_clip.create_model(register(f"activation-{quick}", quick_gelu=quick), load_weights=False)
        kinds.add(type(toy.visual.transformer.resblocks[0].mlp.gelu).__name__)
    assert len(kinds) == 2


@torch.no_grad()
def test_cls_is_what_open_clip_returns(model, x):
    visual = model[0].visual
    tokens = transformer.image_tokens(visual, x)
    assert tokens.shape == (3, 1 + visual.grid_size[0] * visual.grid_size[1], visual.output_dim)
    close(tokens[:, 0], model[0].encode_image(x))


@torch.no_grad()
def test_every_token_is_what_open_clip_feeds_to_its_pooling(model, x):
    """Patch tokens feed no logit, so only a hook can see open_clip's."""
    visual, seen = model[0].visual, []
    handle = visual.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    visual(x)
    handle.remove()
    close(transformer.image_tokens(visual, x), visual.ln_post(seen[0]) @ visual.proj)


@torch.no_grad()
def test_stages_are_the_inputs_of_the_blocks(model, x):
    visual, seen = model[0].visual, []
    handles = [b.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in visual.transformer.resblocks]
    visual(x)
    for handle in handles:
        handle.remove()
    stages = transformer.image_stages(visual, x)
    assert len(stages) == len(seen) + 1
    for ours, theirs in zip(stages, seen, strict=False):
        close(ours, theirs)


def test_pixel_gradients_are_open_clips(model, x):
    gradients = []
    for encode in (model[0].encode_image, lambda x: transformer.image_tokens(model[0].visual, x)[:, 0]):
        pixels = x.clone().requires_grad_()
        encode(pixels).square().sum().backward()
        gradients.append(pixels.grad)
        model[0].zero_grad(set_to_none=True)
    close(gradients[1], gradients[0], 1e-4)


@torch.no_grad()
def test_text_is_what_open_clip_returns(model):
    clip, tokenizer = model
    full = tokenizer(["dog " * 100])  # fills the context, so nothing can be cut
    for ids in (tokenizer(TEXTS), tokenizer(TEXTS[:1]), torch.cat([tokenizer(TEXTS[1:2]), full])):
        close(transformer.text_features(clip, ids), clip.encode_text(ids))


@torch.no_grad()
def test_attention_weights_are_those_of_torch(model, x):
    block, seen = model[0].visual.transformer.resblocks[-1], []
    handle = block.attn.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0]), with_kwargs=True)
    model[0].visual(x)
    handle.remove()
    _, expected = block.attn(seen[0], seen[0], seen[0], need_weights=True, average_attn_weights=False)
    stages = transformer.image_stages(model[0].visual, x)
    ours = transformer.attention_weights(block.attn, block.ln_1(stages[-2]))
    assert ours.shape == expected.shape and block.attn.num_heads == ours.shape[1] > 1
    close(ours, expected)
    assert torch.allclose(ours.sum(-1), torch.ones(ours.shape[:-1]), atol=1e-5)
    assert ours.std(-1).min() > 1e-4, "uniform rows would hide a wrong scale"


@torch.no_grad()
def test_a_mask_hides_the_future(model):
    block = model[0].transformer.resblocks[0]
    x = torch.randn(2, 6, block.attn.embed_dim, generator=torch.Generator().manual_seed(7))
    mask = model[0].attn_mask[:6, :6]
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = (transformer.attention(block.attn, v, mask) for v in (x, changed))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])
    expected, _ = block.attn(x, x, x, attn_mask=mask, need_weights=False)
    close(before, expected)


@torch.no_grad()
def test_given_positions_replace_the_models_own(model, x):
    visual = model[0].visual
    own = transformer.image_tokens(visual, x)
    assert torch.equal(transformer.image_tokens(visual, x, visual.positional_embedding), own)
    moved = transformer.image_tokens(visual, x, visual.positional_embedding.roll(1, 0))
    assert (moved - own).abs().max() > 1e-3
