"""The registry of weights against open_clip's own configs and tags, and where it looks on a machine."""

import json
import re
import shutil

import pytest

from robustvlm_lite import runtime
from robustvlm_lite.clip import registry
from robustvlm_lite.runtime import asset

ENTRIES = registry.published()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_agrees_with_open_clip(name):
    import open_clip

    entry = ENTRIES[name]
    config = open_clip.get_model_config(entry.architecture)
    assert entry.activation == ("QuickGELU" if config.get("quick_gelu") else "GELU")
    assert entry.image_size == config["vision_cfg"]["image_size"]
    assert entry.context_length == config["text_cfg"]["context_length"]
    if entry.tag:
        tag = open_clip.get_pretrained_cfg(entry.architecture, entry.tag)
        assert tag["hf_hub"] == registry.split_hub(entry.hub)[0] + "/"
        assert bool(tag.get("quick_gelu")) == (entry.activation == "QuickGELU")
        assert tag["mean"] == open_clip.constants.OPENAI_DATASET_MEAN


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_says_where_it_comes_from(name):
    entry = ENTRIES[name]
    assert bool(entry.hub) != bool(entry.obtain) and entry.source and entry.licence
    assert re.fullmatch(r"([0-9a-f]{64})?", entry.sha256)
    if entry.hub:
        repository, file = registry.split_hub(entry.hub)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and file.startswith("open_clip_")
    if entry.base:
        base = ENTRIES[entry.base]
        assert (base.architecture, base.activation) == (entry.architecture, entry.activation) and base.hub
    assert entry.hub or entry.base, "an image tower alone needs its text side"


def test_what_the_papers_use_is_there():
    used = {("ViT-B-32-quickgelu", "openai"), ("ViT-B-16-quickgelu", "openai"), ("RN50-quickgelu", "openai")}
    assert used <= {(entry.architecture, entry.tag) for entry in ENTRIES.values()}
    assert {"tecoa1-vit-b-32", "tecoa4-vit-b-32", "fare2-vit-l-14", "tecoa2-vit-l-14"} <= ENTRIES.keys()
    sums = [entry.sha256 for entry in ENTRIES.values() if entry.sha256]
    assert len(sums) == len(set(sums))


def test_bundled_models_are_the_files_that_lie_there(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "clip"
    folder.mkdir(parents=True)
    for name in ("nano", "small", "small-rn"):
        shutil.copy(asset("clip", f"{name}.json"), folder)
    monkeypatch.setattr(runtime, "PACKAGE", tmp_path)
    assert registry.bundled() == {}, "configs alone are architectures"
    (folder / "small-rn.safetensors").touch()
    assert list(registry.bundled()) == ["small-rn"]
    (folder / "nano.card.json").write_text(json.dumps({"weights_sha256": "abc"}))
    nano, small_rn = registry.bundled().values()
    assert (nano.activation, nano.image_size, nano.context_length, nano.sha256) == ("GELU", 64, 32, "abc")
    assert nano.bundled and nano.architecture == "nano" and small_rn.sha256 == ""
    assert registry.on_machine(nano) is None and registry.on_machine(small_rn) == folder / "small-rn.safetensors"
    assert "check out" in registry.how_to_get(nano)


def test_weights_are_found_by_hand_before_the_hubs_cache(tmp_path, monkeypatch):
    import huggingface_hub

    entry = ENTRIES["fare2-vit-l-14"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("ROBUSTVLM_WEIGHTS", str(tmp_path / "weights"))
    assert registry.on_machine(entry) is None
    assert f"put it at {tmp_path / 'weights' / 'fare2-vit-l-14.bin'}" in registry.how_to_get(entry)
    assert registry.how_to_get(ENTRIES["tecoa1-vit-b-32"]).endswith("weights/tecoa1-vit-b-32.pt")
    snapshot = tmp_path / "models--chs20--fare2-clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "open_clip_pytorch_model.bin").touch()
    assert registry.on_machine(entry) == snapshot / "open_clip_pytorch_model.bin"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "fare2-vit-l-14.bin").touch()
    (tmp_path / "weights" / "fare2-vit-l-14-more.bin").touch()
    assert registry.on_machine(entry) == tmp_path / "weights" / "fare2-vit-l-14.bin"
    monkeypatch.delenv("ROBUSTVLM_WEIGHTS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.folder() == tmp_path / ".cache" / "robustvlm_lite"


def test_the_registry_is_searched_by_name_tag_and_checksum():
    assert registry.find("openai-rn50").architecture == "RN50-quickgelu"
    assert registry.find("RN50-quickgelu", "openai") == registry.find("openai-rn50")
    assert registry.find("RN50-quickgelu") is None and registry.find("RN50-quickgelu", "other") is None
    assert registry.by_sha256(ENTRIES["fare2-vit-l-14"].sha256).name == "fare2-vit-l-14"
    assert registry.by_sha256("0" * 64) is None and registry.by_sha256("") is None
