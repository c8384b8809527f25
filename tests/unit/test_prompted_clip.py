"""Prompted passes against open_clip's own blocks, one class and one image after another; and the classifier's contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from toy_prompts import NAMES, SPECS, images, prompted, reference_image, reference_text, single, toy_clip

from robustvlm_lite.attacks import cross_entropy, get_attack, pgd
from robustvlm_lite.clip import random_clip as make_random_clip
from robustvlm_lite.data import ImageSet
from robustvlm_lite.evaluate import evaluate
from robustvlm_lite.prompts import PromptedCLIP, PromptLearner, PromptSpec
from robustvlm_lite.runtime import generator
from robustvlm_lite.threat import ThreatModel


@pytest.fixture(scope="module")
def clip(register):
    return toy_clip(register)


@pytest.fixture(scope="module", params=SPECS)
def model(request, clip):
    return prompted(clip, SPECS[request.param])


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- what is computed


@torch.no_grad()
def test_without_prompts_it_is_open_clip(clip, random_clip):
    for base, x, tolerance in ((clip, images(), 1e-12), (random_clip, images(side=64).float(), 1e-6)):
        base = copy.deepcopy(base)  # the prompted model freezes its CLIP
        model = PromptedCLIP(base, PromptLearner(base, PromptSpec()), NAMES)
        text = base.model.encode_text(base.tokenizer([f"a photo of a {name}." for name in NAMES]))
        close(model.text_features(), F.normalize(text, dim=-1), tolerance)
        close(model.image_features(x), F.normalize(base.model.encode_image(base.normalize(x)), dim=-1), tolerance)
        close(model(x), base.classifier(NAMES, ("a photo of a {}.",))(x), 10 * tolerance)
        tails = model.text_tail(), model.image_tail(x)
        close(model.head_text(tails[0].o, tails[0].r), text, tolerance)
        close(model.head_image(tails[1].o, tails[1].r), base.model.encode_image(base.normalize(x)), tolerance)


@torch.no_grad()
def test_the_start_from_words_is_the_sentence(clip):
    model = PromptedCLIP(clip, PromptLearner(clip, PromptSpec(n_text=2)), NAMES)  # "of a" stays as it is
    close(model.text_features(), clip.encode_text([f"a photo of a {name}." for name in NAMES]), 1e-12)


@torch.no_grad()
def test_prompts_go_where_the_papers_put_them(model):
    x, prompts = images(), model.learner()
    close(model.text_features(), F.normalize(reference_text(model, prompts), dim=-1))
    close(model.image_features(x), F.normalize(reference_image(model, x, prompts), dim=-1))
    expected = F.normalize(reference_image(model, x, prompts), dim=-1) @ model.text_features().T
    close(model(x), model.clip.logit_scale * expected)


@torch.no_grad()
def test_image_prompts_enter_before_the_first_normalization(clip):
    model, x = prompted(clip, SPECS["AVP"]), images()
    right, wrong = (reference_image(model, x, model.learner(), late) for late in (False, True))
    assert (right - wrong).abs().max() > 1e-3, "else the place of insertion would not be tested"
    close(model.image_features(x), F.normalize(right, dim=-1))


@pytest.mark.parametrize("name", SPECS)
def test_every_prompt_moves_the_logits(clip, name):
    """A gradient of zero would mean a prompt that nothing reads."""
    model = prompted(clip, SPECS[name])
    model.logits(images())[:, 0].sum().backward()
    for key, p in model.learner.named_parameters():
        flat = p.grad.flatten(1) if key == "ctx" and p.ndim == 3 else p.grad.reshape(len(p), -1)
        if key == "ctx" and p.ndim == 3:
            flat = flat[:1]  # the context of class 0
        assert (flat.abs().amax(dim=1) > 0).all(), key
    assert all(p.grad is None for p in model.clip.parameters()), "CLIP is frozen"
    model.learner.zero_grad(set_to_none=True)


def test_gradients_of_prompts_are_those_of_the_reference(model):
    x, grads = images(), []
    for way in ("ours", "reference"):
        prompts = model.learner()
        if way == "ours":
            logits = model.logits(x, prompts=prompts)
        else:
            z, t = reference_image(model, x, prompts), reference_text(model, prompts)
            logits = model.clip.logit_scale * F.normalize(z, dim=-1) @ F.normalize(t, dim=-1).T
        loss = F.cross_entropy(logits, torch.tensor([0, 2, 1]))
        grads.append(torch.autograd.grad(loss, list(model.learner.parameters())))
    for ours, reference in zip(*grads, strict=True):
        close(ours, reference, 1e-8)


# --- a context an image


@pytest.mark.parametrize("name", ["APT", "APT, class-specific", "AdvVLP", "FAP", "TPT", "class in the middle", "AVP"])
def test_prompts_for_each_image_are_one_image_after_another(clip, name):
    model, x = prompted(clip, SPECS[name]), images(3)
    prompts = model.learner.expand(3)
    leaves = [t for t in (*prompts.text, *prompts.vision, prompts.pixel) if t is not None]
    assert all(t.is_leaf and t.requires_grad and len(t) == 3 for t in leaves)
    with torch.no_grad():
        g = torch.Generator().manual_seed(2)
        for t in leaves:
            t.add_(0.3 * torch.randn(t.shape, generator=g))
    logits = model.logits(x, prompts=prompts)
    ours = torch.autograd.grad(logits.logsumexp(1).sum(), leaves)
    for i in range(3):
        own = single(prompts, i)
        z, t = reference_image(model, x[i : i + 1], own), reference_text(model, own)
        alone = model.clip.logit_scale * F.normalize(z, dim=-1) @ F.normalize(t, dim=-1).T
        close(logits[i : i + 1], alone)
        expected = torch.autograd.grad(alone.logsumexp(1).sum(), leaves, retain_graph=True)
        for a, b in zip(ours, expected, strict=True):
            close(a[i], b[i], 1e-8)
            assert not b[[j for j in range(3) if j != i]].any(), "another image's prompts"


@torch.no_grad()
def test_views_are_compared_with_the_text_of_their_image(clip):
    model = prompted(clip, SPECS["TPT"])
    text = F.normalize(torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    features = model.image_features(images(6)).view(2, 3, 16)
    scale = model.clip.logit_scale
    for i in range(2):
        close(model.compare(features, text)[i], scale * features[i] @ text[i].T)
        close(model.compare(features, text[0])[i], scale * features[i] @ text[0].T)
        close(model.compare(features[:, 1], text)[i], scale * text[i] @ features[i, 1])


@torch.no_grad()
def test_shared_leading_tokens_are_exact_and_counted(clip):
    """ "a photo of a wild dog." and "a photo of a wild cat." share start, context and "wild"; a single class all but its end."""
    for names, shared in ((("wild dog", "wild cat"), 6), (("cat", "dog"), 5), (("cat",), 7), (("cat", "cat"), 7)):
        model = prompted(clip, SPECS["TPT"], names)
        assert model.words.shared == shared
        close(model.text_features(), F.normalize(reference_text(model, model.learner()), dim=-1))
    assert prompted(clip, SPECS["APT, class-specific"]).words.shared == 1
    assert prompted(clip, SPECS["class in front"]).words.shared == 1


# --- the classifier


def test_text_is_encoded_again_only_after_the_prompts_changed(clip, monkeypatch):
    model, x = prompted(clip, SPECS["FAP"]), images(2)
    encode, calls = PromptedCLIP.text_features, []
    monkeypatch.setattr(PromptedCLIP, "text_features", lambda self, *a: calls.append(1) or encode(self, *a))
    model(x), model(x)
    assert len(calls) == 1

    def trained(optimizer, **options):
        model.logits(x)[:, 0].sum().backward()
        optimizer([p for p in model.learner.parameters()], lr=0.1, **options).step()

    state = model.learner.state()
    changes = {
        "SGD": lambda: trained(torch.optim.SGD, momentum=0.9),
        "AdamW": lambda: trained(torch.optim.AdamW, foreach=False),
        "AdamW, all tensors at once": lambda: trained(torch.optim.AdamW, foreach=True),
        "reset": model.learner.reset,
        "load": lambda: model.learner.load(state),
    }
    for name, change in changes.items():
        before = model(x)
        change()
        calls.clear()
        after = model(x)
        assert len(calls) == 1 and not torch.equal(before, after), name
        with torch.no_grad():
            close(after, model.logits(x, encode(model)))


def test_a_classifier_keeps_prompts_out_of_the_graph(clip):
    model, x = prompted(clip, SPECS["AdvVLP"]), images(2).requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())
    assert not model(images(2)).requires_grad


@pytest.mark.parametrize("name", ["APT", "AVP", "FAP"])
def test_an_attack_stays_in_its_budget_and_leaves_the_prompts_alone(clip, name):
    model, x, y = prompted(clip, SPECS[name]), images(20), torch.arange(20) % 4
    prompts, text = model.learner(), model.text_features()
    training = cross_entropy(lambda z: model.logits(z, text.detach(), prompts.detach()), y)
    for objective in (cross_entropy(model, y), training):
        x_adv = pgd(objective, x, ThreatModel(4.0), n_steps=3, generators=generator("start"))
        assert (x_adv - x).abs().max() <= 4 / 255 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        with torch.no_grad():
            assert (objective(x_adv) >= objective(x)).double().mean() >= 0.95
        assert all(p.grad is None for p in model.parameters())


def test_the_fast_twin_and_other_classes_follow_the_prompts(random_clip):
    base = copy.deepcopy(random_clip)
    model = PromptedCLIP(base, PromptLearner(base, PromptSpec(n_text=4, n_vision=2)), NAMES)
    fast, other, x = model.fast(), model.for_classes(("fish", "bird")), images(2, side=64).float()
    assert fast.precision == torch.bfloat16 and model.precision is None
    gradients = []
    for classify in (model, fast):
        z = x.clone().requires_grad_()
        logits = classify(z)
        assert logits.dtype == torch.float32
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), z)[0].flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.9
    assert other(x).shape == (2, 2)
    with torch.no_grad():
        before = [m(x) for m in (model, fast, other)]
        model.learner.ctx.add_(torch.randn(4, 128, generator=torch.Generator().manual_seed(3)))
        for m, old in zip((model, fast, other), before, strict=True):
            assert (m(x) - old).abs().max() > 1e-3
            assert torch.allclose(m(x), m.logits(x, precision=m.precision), atol=1e-5)


def test_evaluate_and_named_attacks_take_it(random_clip):
    base = copy.deepcopy(random_clip)
    model = PromptedCLIP(base, PromptLearner(base, PromptSpec(n_text=2, n_vision=2)), NAMES)
    pixels = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(pixels / 255).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4  # three images that are wrong from the start
    data = ImageSet("toy", pixels, labels, NAMES, ("a {}",))
    attack = (get_attack("pgd-2"), ThreatModel(1.0))
    clean, robust, _ = evaluate(model, data, [attack], method="toy", surface=model.fast(), progress=False)
    assert clean.value == 0.75 and robust.image_forwards == 9 * 3 and robust.image_backwards == 9 * 2
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_a_convolutional_tower_takes_text_prompts_and_a_frame(register):
    clip = toy_clip(register, "toy-prompts-rn", image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    x = images(2, side=64)
    for spec in (PromptSpec(n_text=3, depth_text=2), PromptSpec(pixel_pad=5)):
        model = prompted(clip, spec)
        prompts = model.learner()
        pixels = (x - clip.mean) / clip.std + (0 if prompts.pixel is None else prompts.pixel)
        expected = F.normalize(clip.visual(pixels), dim=-1) @ F.normalize(reference_text(model, prompts), dim=-1).T
        close(model(x), clip.logit_scale * expected)


@torch.no_grad()
def test_openai_shapes_with_random_weights(vit_b32):
    model = PromptedCLIP(vit_b32, PromptLearner(vit_b32, PromptSpec(2, 9, 2, 9)), ("cat", "dog"))
    plain = PromptedCLIP(vit_b32, PromptLearner(vit_b32, PromptSpec()), ("cat", "dog"))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    close(plain(x), vit_b32.classifier(("cat", "dog"), ("a photo of a {}.",))(x), 1e-5)
    close(model(x), model.clip.logit_scale * F.normalize(reference_image(model, x, model.learner()), dim=-1)
          @ F.normalize(reference_text(model, model.learner()), dim=-1).T, 1e-4)  # fmt: skip


@pytest.fixture(scope="module")
def vit_b32():
    return make_random_clip("ViT-B-32-quickgelu")
