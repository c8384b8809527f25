"""Prompt files: what is learned goes through a file by name, on its own weights and tower, and anything else is refused."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_prompts import NAMES
from toy_tuning import ATTACK, SHORT, photos

from robustvlm_lite import data, defenses
from robustvlm_lite.cards import load_card
from robustvlm_lite.clip import load_clip
from robustvlm_lite.clip import random_clip as another_clip
from robustvlm_lite.defenses import build, build_prompts, load_defense, read_facts, save_change, save_prompts
from robustvlm_lite.practitioner import evaluate_own
from robustvlm_lite.prompts import PromptSpec
from robustvlm_lite.runtime import UserError

KINDS = ["APT (class-specific)", "AdvVP", "PAFT", "FAP", "CAPT", "CBA-FAPT"]


@pytest.fixture
def clip(random_clip):
    return copy.deepcopy(random_clip)


def trained(name, clip, **options):
    defense = build_prompts(name, clip, NAMES, **options)
    return defense.fit(photos(side=64), attack=ATTACK, training=SHORT, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_defense_comes_back_from_its_file(name, clip, random_clip, tmp_path):
    path, x = tmp_path / "prompts.safetensors", photos(side=64).pixels()
    with torch.enable_grad():
        defense = trained(name, clip)
    save_prompts(defense, path, seed=7)
    again = load_defense(str(path), copy.deepcopy(random_clip))
    assert type(again) is type(defense) and again.name == name and again.config == defense.config
    assert again.facts["seed"] == 7 and again.facts["base"] == "nano" and again.facts["backbone"] == "none"
    assert torch.equal(again.classifier(NAMES)(x), defense.classifier(NAMES)(x))
    fresh = build_prompts(name, copy.deepcopy(random_clip), NAMES)
    assert any(not torch.equal(v, again.state()[k]) for k, v in fresh.state().items()), "the file was read"
    assert path.stat().st_size < 4 * sum(v.numel() for v in defense.state().values()) + 4096, "nothing of CLIP is in it"


def test_prompts_know_the_tower_that_they_were_learned_on(clip, random_clip, tmp_path, monkeypatch):
    """A file whose backbone is a fine-tuned defense brings that defense along; on another tower it is refused."""
    monkeypatch.setattr(defenses, "checkpoint", lambda name, base: tmp_path / f"{base}-{name}.safetensors")
    tuned = build("TeCoA", clip).fit(photos(side=64), attack=ATTACK, training=SHORT, progress=False)
    save_change(tuned, random_clip, tmp_path / "nano-TeCoA.safetensors")
    stored = load_defense("TeCoA", copy.deepcopy(random_clip))
    defense, x = trained("CAPT", stored.clip), photos(side=64).pixels()
    save_prompts(defense, tmp_path / "nano-CAPT.safetensors", backbone="TeCoA")
    with torch.no_grad():
        by_name = load_defense("CAPT", copy.deepcopy(random_clip)).classifier(NAMES)(x)
        assert torch.equal(by_name, defense.classifier(NAMES)(x))
    save_prompts(defense, tmp_path / "astray.safetensors", backbone="none")
    with pytest.raises(UserError, match="expected astray.safetensors on the image tower of 'none' that it was trained on"):
        load_defense(str(tmp_path / "astray.safetensors"), copy.deepcopy(random_clip))


def rewritten(path, facts=None, tensors=None):
    """The file with other facts (None removes one) or other tensors."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["facts"])
    header = {k: v for k, v in (header | (facts or {})).items() if v is not None}
    state = load_file(path) | (tensors or {})
    save_file(state, path, metadata={"facts": json.dumps(header)})
    return str(path)


SPOILED = {  # what is done to a good file -> what the line says
    "expected a prompt file at": {"facts": {"tensors_sha256": None}},
    "got one without spec": {"facts": {"spec": None}},
    "with the checksum in its header, got others": {"tensors": {"ctx": torch.zeros(2, 128)}},
    "unknown prompt-tuned defense 'CAPTT'; did you mean 'CAPT'?": {"facts": {"method": "CAPTT"}},
    "expected the choices of CAPT, got others": {"facts": {"config": {"lam": 2.0}}},
    "CAPT: expected lambda >= 0, got -1": {"facts": {"config": {"weight": -1.0}}},
    "got a file that does not load": None,  # no safetensors at all
    "on the weights it was trained on (nano)": {"facts": {"base_sha256": "0" * 64}},
    "on the image tower of 'none'": {"facts": {"tower_sha256": "0" * 64}},
    "expected prompts ctx of shape (3, 128), got (2, 128)": {"facts": {"spec": {"n_text": 3}}},
    "unknown defense 'TeCo'; did you mean 'TeCoA'?": {"facts": {"backbone": "TeCo"}},
}


@pytest.mark.parametrize("line", SPOILED)
def test_a_spoiled_file_is_refused_in_one_line(line, clip, tmp_path):
    path = tmp_path / "prompts.safetensors"
    save_prompts(build_prompts("CAPT", clip, spec=PromptSpec(n_text=2)), path)
    if SPOILED[line] is None:
        path.write_bytes(b"not a checkpoint")
    else:
        rewritten(path, **SPOILED[line])
    with pytest.raises(UserError) as error:
        load_defense(str(path), clip)
    assert line in str(error.value) and "\n" not in str(error.value), error.value


def test_other_weights_and_other_classes_are_refused(clip, tmp_path):
    path = tmp_path / "prompts.safetensors"
    save_prompts(build_prompts("PAFT", clip, NAMES), path)
    with pytest.raises(UserError, match="on the weights it was trained on"):
        load_defense(str(path), another_clip("nano", seed=1))
    with pytest.raises(UserError, match="expected the 4 classes of its head, got 2 others"):
        load_defense(str(path), clip).classifier(("a", "b"))
    with pytest.raises(UserError, match="no bundled checkpoint of 'AdvMaPLe' for other; use nano or train it"):
        clip.name = "other"
        load_defense("AdvMaPLe", clip)


def test_robustvlm_evaluate_takes_a_prompt_file(tmp_path):
    """The whole way: learn prompts for the bundled model, keep them, measure them as a practitioner does."""
    clip = load_clip("nano", device="cpu")
    shots = data.load("photos/caltech", "train", shots=1, seed=1)
    defense = build_prompts("FAP", clip).fit(shots, attack=ATTACK, training=SHORT, progress=False)
    path = tmp_path / "fap.safetensors"
    save_prompts(defense, path)
    own = partial(evaluate_own, data="photos/caltech", defense=str(path), attack="pgd-2", n=25, out=str(tmp_path), device="cpu")
    card = load_card(place := own())
    rows = {row["metric"]: row for row in card["rows"]}
    assert {row["method"] for row in card["rows"]} == {"FAP"} and rows["clean_acc"]["n"] == 25
    assert rows["robust_acc"]["value"] <= rows["clean_acc"]["value"]
    x = data.load("photos/caltech", n=25, seed=0)
    with torch.no_grad():
        right = (defense.classifier(x.class_names)(x.pixels()).argmax(1) == x.labels).float().mean().item()
    assert rows["clean_acc"]["value"] == pytest.approx(right)
    assert read_facts(path)["method"] == "FAP"
    save_prompts(build_prompts("FAP", clip), path)
    assert own(resume=True) != place, "another file of the same name is another run"
