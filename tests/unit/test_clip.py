"""Features and logits against open_clip with torchvision's normalization."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize

from robustvlm_lite import clip as clip_module
from robustvlm_lite import data
from robustvlm_lite.attacks import cross_entropy, pgd
from robustvlm_lite.clip import ZeroShotCLIP, load_clip
from robustvlm_lite.clip import model as clip_model
from robustvlm_lite.runtime import UserError, asset
from robustvlm_lite.threat import ThreatModel, check_images

NAMES, TEMPLATES = ("cat", "wild dog", "red star"), ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def images(random_clip):
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_features_and_logits_are_open_clips_on_normalized_images(random_clip, images):
    import open_clip

    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    model, tokenizer = random_clip.model, random_clip.tokenizer
    image = F.normalize(model.encode_image(normalize(images, mean, std)), dim=-1)
    each = [F.normalize(model.encode_text(tokenizer([t.format(c) for c in NAMES])), dim=-1) for t in TEMPLATES]
    text = F.normalize((each[0] + each[1]) / 2, dim=-1)
    classify = random_clip.classifier(NAMES, TEMPLATES)
    assert torch.allclose(random_clip.image_features(images), image, atol=1e-5)
    assert torch.allclose(random_clip.text_features(NAMES, TEMPLATES), text, atol=1e-5)
    assert torch.allclose(classify(images), model.logit_scale.exp() * image @ text.T, atol=1e-4)
    assert random_clip.tokens(images).shape == (3, 65, 128) and random_clip.grid == 8


def test_a_classifier_has_gradients_and_a_fast_twin(random_clip, images):
    slow = random_clip.classifier(NAMES, TEMPLATES)
    fast = slow.fast()
    assert fast.precision == torch.bfloat16 and slow.precision is None
    assert fast.text_features is slow.text_features
    gradients = []
    for classify in (slow, fast):
        x = images.clone().requires_grad_()
        logits = classify(x)
        assert logits.dtype == torch.float32
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), x)[0].flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.9
    assert sum(p.numel() for p in slow.parameters()) > 800_000
    assert not random_clip.logit_scale.requires_grad


@pytest.mark.parametrize("in_hardware", [True, False])
def test_the_fast_twin_computes_in_bfloat16_only_where_hardware_multiplies_it(random_clip, images, monkeypatch, in_hardware):
    monkeypatch.setattr(clip_model, "multiplies_bfloat16", lambda device_type: in_hardware)
    classify = random_clip.classifier(NAMES, TEMPLATES)
    seen = []
    handle = random_clip.visual.transformer.resblocks[0].attn.out_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    block = random_clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    logits = classify.fast()(images)
    handle.remove()
    block.remove()
    assert seen and set(seen) == {torch.bfloat16 if in_hardware else torch.float32}
    assert torch.equal(logits, classify(images)) == (not in_hardware)


def test_text_is_encoded_once_for_each_key(random_clip, monkeypatch):
    calls = []
    encode = ZeroShotCLIP.encode_text
    monkeypatch.setattr(ZeroShotCLIP, "encode_text", lambda self, texts: calls.append(texts) or encode(self, texts))
    first = random_clip.text_features(("bird", "fish"), ("a {}",))
    assert random_clip.text_features(["bird", "fish"], ["a {}"]) is first and len(calls) == 1
    assert not first.requires_grad
    for names, templates in ((("fish", "bird"), ("a {}",)), (("bird", "fish"), ("the {}",)), (("bird",), ("a {}",))):
        assert random_clip.text_features(names, templates) is not first
    assert len(calls) == 4
    assert torch.equal(random_clip.text_features(("fish", "bird"), ("a {}",)), first.flip(0))


def test_a_text_tower_that_was_written_to_is_asked_again(random_clip):
    clip = copy.deepcopy(random_clip)
    before = clip.text_features(NAMES, TEMPLATES)
    with torch.no_grad():
        clip.visual.class_embedding.add_(1.0)  # the image tower has no say
    assert clip.text_features(NAMES, TEMPLATES) is before
    with torch.no_grad():
        clip.model.text_projection.add_(torch.randn(clip.model.text_projection.shape, generator=torch.Generator().manual_seed(0)))
    tuned = clip.text_features(NAMES, TEMPLATES)
    fresh = F.normalize(torch.stack([clip.encode_text([t.format(c) for c in NAMES]) for t in TEMPLATES]).mean(0), dim=1)
    assert torch.allclose(tuned, fresh, atol=1e-5) and not torch.allclose(tuned, before, atol=1e-2)
    clip.model.load_state_dict(random_clip.model.state_dict())
    assert torch.allclose(clip.text_features(NAMES, TEMPLATES), before, atol=1e-5)


def test_pixels_of_an_8_bit_range_are_refused(random_clip, images):
    classify = random_clip.classifier(NAMES, TEMPLATES)
    with torch.no_grad(), pytest.raises(UserError, match=r"^expected pixels in \[0, 1\], got values up to 255; [^\n]+$"):
        classify(torch.full_like(images, 255.0))
    with torch.no_grad():
        assert classify(images * 1.2 - 0.1).shape == (len(images), len(NAMES)), "a front end may leave the range"


@pytest.mark.parametrize("names, templates", [((), TEMPLATES), (NAMES, ()), (NAMES, ("a photo",))])
def test_an_empty_text_side_is_refused(random_clip, names, templates):
    with pytest.raises(UserError, match=r"^expected class names and templates with \{\}[^\n]+$"):
        random_clip.text_features(names, templates)


def test_a_text_longer_than_the_context_is_refused_and_one_that_fits_is_not(random_clip):
    room = random_clip.model.context_length - 2
    ids = random_clip.tokenizer(["dog " * room])
    assert ids[0, -1] == random_clip.model.vocab_size - 1 and (ids[0] != 0).all()
    random_clip.encode_text(["dog " * room])
    with pytest.raises(UserError, match=f"at most {room} tokens, got {room + 1}"):
        random_clip.encode_text(["cat", "dog " * (room + 1)])


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 96), (1, 3, 224, 224)])
def test_images_of_another_size_are_refused_not_resized(random_clip, shape):
    with pytest.raises(UserError, match=f"64x64 pixels for nano, got {shape[2]}x{shape[3]}; [^\n]+size=64"):
        random_clip.image_features(torch.rand(shape))


def test_what_is_not_an_image_in_0_1_is_caught_before_the_model(random_clip, images):
    """By `check_images`, which every attack calls; the model itself stays free of checks."""
    classify, y = random_clip.classifier(NAMES, TEMPLATES), torch.zeros(3, dtype=torch.int64)
    wrong = {"255": images * 255, "uint8": (images * 255).byte(), "gray": images[:, :1], "NaN": images * torch.nan}
    for name, x in (wrong | {"normalized": random_clip.normalize(images)}).items():
        with pytest.raises(UserError, match="expected"):
            check_images(x)
        with pytest.raises(UserError, match="expected"):
            pgd(cross_entropy(classify, y), x, ThreatModel(1), start="zero", n_steps=1)
            pytest.fail(name)


def test_random_clips_follow_their_seed_and_leave_the_global_stream_alone(random_clip):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    again, other = clip_module.random_clip("nano", seed=0), clip_module.random_clip("nano", seed=1)
    assert torch.equal(torch.rand(2), expected)
    own = random_clip.model.visual.proj
    assert torch.equal(again.visual.proj, own) and not torch.equal(other.visual.proj, own)
    assert again.weights_sha256 != other.weights_sha256


@torch.no_grad()
@pytest.mark.skipif(not asset("clip", "nano.safetensors").exists(), reason="the nano CLIP is not trained yet")
def test_the_nano_clip_knows_its_photographs():
    assert asset("clip", "nano.safetensors").stat().st_size <= 5e6
    nano, photos = load_clip("nano"), data.load("photos/caltech", n=100)
    predicted = nano.classifier(photos.class_names, photos.templates)(photos.pixels()).argmax(1)
    assert (predicted == photos.labels).float().mean() > 0.6
