"""The scripts that made the bundled CLIP: stream of captions, vocabulary, sizes, loss."""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import contrastive
import mixture
import numpy as np
import pretrain_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from mixture import Mixture
from PIL import Image

from robustvlm_lite import clip as clip_room
from robustvlm_lite import scenes
from robustvlm_lite.clip import load_clip
from robustvlm_lite.runtime import PACKAGE

# --- the stream


def write(folder, split, n, names, side=64, **columns):
    folder.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(len(folder.name))
    images = []
    for i in range(n):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": f"{split}/{i}.png"})
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {"image": pa.array(images, layout), "label": pa.array([i % len(names) for i in range(n)], pa.int64())}
    pq.write_table(pa.table(table | columns), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Image packs of the real names and columns, with ten classes "NAME thing K" and 60 images each."""
    root = tmp_path_factory.mktemp("packs")
    for name in mixture.SHARES:
        names = [f"{name} thing {k}" for k in range(10)]
        columns = {"domain": [list(mixture.DOMAINS)[i % 4] for i in range(60)]} if name == "pacs" else {}
        write(root / name, "train", 60, names, 32 if name.startswith("cifar") else 64, **columns)
        described = {"names": names}
        if name == "cifar100":
            described |= {
                "coarse_label_of_label": [k // 5 for k in range(10)],
                "superclasses": ["first half", "second half"],
            }
        (root / name / "classes.json").write_text(json.dumps(described))
    with open(root / "near_duplicates.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["train_pack", "train_path"])
        writer.writeheader()
        writer.writerow({"train_pack": "stl10", "train_path": "train/7.png"})
    return root


@pytest.fixture(scope="module")
def stream(packs, tmp_path_factory):
    return Mixture(packs, tmp_path_factory.mktemp("cache"), rendered=0.5)


def test_a_batch_depends_on_its_key_alone(stream):
    torch.manual_seed(1)
    images, captions, groups = stream.batch(32, 48, 0, 5, 1)
    torch.manual_seed(2)
    stream.batch(32, 16, 9)
    again = stream.batch(32, 48, 0, 5, 1)
    assert torch.equal(images, again[0]) and captions == again[1]
    assert all(
        torch.equal(a, b) for one, two in zip(groups, again[2], strict=True) for a, b in zip(one, two, strict=True)
    )
    for key in ((0, 6, 1), (0, 5, 0), (1, 5, 1)):
        assert not torch.equal(stream.batch(32, 48, *key)[0], images), key


def test_every_image_has_one_caption_among_those_of_its_group(stream):
    for step in range(4):
        images, captions, groups = stream.batch(48, 40, step)
        assert images.shape == (40, 3, 48, 48) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        rows = torch.cat([rows for rows, _, _ in groups])
        assert sorted(rows.tolist()) == list(range(40)), "each image once"
        where = torch.cat([where for _, _, where in groups])
        assert where.tolist() == list(range(len(captions)))
        for _, target, where in groups:
            assert 0 <= target.min() and target.max() < len(where)
            texts = [captions[i] for i in where]
            assert len(set(texts)) == len(texts), "two equal captions would be rivals"


def test_photographs_keep_their_label_and_never_meet_another_packs_captions(stream):
    photos_only = Mixture.__new__(Mixture)
    photos_only.__dict__ |= stream.__dict__ | {"rendered": 0.0}
    superclasses = domains = 0
    for step in range(12):
        _, captions, groups = photos_only.batch(32, 32, step)
        for _, _, where in groups:
            texts = [captions[i] for i in where]
            kinds = {m.group(1) for t in texts if (m := re.search(r"(\w+) thing \d", t))}
            if kinds:
                assert len(kinds) == 1
                if kinds & {"flowers102", "oxford_pets_3class"}:
                    assert all(t.count(".") <= 1 and ".," not in t for t in texts)
                domains += any(t.startswith(("a sketch of", "an art painting of", "a cartoon of")) for t in texts)
            else:
                assert all("half" in t for t in texts)
                superclasses += 1
    assert superclasses and domains


def test_captions_name_the_class_of_the_stored_row(stream, packs):
    """Every pack, every set: the caption at index c of a set is what row i with label c is called."""
    for pack in stream.packs:
        table = pq.read_table(packs / pack.name / "train-00000-of-00001.parquet")
        assert torch.equal(pack.labels, torch.tensor(table["label"].to_pylist()))
        for row in (0, 13, 59):
            stored = np.asarray(Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))).transpose(2, 0, 1)
            assert np.array_equal(pack.images[row], stored)
    pacs = next(p for p in stream.packs if p.name == "pacs")
    labels, (texts,) = pacs.sets["pacs domains"]
    for row in range(60):
        assert texts[labels[row]] == mixture.DOMAINS[list(mixture.DOMAINS)[row % 4]].format(f"pacs thing {row % 10}")
    coarse, (names,) = next(p for p in stream.packs if p.name == "cifar100").sets["cifar100 superclasses"]
    assert [names[c] for c in coarse[:10]] == ["first half"] * 5 + ["second half"] * 5


def test_copies_and_validation_rows_are_not_trained_on(stream, monkeypatch):
    used = set()

    def watch(images, size, g):
        used.update(image.numpy().tobytes() for image in images)
        return torch.zeros(len(images), 3, size, size)

    monkeypatch.setattr(mixture, "augment", watch)
    for step in range(4):
        stream.batch(32, 400, step)
    assert len(used) > 300
    for pack in stream.packs:
        kept_out = [i for i in range(60) if i not in pack.train]
        assert not used & {pack.images[i].tobytes() for i in kept_out}
        train, validation = set(pack.train.tolist()), set(pack.validation.tolist())
        assert validation and not train & validation
        assert train | validation == set(range(60)) - ({7} if pack.name == "stl10" else set())
        assert len(pack.weights) == len(pack.train)
        assert stream.facts[pack.name]["train_images"] == len(train), "what was held out is not counted"


def test_held_out_pairs_are_neither_captions_nor_rivals(stream):
    mostly_rendered = Mixture.__new__(Mixture)
    mostly_rendered.__dict__ |= stream.__dict__ | {"rendered": 0.97}
    held_out = [
        (pair, f"{pair.split()[0]} {words}") for pair in scenes.HELD_OUT_PAIRS for words in [pair.split()[1] + "s"]
    ]
    seen = set()
    for step in range(30):
        _, captions, _ = mostly_rendered.batch(32, 64, step)
        seen |= set(captions)
    text = "\n".join(seen)
    for pair, plural in held_out:
        assert not re.search(rf"\b({pair}|{plural}|{pair}es)\b", text), pair
        color, shape = pair.split()
        assert not re.search(rf"\b{color} (?:\w+ )?{shape}\b", text), pair
    pairs = {p for p in scenes.PAIRS if re.search(rf"\b{p}\b", text)}
    assert pairs == set(scenes.PAIRS) - set(scenes.HELD_OUT_PAIRS), "all others occur"
    for word in ("sketch", "striped", "three", "left of", "object"):
        assert word in text, word


def test_augmented_images_are_crops_of_the_asked_size():
    images = torch.full((20, 3, 64, 64), 100, dtype=torch.uint8)
    out = mixture.augment(images, 48, torch.Generator().manual_seed(0))
    assert out.shape == (20, 3, 48, 48) and out.std((1, 2, 3)).max() < 1e-3, "a flat image stays flat"
    level = out.mean((1, 2, 3)) * 255 / 100
    assert 0.74 < level.min() < 0.9 < 1.1 < level.max() < 1.26


# --- the training script


def test_sizes_have_their_shares_of_the_steps():
    recipe = pretrain_clip.Recipe(steps=1000)
    sizes = [pretrain_clip.size_at(recipe, step) for step in range(1000)]
    assert sizes == sorted(sizes), "short tokens first"
    assert {s: sizes.count(s) / 1000 for s in sizes} == {size: share for size, share in recipe.sizes}
    assert pretrain_clip.size_at(recipe, 5000) == 64


def test_positions_are_the_models_own_at_its_size_and_shrink_with_the_image(random_clip):
    visual = random_clip.visual
    assert contrastive.positions(visual, 64) is visual.positional_embedding
    small = contrastive.positions(visual, 32)
    assert small.shape == (17, 128) and torch.equal(small[0], visual.positional_embedding[0])
    ramp = torch.arange(8.0).repeat(8, 1)  # grows along a row of patches
    fake = type("Visual", (), {"class_embedding": None, "patch_size": (8, 8)})
    fake.positional_embedding = torch.cat([torch.zeros(1, 1), ramp.reshape(64, 1)])
    across = contrastive.positions(fake, 32)[1:].view(4, 4)
    assert torch.allclose(across, across[:1].expand(4, 4)) and (across.diff(dim=1) > 1.5).all()


def test_positions_of_a_resnet_are_those_of_its_pool():
    visual = pretrain_clip.make_model("small-rn")[0].visual
    own = visual.attnpool.positional_embedding
    assert contrastive.positions(visual, 64) is own and own.shape == (5, 768)
    for size in (32, 48):  # one cell of 32 pixels
        small = contrastive.positions(visual, size)
        assert small.shape == (2, 768) and torch.equal(small[0], own[0])
        assert torch.allclose(small[1], own[1:].mean(0), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nano", "small-rn"])
def test_what_is_trained_is_what_is_loaded(name):
    """At the model's own size the training script computes the features that `ZeroShotCLIP` will."""
    model = pretrain_clip.make_model(name)[0].eval()
    clip = clip_room.ZeroShotCLIP(model, None, name, "")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(contrastive.image_features(model, x), clip.image_features(x), atol=1e-6)
    assert contrastive.image_features(model, x[..., :48, :48]).shape == (2, 128)


def test_the_loss_is_the_cross_entropy_within_each_group(random_clip, stream):
    images, captions, groups = stream.batch(64, 12, 3)
    loss = contrastive.contrastive_loss(
        random_clip.model, random_clip.tokenizer, (images, captions, groups), torch.device("cpu")
    )
    image, total = random_clip.image_features(images), 0.0
    text = random_clip.encode_text(captions)
    for rows, target, where in groups:
        logits = random_clip.logit_scale * image[rows] @ text[where].T
        shares = (
            target if target.is_floating_point() else F.one_hot(target, len(where))
        )  # of mixed images, or one class
        total = total - (shares * logits.log_softmax(1)).sum()
    assert loss.item() == pytest.approx(total.item() / 12, rel=1e-4)


@pytest.mark.parametrize("name", ["nano", "small", "small-rn"])
def test_each_parameter_has_one_optimizer(name):
    model = pretrain_clip.make_model(name)[0]
    muon, adamw = pretrain_clip.optimizers(model, pretrain_clip.Recipe())
    names = {id(p): n for n, p in model.named_parameters()}
    taken = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert all(n.endswith("weight") and "ln_" not in n and "bn" not in n for n in taken[0])
    ends = {"visual.conv1.weight", "token_embedding.weight", "positional_embedding", "text_projection", "logit_scale"}
    assert ends <= set(taken[1]), "the ends of both towers are AdamW's"
    inner = "visual.layer3.1.conv2.weight" if name == "small-rn" else "visual.transformer.resblocks.3.mlp.c_fc.weight"
    assert inner in taken[0] and "transformer.resblocks.2.attn.in_proj_weight" in taken[0]


def test_the_average_holds_the_statistics_and_validation_moves_nothing(packs, tmp_path):
    recipe = pretrain_clip.Recipe(model="small-rn", steps=3, batch=6, procs=1, warmup=1, ema=0.6)
    run = pretrain_clip.Pretraining(recipe, packs, tmp_path, rank=0)
    key = "visual.layer2.0.bn2.running_var"
    expected = run.model.state_dict()[key].clone()
    for step in range(2):
        run.take_step()
        expected.lerp_(run.model.state_dict()[key], 1 - min(0.6, (step + 1) / (step + 10)))
    assert torch.equal(run.ema[key], expected) and not torch.equal(expected, torch.ones_like(expected))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.log(0.0, validate=True)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items()) and run.model.visual.bn1.training


@pytest.mark.parametrize("name", ["nano", "small-rn"])
def test_a_resumed_run_is_the_same_run(name, packs, tmp_path):
    recipe = pretrain_clip.Recipe(model=name, steps=4, batch=6, procs=1, warmup=1)
    whole = pretrain_clip.Pretraining(recipe, packs, tmp_path / "whole", rank=0)
    losses = [whole.take_step() for _ in range(4)]
    first = pretrain_clip.Pretraining(recipe, packs, tmp_path / "cut", rank=0)
    first.take_step()
    first.take_step()
    first.save()
    first.take_step()  # lost, as by a kill before the next save
    resumed = pretrain_clip.Pretraining(recipe, packs, tmp_path / "cut", rank=0)
    assert resumed.step == 2 and [resumed.take_step() for _ in range(2)] == losses[2:]
    for run in (whole, resumed):
        run.log(losses[-1], validate=False)
        pretrain_clip.export(run)
    made = [json.loads((tmp_path / run / "recipe.json").read_text()) for run in ("whole", "cut")]
    assert made[0]["weights_sha256"] == made[1]["weights_sha256"] and made[0]["images_seen"] == 24
    assert (tmp_path / "cut" / f"{name}.safetensors").stat().st_size < 15e6
    load_clip(name, pretrained=str(tmp_path / "cut" / f"{name}.safetensors"))


def test_lines_that_a_killed_run_logged_in_vain_are_forgotten(tmp_path):
    log = tmp_path / "log.jsonl"
    pretrain_clip.trim_log(log, 0)
    assert log.read_text() == ""
    log.write_text('{"step": 50}\n{"step": 100}\n{"step": 150}\n{"step": 2')
    pretrain_clip.trim_log(log, 100)
    assert log.read_text() == '{"step": 50}\n{"step": 100}\n'


def start(packs, work, recipe):
    """The training script in a process group of its own, with two words a field of the recipe."""
    options = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    script = [sys.executable, pretrain_clip.__file__, "--data-root", str(packs), "--work", str(work), *options]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(script, env=env, start_new_session=True, **quiet)


def kill_after(process, state, saves):
    """SIGKILL to the whole group, once `state` has been written `saves` times, somewhere in the steps that follow."""
    seen = set()
    while len(seen) < saves and process.poll() is None:
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.002)
    time.sleep(random.Random(saves).uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_run_that_is_killed_resumes_to_the_same_bits(packs, tmp_path):
    """The command line, SIGKILL between two saves, and the same command again, against a run that nobody disturbed."""
    recipe = {"model": "nano", "procs": 1, "steps": 30, "batch": 4, "warmup": 2, "save-every": 3}
    cut, whole = (start(packs, tmp_path / name, recipe) for name in ("cut", "whole"))
    saves = random.Random(4).randint(1, 4)
    kill_after(cut, tmp_path / "cut" / "state.pt", saves)
    assert cut.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "recipe.json").exists()
    stopped = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"]
    assert 3 * saves <= stopped < 30 and stopped % 3 == 0
    for process in (whole, start(packs, tmp_path / "cut", recipe)):
        _, said = process.communicate()
        assert process.returncode == 0, said
    weights = [(tmp_path / name / "nano.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
    made = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("cut", "whole")]
    for run in made:
        run.pop("wall_s")
        assert [line.pop("seconds") >= 0 for line in run["validation_curve"]] == [True]
    assert made[0] == made[1] and made[0]["recipe"]["save_every"] == 3 and made[0]["images_seen"] == 120
