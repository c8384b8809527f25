"""The last block split at its query token and the traces of chosen blocks, against open_clip's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, SPECS, images, prompted, reference_image, reference_text, toy_clip


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register, "toy-tail")


@pytest.fixture(params=["AdvVLP", "FAP", "TPT"])
def model(request, clip):
    return prompted(clip, SPECS[request.param])


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def seen_by_last(tower, run):
    """The last block of a tower, and the tokens [N, L, W] that entered it while `run` ran, one call after another."""
    block, seen = tower.transformer.resblocks[-1], []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run()
    handle.remove()
    return block, torch.cat(seen)


@torch.no_grad()
def test_image_tail_is_the_last_block_at_cls(model):
    x, prompts = images(), model.learner()
    tail = model.image_tail(x)
    block, tokens = seen_by_last(model.clip.visual, lambda: reference_image(model, x, prompts))
    h = block.ln_1(tokens)
    mixed, weights = block.attn(h, h, h, need_weights=True, average_attn_weights=False)  # [B, heads, L, L]
    check_tail(tail, block, h, mixed[:, 0], weights[:, :, 0], tokens[:, 0])
    n_prompts = prompts.vision[0].shape[0] if prompts.vision else 0
    assert tail.content.tolist() == 3 * [[False] + 16 * [True] + n_prompts * [False]]
    close(model.head_image(tail.o, tail.r), reference_image(model, x, prompts))


@torch.no_grad()
def test_text_tail_is_the_last_block_at_the_end(model):
    clip, words, prompts = model.clip.model, model.words, model.learner()
    tail, expected = model.text_tail(), []
    block, tokens = seen_by_last(clip, lambda: expected.append(reference_text(model, prompts)))
    c, length = words.ids.shape
    tokens, mask, rows = tokens[:, :length], clip.attn_mask[:length, :length], torch.arange(c)
    h = block.ln_1(tokens)
    mixed, weights = block.attn(h, h, h, need_weights=True, average_attn_weights=False, attn_mask=mask)
    check_tail(tail, block, h, mixed[rows, words.end], weights[rows, :, words.end], tokens[rows, words.end])
    close(model.head_text(tail.o, tail.r), expected[0])
    assert torch.equal(tail.content, words.content)


def check_tail(tail, block, h, mixed, weights, r):
    """Against torch's attention: projections, residual, and o as the attention-weighted sum of values (completeness)."""
    q, k, v = F.linear(h, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    close(tail.k, k)
    close(tail.v, v)
    assert (q - tail.q[:, None]).abs().amax(-1).amin(1).max() <= 1e-10 * q.abs().max(), "the query is a token's own"
    close(tail.r, r)
    close(block.attn.out_proj(tail.o), mixed)
    n, length, width = tail.v.shape
    values = tail.v.view(n, length, weights.shape[1], -1)
    close(tail.o, torch.einsum("nhl,nlhd->nhd", weights, values).reshape(n, width))


def test_text_tails_for_each_image(clip):
    model = prompted(clip, SPECS["TPT"])
    prompts = model.learner.expand(2)
    with torch.no_grad():
        prompts.text[0][1].add_(torch.randn(4, 16, generator=torch.Generator().manual_seed(6)))
    tail, text = model.text_tail(prompts), model.text_features(prompts)
    assert tail.q.shape == (2, 4, 16) and tail.k.shape == (2, 4, *model.words.ids.shape[1:], 16)
    close(F.normalize(model.head_text(tail.o, tail.r), dim=-1), text)
    close(text[0], model.text_features())
    assert (text[0] - text[1]).abs().max() > 1e-3 and tail.content.shape == tail.k.shape[:-1]


# --- what attribution needs of it (specification of CBA-FAPT, section 2.7)


def weight_of(model, image_features, tail, y):
    """S = cos(z_v, z_t) a sample and its gradient at the gathered text output, [B] and [B, W]."""
    o = tail.o[y]
    s = F.cosine_similarity(image_features, model.head_text(o, tail.r[y]), dim=-1)
    return s, torch.autograd.grad(s.sum(), o, create_graph=True)[0]


def test_gradients_at_gathered_texts_are_each_samples_own(clip):
    model, y = prompted(clip, SPECS["FAP"]), torch.tensor([2, 0, 2, 2])
    z, tail = model.image_features(images(4)), model.text_tail()
    _, together = weight_of(model, z, tail, y)
    for i in range(4):
        _, alone = weight_of(model, z[i : i + 1], tail, y[i : i + 1])
        close(together[i : i + 1], alone)


def test_a_text_map_is_linear_in_the_image_feature(clip):
    model, y = prompted(clip, SPECS["FAP"]), torch.tensor([1])
    tail = model.text_tail()
    o = tail.o[y]
    z_t = F.normalize(model.head_text(o, tail.r[y]), dim=-1)

    def attribution(feature):  # the value path alone; the forward weight does not see the image
        (w,) = torch.autograd.grad((feature * z_t).sum(), o, retain_graph=True)
        return tail.v[y] @ w[0]

    a, b = model.image_features(images(2)).split(1)
    close(attribution(2 * a - 3 * b), 2 * attribution(a) - 3 * attribution(b))


@pytest.mark.parametrize("name", ["AdvVLP", "FAP"])
def test_second_order_gradients_reach_the_prompts_of_every_block(clip, name):
    """The distance of two visual maps plus that of two textual ones, against central differences along random directions."""
    model, x, y = prompted(clip, SPECS[name]), images(4), torch.tensor([2, 0])

    def loss():
        prompts = model.learner()
        text, maps = model.text_tail(prompts), []
        for half in x.split(2):
            image = model.image_tail(half, prompts)
            s = F.cosine_similarity(model.head_image(image.o, image.r), model.head_text(text.o[y], text.r[y]), dim=-1)
            (w,) = torch.autograd.grad(s.sum(), image.o, create_graph=True)
            lam = F.cosine_similarity(image.q[:, None], image.k, dim=-1)
            visual = (lam * (image.v @ w[:, :, None])[..., 0])[image.content]
            _, w_t = weight_of(model, model.head_image(image.o, image.r), text, y)
            maps.append((visual, (text.v[y] @ w_t[:, :, None])[..., 0][text.content[y]]))
        return sum((a - b).square().sum() for a, b in zip(*maps, strict=True))

    parameters = dict(model.learner.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for (key, p), gradient in zip(parameters.items(), gradients, strict=True):
        blocks = range(len(p)) if key.endswith("_deep") else [...]
        for block in blocks:
            direction = torch.zeros_like(p)
            direction[block] = torch.randn(p[block].shape, generator=torch.Generator().manual_seed(3)).double()
            h, values = 1e-4, []
            for sign in (1, -1):
                with torch.no_grad():
                    p.add_(sign * h * direction)
                values.append(loss().item())
                with torch.no_grad():
                    p.sub_(sign * h * direction)
            numeric, analytic = (values[0] - values[1]) / (2 * h), (gradient * direction).sum().item()
            assert analytic != 0 and abs(numeric - analytic) <= 1e-4 * abs(analytic), (key, block)


# --- traces


@pytest.mark.parametrize("name", ["deep vision only", "TPT"])
def test_a_trace_is_what_entered_and_mixed_the_blocks(clip, name):
    model, x = prompted(clip, SPECS[name]), images()
    prompts, blocks, seen = model.learner(), clip.visual.transformer.resblocks, []
    handles = [b.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for b in blocks]
    expected = F.normalize(reference_image(model, x, prompts), dim=-1)
    for handle in handles:
        handle.remove()
    features, trace = model.image_trace(x, (-1, 1), prompts)
    close(features, expected)
    assert len(trace.tokens) == len(trace.matrices) == 2
    u = torch.randn(features.shape, generator=torch.Generator().manual_seed(4)).double()
    for i, tokens, matrices in zip((1, 3), trace.tokens, trace.matrices, strict=True):
        close(tokens, seen[i])
        h = blocks[i].ln_1(seen[i])
        close(matrices, blocks[i].attn(h, h, h, need_weights=True, average_attn_weights=False)[1])
        start = seen[i].detach().requires_grad_()
        later = start
        for j in range(i, len(blocks)):  # the rest of the tower on open_clip's blocks
            if j > i and j < len(prompts.vision):
                later = torch.cat([later[:, :-2], prompts.vision[j].expand(len(x), -1, -1)], dim=1)
            later = blocks[j](later)
        feature = F.normalize(clip.visual.ln_post(later[:, 0]) @ clip.visual.proj, dim=-1)
        (reference,) = torch.autograd.grad((feature * u).sum(), start)
        ours, through = torch.autograd.grad((features * u).sum(), (tokens, matrices), retain_graph=True)
        close(ours, reference, 1e-8)
        assert through.shape == matrices.shape and through.abs().max() > 0
    assert through[:, :, 1:].abs().max() == 0, "of the last block CLS reads its own row alone"


# --- training


@pytest.mark.parametrize("name", SPECS)
def test_every_method_learns(clip, name):
    model, x, y = prompted(clip, SPECS[name]), images(8), torch.arange(8) % len(NAMES)
    optimizer, losses = torch.optim.SGD(model.learner.parameters(), lr=0.05), []
    for _ in range(8):
        loss = F.cross_entropy(model.logits(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.tensor(losses).isfinite().all()
