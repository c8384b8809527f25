"""Loading is exact or refused: by name, tag and file, in every form in which publishers store weights."""

import gzip
import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustvlm_lite import clip as clip_room
from robustvlm_lite import runtime
from robustvlm_lite.clip import load_clip, registry
from robustvlm_lite.clip.registry import Weights
from robustvlm_lite.runtime import UserError, asset, sha256


def refuse(match, name, **options):
    """load_clip raises one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        load_clip(name, **options)
    assert "\n" not in str(error.value)


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


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """Neither a hub cache nor a folder of weights; returns the folder where weights are put by hand."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ROBUSTVLM_WEIGHTS", str(tmp_path / "by_hand"))
    (tmp_path / "by_hand").mkdir()
    return tmp_path / "by_hand"


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
        ("small-rm", "", "unknown backbone 'small-rm'; did you mean 'small-rn'"),
        ("fare2-vit-l14", "", "unknown backbone 'fare2-vit-l14'; did you mean 'fare2-vit-l-14'"),
        ("ViT-B-32-quickgelu", "laion400m_e32", "could not be had .+ without network: fetch them elsewhere and pass"),
        ("ViT-B-32-quickgelu", "openai", "'openai-vit-b-32' could not be had .+ network: fetch open_clip_model"),
        ("fare2-vit-l-14", "", "could not be had .+ open_clip_pytorch_model.bin of chs20/fare2-clip .+ put it"),
        ("fare2-vit-l-14", "/nowhere/fare.pt", "at /nowhere/fare.pt, found none"),
        ("tecoa1-vit-b-32", "", "expected the weights 'tecoa1-vit-b-32' on this machine, found none; fetch https://"),
    ],
)
def test_what_cannot_be_loaded_says_so(name, pretrained, match, empty_machine):
    refuse(match, name, pretrained=pretrained)


def test_bundled_weights_are_checked_by_their_hash(random_clip, tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "clip"
    folder.mkdir(parents=True)
    for name in ("nano.json", "bpe.txt.gz", "models.yml"):
        shutil.copy(asset("clip", name), folder)
    weights = folder / "nano.safetensors"
    save_file({k: v.half().contiguous() for k, v in random_clip.model.state_dict().items()}, weights)
    (folder / "nano.card.json").write_text(json.dumps({"weights_sha256": sha256(weights)}))
    monkeypatch.setattr(runtime, "PACKAGE", tmp_path)
    assert load_clip("nano").visual.proj.dtype == torch.float32
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    refuse("expected SHA-256 .+ for nano.safetensors, got .+; check out the file again", "nano")
    weights.unlink()
    refuse("expected the weights 'nano' on this machine, found none; check out .+ again", "nano")


# --- published weights, as small files of the same forms


@pytest.fixture
def shelf(toy, register, monkeypatch, empty_machine):
    """(folder, base model, tuned model): a registry of a toy base and a robust model tuned from it, as publishers do."""
    import open_clip

    name, path, base = toy
    register("toy-clip-quickgelu", quick_gelu=True)
    tuned = open_clip.create_model(name, load_weights=False).eval()
    tuned.load_state_dict(base.state_dict())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuned.visual.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    facts = {"activation": "GELU", "image_size": 32, "context_length": 16, "source": "a test", "licence": "none"}
    entries = [
        Weights("toy-base", name, hub="someone/toy/open_clip_model.safetensors", tag="toy", **facts),
        Weights("toy-robust", name, hub="someone/robust/open_clip_pytorch_model.bin", base="toy-base", **facts),
        Weights("toy-tower", name, obtain="https://example.org/tower.pt", base="toy-base", **facts),
    ]
    monkeypatch.setattr(registry, "published", lambda: {w.name: w for w in entries})
    shutil.copy(path, empty_machine / "toy-base.safetensors")
    return empty_machine, base, tuned


def change(monkeypatch, name, **facts):
    """Another fact in one entry of the registry."""
    entries = registry.published()
    monkeypatch.setattr(registry, "published", lambda: entries | {name: replace(entries[name], **facts)})


def cache(path, hub):
    """Put a file where the hub's client would have put it."""
    import huggingface_hub

    repository, file = registry.split_hub(hub)
    folder = huggingface_hub.constants.HF_HUB_CACHE + f"/models--{repository.replace('/', '--')}"
    snapshot = Path(folder) / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copy(path, snapshot / file)


FORMS = {  # how publishers store an image tower (the sources stand in models.yml)
    "RobustVLM's state dict": lambda tower: tower,
    "TeCoA's checkpoint": lambda tower: {
        "epoch": 10,
        "state_dict": {"pad_up": torch.zeros(1, 3, 2, 4)},
        "add_prompter": {"sp_emb": torch.zeros(1, 5)},
        "vision_encoder_state_dict": tower,
        "best_acc1": torch.tensor(0.5),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]},
    },
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "by hand"])
def test_an_image_tower_alone_is_completed_by_its_base(shelf, form, given, tmp_path):
    folder, base, tuned = shelf
    path = tmp_path / "fetched.pth.tar" if given else folder / "toy-tower.pth.tar"
    torch.save(FORMS[form](tuned.visual.state_dict()), path)
    loaded = load_clip("toy-tower", pretrained=str(path) if given else "", device="cpu")
    x, ids = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)), loaded.tokenizer(["a cat"])
    assert torch.allclose(loaded.visual(x), tuned.visual(x), atol=1e-6)
    assert not torch.allclose(loaded.visual(x), base.visual(x), atol=1e-3), "the tower is the tuned one"
    assert torch.allclose(loaded.model.encode_text(ids), base.encode_text(ids), atol=1e-6)
    assert loaded.name == "toy-tower" and loaded.weights_sha256 == sha256(path)


@torch.no_grad()
def test_a_published_model_comes_from_the_hubs_cache_by_name_and_by_tag(shelf, tmp_path, monkeypatch):
    folder, base, tuned = shelf
    torch.save(tuned.state_dict(), tmp_path / "whole.bin")
    cache(tmp_path / "whole.bin", "someone/robust/open_clip_pytorch_model.bin")
    change(monkeypatch, "toy-robust", sha256=sha256(tmp_path / "whole.bin"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(load_clip("toy-robust", device="cpu").visual(x), tuned.visual(x), atol=1e-6)
    (folder / "toy-base.safetensors").rename(tmp_path / "base.safetensors")
    cache(tmp_path / "base.safetensors", "someone/toy/open_clip_model.safetensors")
    by_tag = load_clip("toy-clip", pretrained="toy", device="cpu")
    assert torch.allclose(by_tag.visual(x), base.visual(x), atol=1e-6)
    assert registry.find("toy-clip", "toy").name == "toy-base" and registry.find("toy-clip") is None


def test_a_published_checksum_is_compared(shelf, tmp_path, monkeypatch):
    folder, base, tuned = shelf
    change(monkeypatch, "toy-robust", sha256="0" * 64)
    torch.save(tuned.state_dict(), folder / "toy-robust.bin")
    refuse("expected SHA-256 000000000000… for toy-robust.bin, got .+; fetch it again", "toy-robust")
    refuse("expected SHA-256 000000000000…", "toy-robust", pretrained=str(folder / "toy-robust.bin"))
    torch.save(tuned.visual.state_dict(), tmp_path / "tower.pt")
    load_clip("toy-robust", pretrained=str(tmp_path / "tower.pt"))  # another form, of which no sum is published
    change(monkeypatch, "toy-base", sha256="1" * 64)
    refuse("expected SHA-256 111111111111… for toy-base", "toy-robust", pretrained=str(tmp_path / "tower.pt"))


def test_a_file_that_is_known_by_its_checksum_is_loaded_as_what_it_is(shelf, tmp_path, monkeypatch):
    folder, base, tuned = shelf
    torch.save(tuned.state_dict(), tmp_path / "whole.bin")
    change(monkeypatch, "toy-robust", sha256=sha256(tmp_path / "whole.bin"))
    load_clip("toy-clip", pretrained=str(tmp_path / "whole.bin"))
    which = r"which is 'toy-robust' \(toy-clip, GELU\); load it by that name"
    refuse(which, "toy-clip-quickgelu", pretrained=str(tmp_path / "whole.bin"))
    refuse(which, "toy-base", pretrained=str(tmp_path / "whole.bin"))


def test_an_entry_that_states_something_else_than_its_architecture_is_refused(shelf, monkeypatch):
    for facts in ({"activation": "QuickGELU"}, {"image_size": 48}, {"context_length": 77}):
        change(monkeypatch, "toy-base", **({"activation": "GELU", "image_size": 32, "context_length": 16} | facts))
        refuse("expected 'toy-base' with activation, image size and context length .+; correct models.yml", "toy-base")


def test_an_image_tower_without_a_base_is_refused(shelf, tmp_path):
    folder, base, tuned = shelf
    torch.save(tuned.visual.state_dict(), tmp_path / "tower.pt")
    belongs = "expected a whole model for 'toy-clip', got .+ an image tower alone; name the weights that it belongs to"
    refuse(f"{belongs}: toy-robust, toy-tower", "toy-clip", pretrained=str(tmp_path / "tower.pt"))
    refuse("an image tower alone; save the whole model", "toy-base", pretrained=str(tmp_path / "tower.pt"))
    (folder / "toy-base.safetensors").unlink()
    refuse("weights 'toy-base' could not be had", "toy-tower", pretrained=str(tmp_path / "tower.pt"))


@torch.no_grad()
@pytest.mark.skipif(not asset("clip", "nano.safetensors").exists(), reason="the nano CLIP is not trained yet")
def test_a_bundled_model_completes_its_own_tuned_tower(tmp_path):
    nano = load_clip("nano", device="cpu")
    tower = {k: v * 1.01 for k, v in nano.visual.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tower.items()}, tmp_path / "tower.safetensors")
    tuned = load_clip("nano", pretrained=str(tmp_path / "tower.safetensors"), device="cpu")
    assert torch.equal(tuned.visual.proj, tower["proj"]) and not torch.equal(tuned.visual.proj, nano.visual.proj)
    assert torch.equal(tuned.model.text_projection, nano.model.text_projection)


@torch.no_grad()
def test_a_resnet_is_loaded_with_its_statistics(tmp_path):
    model = clip_room.random_clip("small-rn").model
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    save_file(state, tmp_path / "rn.safetensors")  # as pre-training writes it: no counters
    loaded = load_clip("small-rn", pretrained=str(tmp_path / "rn.safetensors"), device="cpu")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(loaded.visual(x), model.visual(x), rtol=1e-2, atol=1e-2)
    assert torch.allclose(loaded.visual.bn1.running_mean, model.visual.bn1.running_mean, atol=1e-3)
    del state["visual.bn1.running_mean"]
    save_file(state, tmp_path / "rn.safetensors")
    refuse("visual.bn1.running_mean is missing", "small-rn", pretrained=str(tmp_path / "rn.safetensors"))
