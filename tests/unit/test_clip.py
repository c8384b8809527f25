"""Loading is exact or refused; features and logits against open_clip with torchvision's normalization."""

import gzip
import json
import logging
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import normalize

from robustvlm_lite import clip as clip_module
from robustvlm_lite import data
from robustvlm_lite.attacks import cross_entropy, pgd
from robustvlm_lite.clip import ZeroShotCLIP, load_clip, random_clip
from robustvlm_lite.runtime import UserError, asset, sha256
from robustvlm_lite.threat import ThreatModel, check_images

NAMES, TEMPLATES = ("cat", "wild dog", "red star"), ("a photo of a {}.", "the {}")


def refuse(match, name, **options):
    """load_clip raises one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        load_clip(name, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def images(random_clip):
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def toy(register, tmp_path_factory):
    """(name, weights file, open_clip model) of a tiny architecture."""
    import open_clip

    name = register("toy-clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False).eval()
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return name, path, model


# --- what is computed


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


def test_a_convolutional_backbone_classifies_but_has_no_tokens(register):
    name = register("toy-resnet", image_size=64, layers=[1, 1, 1, 1], width=16, patch_size=None)
    model = clip_module._empty_model(clip_module._open_clip(), name).eval()
    resnet = ZeroShotCLIP(model, random_clip().tokenizer, name, "")
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(resnet.image_features(x), F.normalize(model.encode_image(resnet.normalize(x)), dim=-1))
    with pytest.raises(UserError, match="expected a vision transformer for image tokens, got toy-resnet"):
        resnet.tokens(x)


# --- what is loaded


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "openai", "checkpoint"])
def test_local_weights_give_the_same_model(toy, tmp_path, form, caplog):
    name, path, model = toy
    if form == "openai":  # half precision and three numbers among the tensors
        path = tmp_path / "weights.pt"
        numbers = {k: torch.tensor(v) for k, v in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 9))}
        torch.save({k: v.half() for k, v in model.state_dict().items()} | numbers, path)
    elif form == "checkpoint":  # as open_clip's training writes it
        path = tmp_path / "epoch_1.pt"
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    with caplog.at_level(logging.WARNING):
        loaded = load_clip(name, pretrained=str(path), device="cpu")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tolerance = 1e-2 if form == "openai" else 1e-6
    for ours, theirs in (
        (loaded.visual(x), model.visual(x)),
        (loaded.model.encode_text(loaded.tokenizer(["a cat"])), model.encode_text(loaded.tokenizer(["a cat"]))),
    ):
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert loaded.weights_sha256 == sha256(path) and not loaded.training and loaded.name == name
    assert not caplog.records, "open_clip says that the model was initialized randomly"


def test_weights_of_other_shapes_are_refused(toy, register):
    path = toy[1]
    for other, what in (("context_length", 24), ("image_size", 48)):
        other_name = register(f"toy-{other}", **{other: what})
        shapes = r"positional_embedding is \(\d+, \d+\) instead of \(\d+, \d+\)"
        refuse(f"expected weights shaped like '{other_name}'.+{shapes}", other_name, pretrained=str(path))


def test_missing_and_unknown_tensors_are_refused(toy, tmp_path):
    name, path, _ = toy
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "ln_final.bias"}, tmp_path / "few.safetensors")
    save_file(state | {"visual.extra": torch.zeros(1)}, tmp_path / "many.safetensors")
    refuse("ln_final.bias is missing", name, pretrained=str(tmp_path / "few.safetensors"))
    refuse("unknown tensor 'visual.extra'", name, pretrained=str(tmp_path / "many.safetensors"))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_broken_and_hostile_files_are_refused_and_run_nothing(toy, tmp_path):
    name, path, model = toy
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    whole = {"safetensors": path.read_bytes(), "pt": (tmp_path / "whole.pt").read_bytes()}
    broken = {f"{kind} cut at {n}": (kind, raw[:n]) for kind, raw in whole.items() for n in (0, 5, 1000, len(raw) // 2)}
    broken["another format"] = ("pt", gzip.compress(b"hello"))
    broken["a number"] = ("pt", pickle.dumps(3, protocol=2))
    fuse = tmp_path / "fuse"
    broken["code"] = ("pt", pickle.dumps({"state_dict": Bomb(fuse)}, protocol=2))
    for what, (kind, raw) in broken.items():
        file = tmp_path / f"weights.{kind}"
        file.write_bytes(raw)
        refuse(f"expected whole weights in .+weights.{kind}, got a file that does not load", name, pretrained=str(file))
        assert not fuse.exists(), what
    torch.save({"state_dict": Bomb(fuse)}, tmp_path / "bomb.pt")
    refuse("does not load", name, pretrained=str(tmp_path / "bomb.pt"))
    assert not fuse.exists()


@pytest.mark.parametrize(
    "name, pretrained, match",
    [
        ("nana", "", "unknown backbone 'nana'; did you mean 'nano'"),
        ("ViT-B-32-quickgelu", "", "no bundled weights; pass pretrained, a tag such as 'openai' or a local file"),
        ("ViT-B-32-quickgelu", "/nowhere/weights.pt", "at /nowhere/weights.pt, found none; pass a tag"),
        ("nano", "/nowhere/weights.pt", "at /nowhere/weights.pt, found none; pass a local file"),
        ("ViT-B-32", "openai", "need QuickGELU, 'ViT-B-32' has the other activation; use 'ViT-B-32-quickgelu'"),
        ("ViT-L-14", "laion2b_s32b_b82k", "need another mean and std"),
        ("ViT-B-16-SigLIP", "webli", "expected a CLIP built like OpenAI's, got 'ViT-B-16-SigLIP'"),
        ("convnext_base_w", "laion2b_s13b_b82k", "expected a CLIP built like OpenAI's"),
        ("ViT-B-32-quickgelu", "openai", "could not be had .+ without network: fetch them elsewhere"),
    ],
)
def test_what_cannot_be_loaded_says_so(name, pretrained, match, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refuse(match, name, pretrained=pretrained)


def test_bundled_weights_are_checked_by_their_hash(random_clip, tmp_path, monkeypatch):
    shutil.copy(asset("clip", "nano.json"), tmp_path)
    shutil.copy(asset("clip", "bpe.txt.gz"), tmp_path)
    weights = tmp_path / "nano.safetensors"
    save_file({k: v.half().contiguous() for k, v in random_clip.model.state_dict().items()}, weights)
    (tmp_path / "nano.card.json").write_text(json.dumps({"weights_sha256": sha256(weights)}))
    monkeypatch.setattr(clip_module, "asset", lambda *parts: tmp_path.joinpath(*parts[1:]))
    assert load_clip("nano").visual.proj.dtype == torch.float32
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    refuse("expected SHA-256 .+ for nano.safetensors, got .+; check out the file again", "nano")


@torch.no_grad()
@pytest.mark.skipif(not asset("clip", "nano.safetensors").exists(), reason="the nano CLIP is not trained yet")
def test_the_nano_clip_knows_its_photographs():
    assert asset("clip", "nano.safetensors").stat().st_size <= 5e6
    nano, photos = load_clip("nano"), data.load("photos/caltech", n=100)
    predicted = nano.classifier(photos.class_names, photos.templates)(photos.pixels()).argmax(1)
    assert (predicted == photos.labels).float().mean() > 0.6
