"""Attribution maps of the last block and the losses on them: written-out sums, exact facts in float64, finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, SPECS, images, prompted, toy_clip
from toy_tuning import in_step

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
from robustvlm_lite.defenses import build_prompts, gradient_shares
from robustvlm_lite.defenses.cba_fapt import FULL, Choices
from robustvlm_lite.prompts import PromptSpec
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


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


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


# --- the losses of CBA-FAPT


def by_hand(defense, batch):
    """(L_VAA, L_TAA), weighted, with one backward pass an image."""
    c, model, sides = defense.config, batch.task.model, []
    heads = [t.resblocks[-1].attn.num_heads for t in (defense.clip.visual.transformer, defense.clip.model.transformer)]
    for x in (batch.x, batch.x_adv):
        rows = []
        for i, label in enumerate(batch.y.tolist()):
            image, text = model.image_tail(x[i : i + 1]), model.text_tail()
            z, own = F.normalize(model.head_image(image.o, image.r), dim=1), text.o[[label]]
            every = F.normalize(model.head_text(text.o, text.r), dim=1)
            of = int((z @ every.T).argmax()) if c.score == "predicted" else label
            own = text.o[[of]]
            z_t = F.normalize(model.head_text(own, text.r[[of]]), dim=1)
            score = c.score_scale * (z * z_t).sum()
            if c.score == "logprob":
                rest = [k for k in range(len(every)) if k != of]
                logits = model.clip.logit_scale * torch.cat([z @ z_t.T, z @ every[rest].T], dim=1)
                score = logits.log_softmax(1)[0, 0]
            w_v, w_t = torch.autograd.grad(score, (image.o, own), create_graph=True)
            one = text.take(torch.tensor([of]))
            a_v = bidirectional_map(image, w_v, heads[0], c.fusion)[image.content]
            a_t = bidirectional_map(one, w_t, heads[1], c.fusion)
            a_v = {"none": a_v, "l1": a_v / a_v.abs().sum(), "l2": a_v / a_v.norm()}[c.length]
            rows.append((a_v, as_distribution(a_t, one.content, c.text_norm)[0]))
        sides.append(rows)
    stop = torch.Tensor.detach if c.stop_clean else lambda t: t
    pairs = list(zip(*sides, strict=True))
    vaa = sum((stop(a[0]) - b[0]).norm() for a, b in pairs) / len(pairs)
    taa = sum(map_divergence(stop(a[1])[None], b[1][None])[0] for a, b in pairs) / len(pairs)
    return c.beta * vaa, c.gamma * taa


VARIANTS = [
    {}, {"fusion": "F2"}, {"fusion": "F4", "text_norm": "N3"}, {"fusion": "F3", "text_norm": "N2"}, {"score": "logprob"},
    {"score_scale": 100.0}, {"length": "l1"}, {"length": "l2"}, {"stop_clean": True}, {"text_norm": "N5"},
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_map_losses_and_gradients_are_those_of_one_image_after_another(change, clip):
    """Labels that come twice in a batch included: each image has its own copy of its class's text."""
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, **change))
    terms, expected = defense.losses(batch), by_hand(defense, batch)
    for key, value in zip(("vaa", "taa"), expected, strict=True):
        close(terms[key].detach(), value.detach(), 1e-6)
        ours, theirs = (torch.autograd.grad(v, defense.learned(), retain_graph=True) for v in (terms[key], value))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-5)


def test_maps_of_the_predicted_class(clip):
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score="predicted"))
    terms, expected = defense.losses(batch), by_hand(defense, batch)
    close(terms["vaa"].detach(), expected[0].detach(), 1e-6)


def test_maps_of_two_predicted_classes_have_a_finite_divergence(clip, monkeypatch):
    """Their names may differ in length; places that only one of them has are compared with the uniform share."""
    defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score="predicted"))
    assert len(set(batch.tail.content.sum(1).tolist())) > 1, "else the lengths would not be tested"
    other = torch.cat([torch.zeros(5), torch.full((5,), 3)]).long()  # "cat" for the clean images, "abyssinian" for the others
    monkeypatch.setattr(defense, "_classes", lambda features, batch: other)
    term = defense.losses(batch)["taa"]
    assert term.isfinite() and term > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(term, defense.learned()))


def test_second_order_gradients_match_finite_differences(clip):
    defense, batch = in_step("CBA-FAPT", clip, n=3)

    def value():
        fresh = defense.batch(batch.task, batch.index, batch.x, batch.y)
        fresh.x_adv = batch.x_adv
        terms = defense.losses(fresh)
        return terms["vaa"] / FULL.beta + terms["taa"] / FULL.gamma

    named = dict(defense.learner.named_parameters())
    gradients = torch.autograd.grad(value(), list(named.values()))
    for (key, p), gradient in zip(named.items(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double()
        ends, h = [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * h * direction)
            ends.append(value().item())
            with torch.no_grad():
                p.sub_(sign * h * direction)
        numeric, analytic = (ends[0] - ends[1]) / (2 * h), (gradient * direction).sum().item()
        assert analytic != 0 and abs(numeric - analytic) <= 1e-4 * abs(analytic) + 1e-9, key


def test_a_term_that_does_nothing_is_seen(clip):
    """A softmax over raw attributions (N4) is dead; the default is not, and neither is the image term."""
    shares = {}
    for norm in ("N1", "N4"):
        defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, text_norm=norm))
        shares[norm] = gradient_shares(defense.losses(batch), defense.learned())
    assert shares["N1"]["taa"] > 1e-6 and shares["N1"]["vaa"] > 1e-6
    assert shares["N4"]["taa"] < 0.1 * shares["N1"]["taa"]


def test_the_size_of_the_maps_is_kept_and_follows_the_scale(clip):
    sizes = []
    for scale in (1.0, 100.0):
        defense, batch = in_step("CBA-FAPT", clip, config=replace(FULL, score_scale=scale))
        terms = defense.losses(batch)
        sizes.append((batch.notes["map"], terms["vaa"].item(), terms["taa"].item()))
    assert sizes[1][0] == pytest.approx(100 * sizes[0][0]) and sizes[1][1] == pytest.approx(100 * sizes[0][1], rel=1e-4)
    assert sizes[1][2] == pytest.approx(sizes[0][2], rel=1e-6), "a distribution has no scale"


def test_bad_choices_are_one_clear_line(clip, register):
    resnet = toy_clip(register, "toy-maps-rn", image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    tail = prompted(clip, SPECS["AdvVLP"]).image_tail(images(1))
    cases = {
        "CBA-FAPT: expected beta >= 0, got -0.1": lambda: Choices(beta=-0.1),
        "unknown fusion 'F5'; did you mean": lambda: Choices(fusion="F5"),
        "unknown text_norm 'n1'; known: N1": lambda: Choices(text_norm="n1"),
        "unknown score 'labels'; did you mean 'label'?": lambda: Choices(score="labels"),
        "unknown base 'FAP'; known: ce_ce, fap": lambda: Choices(base="FAP"),
        "expected score_scale > 0, got 0": lambda: Choices(score_scale=0),
        "unknown fusion 'F6'": lambda: bidirectional_map(tail, tail.o, 4, "F6"),
        "unknown text normalization 'N6'": lambda: as_distribution(tail.q, tail.q > 0, "N6"),
        "CBA-FAPT: expected a vision transformer, whose tokens it maps, got toy-maps-rn": (
            lambda: build_prompts("CBA-FAPT", resnet, NAMES, spec=PromptSpec(n_text=2))),
    }  # fmt: skip
    for line, call in cases.items():
        with pytest.raises(UserError) as error:
            call()
        assert line in str(error.value) and "\n" not in str(error.value), error.value
