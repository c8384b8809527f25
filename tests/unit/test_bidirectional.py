"""Attribution maps of the last block and the losses on them: written-out sums, exact facts in float64, finite differences."""

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import SPECS, images, prompted, toy_clip
from toy_tuning import close, in_step

from robustvlm_lite.attention import (
    FUSIONS,
    NORMS,
    area,
    as_distribution,
    bidirectional_map,
    explain,
    map_divergence,
    patch_curve,
)
from robustvlm_lite.clip import ZeroShotCLIP
from robustvlm_lite.runtime import UserError

Y = torch.tensor([2, 0, 2])


@pytest.fixture(scope="module")
def clip(register) -> ZeroShotCLIP:
    return toy_clip(register, "toy-maps")


@pytest.fixture(scope="module")
def tails(clip):
    """tower -> (tail, w, heads, attention block): S = cos with the label's text, both towers."""
    model = prompted(clip, SPECS["FAP"])
    image, text = model.image_tail(images()), model.text_tail()
    own = text.o[Y]
    score = F.cosine_similarity(model.head_image(image.o, image.r), model.head_text(own, text.r[Y]), dim=-1)
    w_image, w_text = torch.autograd.grad(score.sum(), (image.o, own), create_graph=True)
    text = text.take(Y)
    towers = (clip.visual.transformer, clip.model.transformer)
    blocks = [tower.resblocks[-1] for tower in towers]
    return {
        "image": (image, w_image, blocks[0].attn.num_heads, blocks[0]),
        "text": (text, w_text, blocks[1].attn.num_heads, blocks[1]),
    }


# --- maps


def written_out(tail, w, heads, fusion):
    """Token by token, head by head."""
    n, length, width = tail.v.shape
    size, out = width // heads, torch.zeros(n, length, dtype=torch.float64)
    for i in range(n):
        cosines = [F.cosine_similarity(tail.q[i], tail.k[i, j], dim=0) for j in range(length)]
        inside = torch.stack([cosines[j] for j in range(length) if tail.content[i, j]])
        for j in range(length):
            if not tail.seen[i, j]:
                continue
            evidence = w[i] @ tail.v[i, j]
            if fusion in ("F1", "F5a", "F5b"):
                out[i, j] = {"F1": cosines[j] * evidence, "F5a": cosines[j], "F5b": evidence}[fusion]
            elif fusion == "F3":
                share = (cosines[j] - inside.min()) / (inside.max() - inside.min()) if tail.content[i, j] else 0.0
                out[i, j] = (share * evidence).clamp_min(0)
            else:
                for h in range(heads):
                    part = slice(h * size, (h + 1) * size)
                    weight = F.cosine_similarity(tail.q[i, part], tail.k[i, j, part], dim=0)
                    if fusion == "F4":
                        scores = tail.k[i, :, part] @ tail.q[i, part] / size**0.5
                        weight = scores[tail.seen[i]].softmax(0)[tail.seen[i, :j].sum()]
                    out[i, j] += weight * (w[i, part] @ tail.v[i, j, part])
    return out


@torch.no_grad()
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_map_is_its_sum_written_out(tails, tower, fusion):
    tail, w, heads, _ = tails[tower]
    close(bidirectional_map(tail, w, heads, fusion), written_out(tail, w, heads, fusion))


@torch.no_grad()
@pytest.mark.parametrize("tower", ["image", "text"])
def test_softmax_attention_is_complete(tails, tower):
    """All tokens together, prompts and CLS included, give <w, o>; no other fusion does."""
    tail, w, heads, _ = tails[tower]
    whole = (w * tail.o).sum(1)
    close(bidirectional_map(tail, w, heads, "F4").sum(1), whole, 1e-12)
    assert (bidirectional_map(tail, w, heads, "F1").sum(1) - whole).abs().max() > 1e-3 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("tower", ["image", "text"])
def test_before_or_after_the_output_projection_is_the_same(tails, tower):
    """<w, v> with w at the projection's input is <W^-T w, W v> behind it: only lambda is ambiguous."""
    tail, w, _, block = tails[tower]
    weight = block.attn.out_proj.weight
    behind = torch.linalg.solve(weight.T, w.T).T  # the gradient there, so that w = W^T times it
    close(w, behind @ weight)
    close((tail.v @ weight.T @ behind[:, :, None])[..., 0], (tail.v @ w[:, :, None])[..., 0], 1e-8)


def test_the_backward_weight_crosses_no_attention(clip):
    """From the score back to o there is no softmax, so that no second derivative of attention is needed."""
    model = prompted(clip, SPECS["FAP"])
    tail = model.image_tail(images())
    score = F.cosine_similarity(model.head_image(tail.o, tail.r), model.text_features()[Y].detach(), dim=-1).sum()
    stop, seen, todo = tail.o.grad_fn, set(), [score.grad_fn]
    beyond = {tail.r.grad_fn}
    while todo:
        node = todo.pop()
        if node is None or node in seen or node is stop or node in beyond:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert not any("Softmax" in name or "Bmm" in name for name in names) and any("LayerNorm" in name for name in names)


def test_the_text_map_is_linear_in_the_image_feature(clip):
    """A_t(x) = M_y z(x): q, k and v of the text do not see the image. Twice one image minus three times another."""
    defense, batch = in_step("CBA-FAPT", clip)
    batch.y = torch.tensor([1])
    a, b = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double(), dim=1).split(1)

    def text_map(feature):
        own = batch.tail.o[batch.y]
        score = (feature * F.normalize(batch.task.model.head_text(own, batch.tail.r[batch.y]), dim=1)).sum()
        (w,) = torch.autograd.grad(score, own, retain_graph=True)
        one = batch.tail.take(batch.y)
        return bidirectional_map(one, w, 2)

    close(text_map(2 * a - 3 * b), 2 * text_map(a) - 3 * text_map(b))
    assert text_map(a).abs().max() > 0


@pytest.mark.parametrize("name", ["FAP", "TPT"])
def test_explain_is_the_map_of_each_image_alone(clip, name):
    """With learned prompts, and where no prompt is in the image."""
    model, x = prompted(clip, SPECS[name]), images()
    image_map, text_map, content = explain(model, x, Y)
    for i in range(3):
        tail, text = model.image_tail(x[i : i + 1].requires_grad_()), model.text_tail().take(Y[i : i + 1])
        score = F.cosine_similarity(model.head_image(tail.o, tail.r), model.head_text(text.o, text.r)).sum()
        w_v, w_t = torch.autograd.grad(score, (tail.o, text.o))
        close(image_map[i], written_out(tail, w_v, 4, "F1")[tail.content].detach())
        close(text_map[i], written_out(text, w_t, 2, "F1")[0].detach())
        assert torch.equal(content[i], text.content[0])
    assert not image_map.requires_grad and all(p.grad is None for p in model.parameters())


# --- faithfulness


def test_patches_go_in_the_order_of_the_map():
    """A model that only sees the upper left patch: deleting it first drops the answer at once, last at the end."""
    x = torch.full((1, 3, 8, 8), 0.1)
    x[:, :, :4, :4] = 0.9

    def model(images):
        lit = images[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([20 * lit, torch.full_like(lit, 10.0)], 1)

    zero, first = torch.zeros(1, dtype=torch.int64), torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    on, off = (model(v).softmax(1)[0, 0].item() for v in (x, x.mean((2, 3), keepdim=True).expand_as(x)))
    for order, way, values in (
        (first, "deletion", [on, off, off, off, off]),
        (-first, "deletion", [on, on, on, on, off]),
        (first, "insertion", [off, on, on, on, on]),
        (-first, "insertion", [off, off, off, off, on]),
    ):
        curve = patch_curve(model, x, zero, order, way, n_steps=4)
        assert curve[0].tolist() == pytest.approx(values), (order, way)
        assert area(curve).item() == pytest.approx((sum(values) - (values[0] + values[-1]) / 2) / 4)
    for bad in ({"way": "removal"}, {"maps": torch.ones(1, 5)}, {"maps": torch.ones(1, 9)}):
        with pytest.raises(UserError, match="square grid that divides 8 pixels"):
            patch_curve(model, x, zero, **{"maps": first, "way": "deletion"} | bad)


# --- distributions and their divergence


@pytest.mark.parametrize("norm", NORMS)
def test_distributions_are_the_formulas_over_the_content(norm):
    g = torch.Generator().manual_seed(1)
    a = 0.1 * torch.randn(4, 7, generator=g).double()
    a[:, 1] = a[:, 1].abs()  # every row has something positive
    content = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]] * 2).bool()
    p = as_distribution(a, content, norm)
    close(p.sum(1), torch.ones(4).double())
    for row, own, inside in zip(p, a, content, strict=True):
        kept = own[inside]
        raw = {
            "N1": torch.cat([kept.clamp_min(0), (-kept).clamp_min(0)]),
            "N2": kept.clamp_min(0),
            "N3": kept.abs(),
            "N4": kept.exp(),
            "N5": ((kept - kept.mean()) / (kept.var(correction=0) + 1e-12).sqrt()).exp(),
        }[norm]
        expected = raw / raw.sum()
        if norm in ("N1", "N2", "N3"):
            expected = 0.999 * expected + 0.001 / len(expected)
        places = inside.repeat(len(row) // len(inside))
        close(row[places], expected)
        assert not row[~places].any()


def test_a_map_without_positive_evidence_says_nothing_under_n2():
    a, content = -torch.ones(1, 3).double(), torch.tensor([[False, True, True]])
    assert as_distribution(a, content, "N2").tolist() == [[0, 0.5, 0.5]]
    assert as_distribution(0 * a, content, "N1").sum() == pytest.approx(1)
    for norm in NORMS:  # Grad-ECLIP's ReLU leaves whole maps at 0
        leaf = (0 * a).requires_grad_()
        map_divergence(as_distribution(leaf, content, norm), as_distribution(2 * leaf, content, norm)).sum().backward()
        assert leaf.grad.isfinite().all(), norm


def test_the_divergence_is_kl_and_skips_what_neither_has():
    p, q = torch.tensor([[0.2, 0.8, 0.0]]).double(), torch.tensor([[0.5, 0.5, 0.0]]).double()
    expected = 0.2 * torch.tensor(0.4).log() + 0.8 * torch.tensor(1.6).log()
    assert map_divergence(p, q).item() == pytest.approx(expected.item()) and map_divergence(p, p).item() == 0
    p.requires_grad_(), q.requires_grad_()
    map_divergence(p, q).sum().backward()
    assert p.grad.isfinite().all() and q.grad.isfinite().all()
