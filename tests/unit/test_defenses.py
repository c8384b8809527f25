"""Each defense's loss and its gradient against plain PyTorch on fixed tensors, with open_clip's own forward pass."""

import copy
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from robustvlm_lite import attention, defenses
from robustvlm_lite.attacks import zero_gradient_share
from robustvlm_lite.data import ImageSet
from robustvlm_lite.defenses import METHODS, PRESETS, build
from robustvlm_lite.defenses.finetuning import in_batch_contrastive
from robustvlm_lite.defenses.training import Batch, Task
from robustvlm_lite.runtime import UserError

NAMES, TEMPLATES = ("cat", "dog", "red star", "ship"), ("a photo of a {}.", "the {}")
# name -> terms of the loss in their order
TERMS = {
    "FT-clean": ["contrastive"], "FT-adv": ["contrastive"], "TeCoA": ["ce"], "PMG-AFT": ["ce", "kl_frozen", "kl_clean"],
    "FARE": ["embedding"], "CE + L_AR": ["ce", "ar"], "CE + L_AMC": ["ce", "amc"],
}  # fmt: skip


def move(clip, size=0.05, seed=3):
    """Weights of the image tower as training might leave them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in clip.visual.parameters():
            p.add_(size * p.std().nan_to_num(1).clamp_min(0.1) * torch.randn(p.shape, generator=g))


@pytest.fixture(scope="module")
def clip(random_clip):
    """theta_0 at OpenAI's logit scale; its parameters ask for gradients, so that a loss which reaches them shows."""
    clip = copy.deepcopy(random_clip)
    move(clip, 0.3)
    clip.model.logit_scale.data.fill_(math.log(100))
    return clip.requires_grad_(True)


@pytest.fixture(scope="module")
def photos():
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, :, 20:40, 20:40] = torch.arange(6, dtype=torch.uint8).view(-1, 1, 1, 1) * 40
    return ImageSet("toy", images, torch.tensor([0, 1, 2, 3, 1, 0]), NAMES, TEMPLATES)


def prepare(name, clip, photos, moved=True) -> tuple:
    """An untrained defense in float32 (theta moved away from theta_0) and a batch of four of the six photos."""
    defense = build(name, clip)
    if moved:
        move(defense.clip)
    task = defense.task(photos)
    task.frozen = defense._frozen(task, clip.device)
    index = torch.tensor([4, 0, 2, 1])
    x = photos.pixels(index)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return defense, Batch(task, index, x, photos.labels[index], (x + 24 / 255 * noise).clamp(0, 1))


def tokens_of(clip, x):
    """All tokens, read by a hook from open_clip's forward pass."""
    seen = []
    handle = clip.visual.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    clip.visual((x - clip.mean) / clip.std)
    handle.remove()
    return clip.visual.ln_post(seen[0]) @ clip.visual.proj


def logits_of(clip, x, text):
    z = tokens_of(clip, x)[:, 0]
    return clip.model.logit_scale.exp().detach() * (z / z.norm(dim=1, keepdim=True)) @ text.T


def kl(p, q):
    """KL(p || q) of logits, averaged over images."""
    p, q = p.softmax(1), q.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def map_of(tokens, text, axis):
    scale = tokens.square().sum(axis, keepdim=True).sqrt() if axis else 1
    m = ((tokens / scale)[:, 1:] * text[:, None]).sum(2)
    return (m - m.amin(1, keepdim=True)) / (m.amax(1, keepdim=True) - m.amin(1, keepdim=True))


def gap(a, b, metric="l2"):
    """Mean distance of maps [B, 64] upsampled to 224 x 224."""
    a, b = (F.interpolate(m.view(-1, 1, 8, 8), (224, 224), mode="bilinear").flatten(1) for m in (a, b))
    each = {"l2": (a - b).norm(dim=1), "l1": (a - b).abs().mean(1), "cosine": 1 - F.cosine_similarity(a, b, dim=1)}
    return each[metric].mean()


def contrastive(logits, y):
    b, total = len(y), 0.0
    for i in range(b):
        row = torch.stack([logits[i, y[j]] for j in range(b)])
        column = torch.stack([logits[j, y[i]] for j in range(b)])
        total = total + (row.logsumexp(0) - row[i] + column.logsumexp(0) - column[i]) / 2
    return total / b


def reference(name, defense, batch) -> list[torch.Tensor]:
    """The terms of TERMS, from the formulas of the specification."""
    own, frozen, x, x_adv, y = defense.clip, defense.original[0], batch.x, batch.x_adv, batch.y
    each = [F.normalize(own.model.encode_text(own.tokenizer([t.format(c) for c in NAMES])), dim=1) for t in TEMPLATES]
    text = F.normalize(sum(each), dim=1).detach()
    if name == "FT-clean":
        return [contrastive(logits_of(own, x, text), y)]
    if name == "FT-adv":
        return [contrastive(logits_of(own, x_adv, text), y)]
    if name == "FARE":
        return [(tokens_of(own, x_adv)[:, 0] - tokens_of(frozen, x)[:, 0].detach()).square().sum(1).mean()]
    adv = logits_of(own, x_adv, text)
    ce = -adv.log_softmax(1)[range(len(y)), y].mean()
    if name == "TeCoA":
        return [ce]
    if name == "PMG-AFT":  # the released code lets the clean branch learn, too
        return [ce, kl(logits_of(frozen, x_adv, text).detach(), adv), kl(logits_of(own, x, text), adv)]
    c = METHODS[name][1]
    axis = {"feature_axis": 2, "token_axis": 1, "none": 0}[c.token_norm]

    def maps(clip, images):
        tokens = tokens_of(clip, images)
        if name != "Comp-TGA":
            return map_of(tokens, text[y], axis)
        ids = own.tokenizer([f"this is not a photo of a {c}." for c in NAMES])
        text_not = F.normalize(own.model.encode_text(ids), dim=1).detach()
        return map_of(tokens, text[y], axis) * (1 - map_of(tokens, text_not[y], axis))

    target = maps(frozen, x).detach()
    ar = c.alpha * c.gain * gap(maps(own, x_adv), target, c.metric)
    amc = c.beta * c.gain * gap(maps(own, x), target, c.metric)
    return [ce, *([ar] if c.alpha else []), *([amc] if c.beta else [])]


@pytest.mark.parametrize("name", [n for n in METHODS if n != "Vision-guided"])
def test_losses_and_gradients_equal_the_formulas(name, clip, photos):
    defense, batch = prepare(name, clip, photos)
    terms, expected = defense.losses(batch), reference(name, defense, batch)
    assert list(terms) == TERMS.get(name, ["ce", "ar", "amc"])
    for key, value in zip(terms, expected, strict=True):
        assert torch.allclose(terms[key], value, rtol=1e-3, atol=1e-6), (key, float(terms[key]), float(value))
    visual = defense.clip.visual
    params = [visual.proj, visual.conv1.weight, visual.transformer.resblocks[1].attn.in_proj_weight]
    for key, value in zip(terms, expected, strict=True):
        ours, theirs = (torch.autograd.grad(v, params, retain_graph=True) for v in (terms[key], value))
        for a, b in zip(ours, theirs, strict=True):
            assert b.abs().max() > 0 and (a - b).abs().max() <= 5e-3 * b.abs().max(), key


def test_vision_guided_terms_use_maps_that_can_be_trained(clip, photos):
    defense, batch = prepare("Vision-guided", clip, photos)
    cams = [attention.grad_cam(defense.clip, v, batch.task.text) for v in (batch.x_adv, batch.x)]
    target = attention.grad_cam(clip, batch.x, batch.task.text)
    terms, config = defense.losses(batch), defense.config
    assert terms["ar"].item() == pytest.approx(config.alpha * gap(cams[0], target).item(), rel=1e-3)
    assert terms["amc"].item() == pytest.approx(config.beta * gap(cams[1], target).item(), rel=1e-3)
    (terms["ar"] + terms["amc"]).backward()
    assert defense.clip.visual.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip.parameters())


def test_kl_has_a_direction(clip, photos):
    defense, batch = prepare("PMG-AFT", clip, photos)
    adv, frozen = (logits_of(c, batch.x_adv, batch.task.text) for c in (defense.clip, clip))
    assert abs(kl(frozen, adv) - kl(adv, frozen)) > 0.01 * kl(frozen, adv), "else the test of losses proves nothing"


def test_in_batch_contrastive_cannot_reach_zero_with_two_images_of_a_class():
    confident = 100 * torch.eye(3)
    assert in_batch_contrastive(confident, torch.tensor([0, 1, 2])) < 1e-6
    shared = in_batch_contrastive(confident[[0, 1, 0]], torch.tensor([0, 1, 0]))
    assert shared.item() == pytest.approx(2 / 3 * torch.tensor(2.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["TGA-ZSR", "TGA-ZSR (paper)", "Comp-TGA", "CE + L_AMC"])
def test_amc_is_zero_with_a_finite_gradient_at_theta_0(name, clip, photos):
    defense, batch = prepare(name, clip, photos, moved=False)
    amc = defense.losses(batch)["amc"]
    amc.backward()
    grads = [p.grad for p in defense.clip.visual.parameters() if p.grad is not None]
    assert amc.item() == pytest.approx(0, abs=1e-4)
    assert grads and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("term", ["ce", "ar", "amc"])
def test_each_term_reaches_theta_and_nothing_else(term, clip, photos):
    defense, batch = prepare("TGA-ZSR", clip, photos)
    batch.x_adv.requires_grad_()
    defense.losses(batch)[term].backward()
    visual = {id(p) for p in defense.clip.visual.parameters()}
    for name, p in defense.clip.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) or id(p) not in visual or "in_proj_bias" in name, name
        assert p.grad is None or id(p) in visual, name
    assert all(p.grad is None for p in clip.parameters())
    assert not batch.task.text.requires_grad and not batch.task.frozen["map"].requires_grad


@pytest.mark.parametrize("name", ["TGA-ZSR", "TGA-ZSR (released)", "Comp-TGA", "Vision-guided", "FARE"])
def test_what_is_kept_of_the_frozen_model_is_what_it_says_now(name, clip, photos):
    defense, batch = prepare(name, clip, photos)
    fresh = defense.frozen(Task(photos, batch.task.text), batch.x, batch.y)
    for key, kept in batch.task.frozen.items():
        assert len(kept) == len(photos) and torch.allclose(kept[batch.index], fresh[key], atol=1e-4), key


@pytest.mark.parametrize("margin, released", [(1, False), (40, True)])
def test_the_fp16_quirk_leaves_confident_images_unattacked(margin, released, clip, photos):
    """Two opposite prompts, so placed that the first wins by `margin` logits."""
    for name in ("TGA-ZSR", "TGA-ZSR (released)"):
        defense, batch = prepare(name, clip, photos)
        with torch.no_grad():
            feature = defense.clip.image_features(batch.x[:1])[0]
        side = F.normalize(feature.roll(1) - (feature.roll(1) @ feature) * feature, dim=0)
        cosine = margin / 2 / defense.clip.logit_scale.item()
        own = cosine * feature + (1 - cosine**2) ** 0.5 * side  # a slope exists only across the feature, not along it
        batch.task.text, batch.y = torch.stack([own, -own]), torch.tensor([0])
        try:
            share = zero_gradient_share(defense.inner(batch), batch.x[:1]).item()
        except RuntimeError as error:
            pytest.skip(f"no float16 autocast on this processor: {error}")
        assert share == 1 if released and name == "TGA-ZSR (released)" else share < 0.2, (name, share)


# --- the table of methods


def test_ablations_change_one_thing_each():
    base = PRESETS["strict"]
    for name, (_, config) in METHODS.items():
        if name.startswith(("CE +", "TGA-ZSR (l1", "TGA-ZSR (cos", "TGA-ZSR (paper")):
            changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(base, f.name)} - {"gain"}
            assert len(changed) == 1, name
    assert METHODS["TGA-ZSR"][1] == base and (base.alpha, base.beta) == (0.08, 0.05)


def test_weights_follow_in_proportion(clip):
    built = {name: build(name, clip, alpha=0.16, beta=0.005).config for name in ("TGA-ZSR", "Comp-TGA", "CE + L_AR")}
    assert built["TGA-ZSR"].alpha == pytest.approx(0.16) and built["TGA-ZSR"].beta == pytest.approx(0.005)
    assert built["Comp-TGA"].alpha == pytest.approx(0.2) and built["CE + L_AR"].beta == 0


def test_unknown_names_are_refused(clip):
    for call in (build, defenses.load_defense):
        with pytest.raises(UserError, match="unknown defense 'TGAZSR'; did you mean 'TGA-ZSR'"):
            call("TGAZSR", clip)
