"""Defenses at test time against plain formulas: the step, the answers, order and batch, counts, and what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, toy_clip

from robustvlm_lite import defenses, views
from robustvlm_lite.defenses import Recipe, TestTime
from robustvlm_lite.prompts import Prompts
from robustvlm_lite.runtime import UserError, generator

SMALL = {"n_views": 6, "chosen": 2, "n_neighbors": 3}
RECIPES = {name: replace(r, **SMALL) for name, r in defenses.TEST_TIME.items() if r is not None}
KEYS = [(3, "toy", "views", i) for i in (5, 11, 12)]


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register)


@pytest.fixture(scope="module")
def x():
    return (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 255).round() / 255


def classifier(clip, name="TPT", **changed):
    return TestTime(clip, name, replace(RECIPES[name], **changed)).classifier(NAMES)


def by_hand(clip, recipe, seen):
    """Text features after torch's own AdamW on one image's context, from the features that were seen."""
    model = TestTime(clip, "by hand", recipe).classifier(NAMES).model
    context = torch.nn.Parameter(model.learner.ctx.detach().clone())
    optimizer = torch.optim.AdamW([context], lr=5e-3)  # weight decay 0.01 is torch's own default
    texts = []
    for features, chosen in zip(seen.features, seen.chosen, strict=True):
        with torch.no_grad():
            context.copy_(model.learner.ctx)
        optimizer.state.clear()
        text = model.text_features(Prompts((context,)))
        p = (clip.logit_scale * features[chosen] @ text.T).softmax(dim=1)
        mean = p.mean(0)
        loss = -(mean * mean.log()).sum() if recipe.loss == "marginal" else -(p * p.log()).sum(1).mean()
        if recipe.dispersion:
            loss = loss - recipe.dispersion * (text - text.mean(0)).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        texts.append(model.text_features(Prompts((context.detach(),))))
    return torch.stack(texts)


@pytest.mark.parametrize("name", ["TPT", "C-TPT", "R-TPT"])
def test_the_step_is_torchs_adamw_on_each_image_alone(clip, x, name):
    seen = classifier(clip, name).keyed(KEYS).look(x)
    torch.testing.assert_close(seen.text, by_hand(clip, RECIPES[name], seen), rtol=1e-6, atol=1e-7)
    before = TestTime(clip, name, RECIPES[name]).classifier(NAMES).model.constants()[1]
    assert (seen.text - before).abs().max() > 1e-4


def test_the_surest_views_are_chosen(clip, x):
    seen = classifier(clip, "TPT").keyed(KEYS).look(x)
    p = seen.first.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    for row, chosen in zip(entropy, seen.chosen, strict=True):
        assert sorted(chosen.tolist()) == sorted(row.argsort()[:2].tolist())
    at_papers_size = defenses.TEST_TIME["A-TPT (as reported)"]
    assert (at_papers_size.n_views, at_papers_size.chosen) == (64, 6)


def answers_by_hand(name, seen, scale):
    """Logits up to a constant of each image, from features and texts."""
    logits = scale * seen.features @ seen.text.mT
    p = logits.softmax(-1)
    if name in ("TPT", "C-TPT"):
        return logits[:, 0]
    if name in ("View ensemble", "TPT-Ensemble"):
        return p.mean(1).log()
    cosines = seen.features @ seen.features.mT
    rows = []
    for image, one in enumerate(cosines):
        score = torch.stack([torch.cat([row[:v], row[v + 1 :]]).sort().values[-3:].mean() for v, row in enumerate(one)])
        rows.append(((score / 0.01).softmax(0)[:, None] * logits[image]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["TPT", "C-TPT", "View ensemble", "TPT-Ensemble", "R-TPT"])
def test_answers_are_the_weighed_views(clip, x, name):
    seen = classifier(clip, name).keyed(KEYS).look(x)
    if seen.text.ndim == 2:
        seen.text = seen.text.expand(3, -1, -1)
    want = answers_by_hand(name, seen, clip.logit_scale)
    torch.testing.assert_close(seen.logits.softmax(-1), want.softmax(-1))


def mode_by_hand(f, p):
    """MTA of one image, f [V, D], p [V, C], with loops."""
    n = len(f)
    d = torch.tensor([[float(((f[a] - f[b]) ** 2).sum()) for b in range(n)] for a in range(n)], dtype=f.dtype)
    k = max(1, int(0.3 * (n - 1)))
    h2 = torch.stack([torch.cat([d[a, :a], d[a, a + 1 :]]).sort().values[:k].mean() / 2 for a in range(n)])
    w, y, m = p @ p.T, torch.full((n,), 1 / n, dtype=f.dtype), f[0]
    for _ in range(5):
        for _ in range(5):
            kernel = torch.exp(-((f - m) ** 2).sum(1) / (2 * h2))
            new = ((kernel + 4 * w @ y) / 0.2).softmax(0)
            y, stop = new, (new - y).norm() < 1e-6
            if stop:
                break
        for _ in range(5):
            kernel = torch.exp(-((f - m) ** 2).sum(1) / (2 * h2))
            new = F.normalize(((kernel * y)[:, None] * f).sum(0), dim=0)
            m, stop = new, (new - m).norm() < 1e-6
            if stop:
                break
    return m, y


def test_mta_is_its_mean_shift(clip, x):
    seen = classifier(clip, "MTA").keyed(KEYS).look(x)
    for features, first, weights, logits in zip(seen.features, seen.first, seen.weights, seen.logits, strict=True):
        mode, y = mode_by_hand(features, first.softmax(-1))
        torch.testing.assert_close(weights, y, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(logits, clip.logit_scale * seen.text @ mode, rtol=1e-6, atol=1e-8)


# With quirk_self rounding decides which views are neighbors, and rounding may depend on the batch.
ORDERLESS = [name for name in RECIPES if not RECIPES[name].quirk_self]


@pytest.mark.parametrize("name", [*ORDERLESS, "TTC"])
def test_answers_depend_on_the_image_and_its_key_alone(clip, x, name):
    names = NAMES if name != "TTC" else (NAMES, ("a photo of a {}.",))
    model = classifier(clip, name) if name != "TTC" else defenses.build_test_time("TTC", clip).classifier(*names)
    whole = model.keyed(KEYS)(x)
    turned = model.keyed(KEYS[::-1])(x.flip(0)).flip(0)
    alone = torch.cat([model.keyed([key])(image[None]) for key, image in zip(KEYS, x, strict=True)])
    torch.testing.assert_close(turned, whole, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(alone, whole, rtol=1e-6, atol=1e-8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert name in ("TPT", "C-TPT") or not torch.allclose(model(x), whole)  # without keys it draws anew


def test_chunks_change_nothing(clip, x, monkeypatch):
    model = classifier(clip, "R-TPT").keyed(KEYS)
    whole = model(x)
    monkeypatch.setattr("robustvlm_lite.defenses.test_time.CHUNK", 6)
    torch.testing.assert_close(model(x), whole, rtol=1e-6, atol=1e-8)


def test_the_released_leak_makes_the_order_matter(clip, x):
    """With a rate so large that the tuned text is another, the map of the second image is another, too."""

    def masks(**changed):
        model = classifier(clip, "A-TPT (released)", lr=5.0, **changed)
        return [model.keyed([key]).look(image[None]).mask for key, image in zip(KEYS, x, strict=True)]

    leaking, clean = masks(), masks(quirk_leak=False)
    assert (leaking[0] == clean[0]).all()  # nothing came before the first image
    assert any((a != b).any() for a, b in zip(leaking[1:], clean[1:], strict=True))
    alone = classifier(clip, "A-TPT (released)", lr=5.0).keyed(KEYS[1:2]).look(x[1:2]).mask
    assert (alone == clean[1]).all()


def test_one_view_and_no_step_is_plain_clip(clip, x):
    want = clip.classifier(NAMES, ("a photo of a {}.",))(x)
    one = {"n_views": 1, "chosen": 1}
    for name in ("View ensemble", "R-TPT", "MTA", "A-TPT (as reported)"):
        got = classifier(clip, name, loss="", **one)(x)
        torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=1e-5, atol=1e-7)


def test_counts_are_the_floor(clip, x):
    """Section 7.2 of the specification, V = 6 views of 3 images, 4 classes: text passes 2 forward, 1 backward a tuned image."""
    want = {"View ensemble": (6, 0, 0, 0), "MTA": (6, 0, 0, 0), "TPT": (6, 0, 8, 4), "R-TPT": (6, 0, 8, 4)}
    want |= {"A-TPT (as reported)": (6 + 2 + 2, 2 + 2, 8, 4), "A-TPT (released)": (6 + 5, 5, 8, 4)}
    for name, counts in want.items():
        model = classifier(clip, name)
        model(x)
        p = model.passes
        assert (p.image_forwards, p.image_backwards, p.text_forwards, p.text_backwards) == tuple(3 * c for c in counts), name


@pytest.mark.parametrize("name", ["View ensemble", "MTA", "R-TPT", "TPT"])
def test_gradients_of_pixels_hold_the_step_constant(clip, x, name):
    """Of a single view without rounding they are those of the answer at the tuned text."""
    model = classifier(clip, name, n_views=1, chosen=1)
    image = x[:1].clone().requires_grad_()
    (got,) = torch.autograd.grad(model(image)[0, 0], image)
    text = model.look(image).text
    text = text[0] if text.ndim == 3 else text
    other = x[:1].clone().requires_grad_()
    logits = clip.logit_scale * clip.image_features(other) @ text.T
    value = logits.log_softmax(-1)[0, 0] if name == "View ensemble" else logits[0, 0]
    (want,) = torch.autograd.grad(value, other)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_smooth_step_changes_the_gradient_and_not_the_answer(clip, x):
    plain, images = classifier(clip, "TPT").keyed(KEYS), x.clone().requires_grad_()
    smooth = plain.smooth().keyed(KEYS)
    torch.testing.assert_close(smooth(images), plain(images))
    g = [torch.autograd.grad(m(images)[:, 0].sum(), images)[0] for m in (plain, smooth)]
    assert (g[0] - g[1]).abs().max() > 1e-9


def test_ttc_is_its_counterattack(clip, x):
    """Against loops over one image, with the same noise."""
    model = defenses.build_test_time("TTC", clip).classifier(NAMES, ("a photo of a {}.",))
    got = model.keyed(KEYS).move(x)
    eps, step = 4 / 255, 1 / 255

    def feature(v):
        return clip.tokens(v[None])[0, 0]

    for image, key, moved in zip(x, KEYS, got, strict=True):
        d = (2 * torch.rand(image.shape, generator=generator(*key)) - 1) * eps
        d = ((image + d).clamp(0, 1) - image).detach()
        kept, share = [d], ((feature(image + d) - feature(image)).norm() / feature(image).norm()).item()
        for _ in range(2):
            v = d.clone().requires_grad_()
            (feature(image + v) - feature(image).detach()).square().sum().backward()
            d = ((image + (d + step * v.grad.sign()).clamp(-eps, eps)).clamp(0, 1) - image).detach()
            kept.append(d)
        weight = torch.tensor([1.0, 2.718281828459045**2, 2.718281828459045**4], dtype=x.dtype)
        want = sum(w * k for w, k in zip(weight / weight.sum(), kept, strict=True)) if share < 0.2 else kept[0]
        torch.testing.assert_close(moved, want, rtol=1e-5, atol=1e-8)
    assert got.abs().max() <= eps + 1e-7 and (x + got).min() >= -1e-7 and (x + got).max() <= 1 + 1e-7


def test_truncation_keeps_8_bit_images_and_cuts_others():
    levels = torch.arange(256.0)[None, None, None] / 255
    torch.testing.assert_close(views.truncated(levels), levels)
    assert views.truncated(torch.tensor(0.9 / 255)).item() == 0


BAD = {
    "more chosen than views": ({"n_views": 4, "chosen": 5}, "chosen: expected 1 to 4"),
    "no view": ({"n_views": 0}, "n_views: expected at least 1"),
    "r": ({"r": 1.0}, "r: expected a share"),
    "strengths": ({"lam_high": 0.9, "lam_low": 0.1}, "swap them"),
    "mixing": ({"mixing": "guded"}, "did you mean 'guided'"),
    "loss": ({"loss": "pointwize"}, "did you mean 'pointwise'"),
    "answer": ({"answer": "TV"}, "unknown answer"),
    "guide": ({"guide": "rollout"}, "unknown guide"),
    "rate": ({"lr": 0.0}, "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_recipes(bad):
    change, text = BAD[bad]
    with pytest.raises(UserError, match=text) as error:
        replace(Recipe(), **change)
    assert "\n" not in str(error.value)


def test_bad_classes_images_and_keys(clip, x):
    defense = TestTime(clip, "TPT", RECIPES["TPT"])
    with pytest.raises(UserError, match="class names"):
        defense.classifier(())
    with pytest.raises(UserError, match="at least 2 classes"):
        defense.classifier(("cat",))
    with pytest.raises(UserError, match="32x32"):
        defense.classifier(NAMES)(x[..., :30, :30])
    with pytest.raises(UserError, match="a key for each"):
        defense.classifier(NAMES).keyed(KEYS[:1])(x)
    with pytest.raises(UserError, match="unknown test-time defense"):
        defenses.build_test_time("RTPT", clip)
