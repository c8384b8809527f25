"""A wider tower grown from a trained one computes the same, and all that is new learns."""

import grow_clip
import torch


def towers():
    """A random old tower of two heads and three blocks, and an empty one of three heads and five."""
    from open_clip.model import CLIP

    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "patch_size": 8, "head_width": 32}
    torch.manual_seed(3)
    old = CLIP(16, vision | {"layers": 3, "width": 64}, text)
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return old.eval(), CLIP(16, vision | {"layers": 5, "width": 96}, text).eval()


def test_a_grown_tower_computes_the_same_and_every_new_weight_learns():
    old, new = towers()
    # A stream of mean zero is what the widened layer norms reproduce to their epsilon.
    torch.nn.init.ones_(old.visual.ln_pre.weight)
    torch.nn.init.zeros_(old.visual.ln_pre.bias)
    grow_clip.grow(old, new)
    x, ids = torch.rand(4, 3, 64, 64), torch.randint(1, 40, (3, 8))
    want, got = old.encode_image(x), new.encode_image(x)
    assert (want - got).norm() < 1e-3 * want.norm()
    assert torch.equal(old.encode_text(ids), new.encode_text(ids))
    sgd = torch.optim.SGD(new.visual.parameters(), lr=1e-3)
    for _ in range(2):  # what an added block reads has a gradient once the block writes, after a step
        sgd.zero_grad()
        new.encode_image(x).square().sum().backward()
        still = [name for name, p in new.visual.named_parameters() if p.grad is None or not p.grad.any()]
        rows = new.visual.conv1.weight.grad[64:], new.visual.transformer.resblocks[0].attn.out_proj.weight.grad[64:]
        assert all(part.flatten(1).abs().amax(dim=1).min() > 0 for part in rows), "no new dimension is left unwritten"
        sgd.step()
    assert not still, "these never move"


def test_the_constant_of_new_dimensions_makes_up_for_a_stream_with_a_mean(monkeypatch):
    old, new = towers()
    torch.nn.init.ones_(old.visual.ln_pre.weight)
    torch.nn.init.constant_(old.visual.ln_pre.bias, 0.7)
    x = torch.rand(4, 3, 64, 64)
    off = {}
    for constant in (0.7, 0.0):
        monkeypatch.setattr(grow_clip, "stream_mean", lambda visual, constant=constant: constant)
        want, got = old.encode_image(x), grow_clip.grow(old, new).encode_image(x)
        off[constant] = ((want - got).norm() / want.norm()).item()
    assert off[0.7] < 1e-3 < 0.05 < off[0.0]


def test_added_blocks_stand_between_the_old_ones():
    assert grow_clip.sources(6, 4) == [0, None, 1, None, 2, 3]
    assert grow_clip.sources(4, 4) == [0, 1, 2, 3]
    for new, old in ((8, 4), (5, 3), (12, 4)):
        placed = grow_clip.sources(new, old)
        assert [k for k in placed if k is not None] == list(range(old)) and placed[-1] == old - 1
