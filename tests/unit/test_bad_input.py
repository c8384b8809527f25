"""Bad input is one clear line, an exit code that is not 0, and nothing half-written."""

import io
import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_book import CHAPTER

from robustvlm_lite import cli, runtime
from robustvlm_lite import clip as clip_room
from robustvlm_lite.attacks import get_attack
from robustvlm_lite.cards import load_card, load_examples
from robustvlm_lite.data import ImageSet
from robustvlm_lite.records import write_whole
from robustvlm_lite.threat import ThreatModel

# ---- what the rows are made of: functions of a temporary folder that return arguments or a call


def run(*argv):
    return lambda tmp: ["run", CHAPTER, *argv]


def own(*argv, data="images"):
    """`evaluate` on a good folder of images, or on what `data(tmp)` or the name `data` stands for."""
    return lambda tmp: ["evaluate", "--data", str(data(tmp) if callable(data) else tmp / data), *argv]


def named(name, *argv):
    return lambda tmp: ["evaluate", "--data", name, *argv]


def png(level=128):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def images(tmp, files):
    """A folder with these files: path -> bytes; a path that ends in / is an empty folder."""
    for name, content in files.items():
        path = tmp / "own" / name
        path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    return tmp / "own"


def folder(**files):
    """cat__a_png=... is the file cat/a.png beside a good class `dog`; bird__ is an empty folder."""
    paths = {name.replace("__", "/").replace("_png", ".png"): content for name, content in files.items()}
    return lambda tmp: images(tmp, {"dog/0.png": png(), **paths})


def pack(change=lambda data: data, labels=(0, 1), names=("cat", "dog"), column="image"):
    """A Parquet pack whose file went through `change`."""

    def make(tmp):
        rows = [{"bytes": png(), "path": f"{i}.png"} for i in range(len(labels))]
        buffer = io.BytesIO()
        pq.write_table(pa.table({column: rows, "label": list(labels)}), buffer)
        files = {"test-00000-of-00001.parquet": change(buffer.getvalue())}
        return images(tmp, files | {"classes.json": json.dumps({"names": names}).encode()})

    return make


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def attack_on(x, y=None):
    """An attack on these images, which the model would take."""
    labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
    keys = [(i,) for i in range(len(x))]
    return lambda tmp: lambda: get_attack("pgd-2").run(model, x, labels, ThreatModel(1.0), keys)


def full_disk(tmp):
    """A file on a disk without space: the device that accepts nothing."""
    (tmp / "runs").mkdir()
    (tmp / "runs" / "card.json.tmp").symlink_to("/dev/full")
    return lambda: write_whole(tmp / "runs" / "card.json", lambda path: path.write_text("x" * 100_000))


def damaged_card(text):
    def make(tmp):
        (tmp / "card.json").write_text(text)
        return lambda: load_card(tmp)

    return make


def damaged_examples(tmp):
    (tmp / "examples.parquet").write_bytes(half(b"PAR1" * 100))
    return lambda: load_examples(tmp)


def weights(name, change, suffix=".safetensors"):
    """`evaluate --pretrained` with a file of nano's shapes that went through `change`."""

    def make(tmp):
        from safetensors.torch import save

        state = {"visual.proj": torch.zeros(3, 3)}
        (tmp / f"w{suffix}").write_bytes(change(save(state)))
        return ["evaluate", "--data", str(tmp / "images"), "--model", name, "--pretrained", str(tmp / f"w{suffix}")]

    return make


def nan_loss(tmp):
    from robustvlm_lite.defenses import Training, build

    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    toy = ImageSet("toy", images, torch.arange(4) % 2, ("a", "b"), ("a {}",))
    training = Training(steps=4, batch=4, lr=1e38, optimizer="sgd", precision=None)
    clip = clip_room.random_clip("nano")
    return lambda: build("FT-clean", clip).fit(toy, training=training, progress=False)


# name -> (what to do, what the line says)
RUN = {
    "unknown command": (lambda tmp: ["rnu"], "invalid choice: 'rnu'"),
    "unknown chapter": (lambda tmp: ["run", "99_toi"], "unknown chapter '99_toi'; did you mean '99_toy'?"),
    "unknown profile": (run("--profile", "tinny"), "unknown profile 'tinny'; did you mean 'tiny'?"),
    "unknown parameter": (run("-p", "eps_25", "1"), "unknown parameter 'eps_25'; did you mean 'eps_255'?"),
    "parameter with an option": (run("-p", "seed", "1"), "use --seed 1"),
    "parameter given twice": (run("-p", "warm", "true", "-p", "warm", "false"), "warm is given twice"),
    "text for a number": (run("-p", "eps_255", "one"), "eps_255: expected a finite number, got 'one'"),
    "fraction for a whole number": (run("-p", "n_images", "2.5"), "n_images: expected a whole number, got '2.5'"),
    "switch for a whole number": (run("-p", "n_images", "True"), "n_images: expected a whole number, got 'True'"),
    "number for a switch": (run("-p", "warm", "1"), "warm: expected true or false, got '1'"),
    "ε of zero": (run("-p", "eps_255", "0"), "expected a number in (0, 64], got 0"),
    "ε below zero": (run("-p", "eps_255", "-1"), "expected a number in (0, 64], got -1"),
    "absurd ε": (run("-p", "eps_255", "1e9"), "expected a number in (0, 64], got 1e9"),
    "ε not a number": (run("-p", "eps_255", "nan"), "expected a finite number, got 'nan'"),
    "infinite ε": (run("-p", "eps_255", "inf"), "expected a finite number, got 'inf'"),
    "seed as text": (run("--seed", "one"), "argument --seed: invalid int value: 'one'"),
    "seed below zero": (run("--seed", "-1"), "expected a seed from 0"),
    "no weights": (run("--profile", "paper"), "not bundled: fetch the file X, put it anywhere and pass -p pretrained"),
    "weights not there": (run("-p", "pretrained", "no/such.pt"), "expected a weights file at pretrained, found none"),
    "data root not there": (run("-p", "data_root", "no/such"), "expected a folder at data_root, found none at no/such"),
    "data root not given": (run("--profile", "small"), "'small/stl10' is not bundled; pass data_root"),
    "data root of something else": (
        lambda tmp: ["run", CHAPTER, "--profile", "small", "-p", "data_root", str(tmp / "images")],
        "for dataset 'small/stl10', found none; check data_root",
    ),
    "cuda where there is none": (run("-p", "device", "cuda"), "device 'cuda' was asked for but torch sees none"),
    "unknown device": (run("-p", "device", "gpu"), "expected a torch device such as 'cpu' or 'cuda', got 'gpu'"),
    "file in the way of the output": (
        lambda tmp: ["run", CHAPTER, "--out", str(tmp / "blocked" / "runs")],
        "choose another --out",
    ),
}
EVALUATE = {
    "unknown attack": (own("--attack", "pdg"), "unknown attack 'pdg'; did you mean 'pgd'?"),
    "no steps": (own("--attack", "pgd", "--steps", "0"), "expected at least 1 step for 'pgd', got 0"),
    "budget of zero": (own("--eps-255", "0"), "eps_255: expected a number in (0, 255], got 0.0"),
    "absurd budget": (own("--eps-255", "999"), "eps_255: expected a number in (0, 255], got 999.0"),
    "budget not a number": (own("--eps-255", "nan"), "eps_255: expected a number in (0, 255], got nan"),
    "budget as text": (own("--eps-255", "big"), "argument --eps-255: invalid float value: 'big'"),
    "no images asked": (own("-n", "0"), "expected at least one image, got -n 0"),
    "more images than there are": (own("-n", "3"), "of own/images, got n=3"),
    "a device that torch was not built for": (own("--device", "mps"), "expected a device of this machine, cpu or cuda, got 'mps'"),
    "cuda asked where there is none": (own("--device", "cuda"), "device 'cuda' was asked for but torch sees none"),
    "unknown defense": (own("--defense", "TeCoAA"), "unknown defense 'TeCoAA'; did you mean 'TeCoA'?"),
    "defense file not there": (own("--defense", "no/such.safetensors"), "expected a defense checkpoint at no/such"),
    "unknown dataset": (named("photos/caltec"), "unknown dataset 'photos/caltec'; did you mean 'photos/caltech'?"),
    "dataset without its root": (named("small/stl10"), "'small/stl10' is not bundled; pass data_root"),
    "folder not there": (named("no/such/folder"), "expected a folder of images or Parquet files, found none"),
    "corrupt image": (own(data=folder(cat__a_png=b"no picture")), "cat/a.png"),
    "truncated image": (own(data=folder(cat__a_png=half(png()))), "cat/a.png"),
    "file of 0 bytes": (own(data=folder(cat__a_png=b"")), "got 0 bytes at"),
    "empty class": (own(data=folder(cat__a_png=png(), bird__=b"")), "expected images in the class folder"),
    "one class": (own(data=folder()), "expected at least two classes"),
    "images without classes": (own(data=lambda tmp: images(tmp, {"a.png": png()})), "expected one subfolder a class"),
    "corrupt Parquet": (own(data=pack(lambda data: b"PAR1" + b"\0" * 60)), "expected Parquet with columns image"),
    "truncated Parquet": (own(data=pack(half)), "expected Parquet with columns image"),
    "Parquet without images": (own(data=pack(column="picture")), "expected Parquet with columns image"),
    "label without a class": (own(data=pack(labels=(0, 2))), "expected labels in 0..1"),
    "file in the way of the card": (
        lambda tmp: ["evaluate", "--data", str(tmp / "images"), "--out", str(tmp / "blocked")],
        "choose another --out",
    ),
}
LIBRARY = {
    "pixels outside [0, 1]": (attack_on(torch.full((1, 3, 4, 4), 2.0)), "expected pixels in [0, 1], got [2.00, 2.00]"),
    "pixels not a number": (attack_on(torch.full((1, 3, 4, 4), torch.nan)), "expected finite pixels, got NaN"),
    "one channel": (attack_on(torch.zeros(1, 1, 4, 4)), "expected shape [B, 3, H, W], got [1, 1, 4, 4]"),
    "no batch": (attack_on(torch.zeros(3, 4, 4)), "expected shape [B, 3, H, W], got [3, 4, 4]"),
    "8-bit pixels": (attack_on(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "got torch.uint8; divide 8-bit images"),
    "labels as numbers": (attack_on(torch.zeros(1, 3, 4, 4), torch.zeros(1)), "y: expected 1 int64 labels"),
    "full disk": (full_disk, "No space left on device"),
    "card that is no JSON": (damaged_card('{"schema": 1, '), "card.json"),
    "card of another release": (damaged_card('{"schema": 7}'), "expected schema 1, got 7"),
    "truncated examples": (damaged_examples, "is no whole Parquet file"),
}
CHECKPOINTS = {  # these import open_clip
    "unknown backbone": (weights("nanno", bytes), "unknown backbone 'nanno'; did you mean 'nano'?"),
    "backbone without weights": (
        lambda tmp: ["evaluate", "--data", str(tmp / "images"), "--model", "ViT-B-32-quickgelu"],
        "has no bundled weights; pass pretrained",
    ),
    "corrupt checkpoint": (weights("nano", lambda data: b"no weights at all"), "expected whole weights in"),
    "truncated checkpoint": (weights("nano", lambda data: data[:-8]), "expected whole weights in"),
    "corrupt pickle": (weights("nano", lambda data: b"no weights at all", ".pt"), "expected whole weights in"),
    "checkpoint of other shapes": (weights("nano", bytes), "expected weights shaped like 'nano'"),
    "loss not a number": (nan_loss, "FT-clean: the loss is"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two good images in two classes and a file `blocked`; relative paths start here."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(png())
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def refused(what, fragment, place, capfd):
    """Run it: not 0, one line, nothing written."""
    arguments = what(place)
    try:
        code = cli.guarded(arguments) if callable(arguments) else cli.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    shown, said = capfd.readouterr()
    assert code == 2, shown + said
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("robustvlm: ") and fragment in lines[0], said
    assert not [p for p in (place / "runs").rglob("*") if p.name != "card.json.tmp"]
    assert (place / "blocked").read_text() == "a file"


@pytest.mark.parametrize("name", RUN)
def test_run(name, checkout, place, capfd):
    refused(*RUN[name], place, capfd)


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate(name, place, capfd, monkeypatch):
    stub = SimpleNamespace(name="nano", image_size=64, weights_sha256="w", classifier=lambda *text: None)
    monkeypatch.setattr(clip_room, "load_clip", lambda *args, **options: stub)
    refused(*EVALUATE[name], place, capfd)


@pytest.mark.parametrize("name", LIBRARY)
def test_library(name, place, capfd):
    refused(*LIBRARY[name], place, capfd)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, place, capfd):
    refused(*CHECKPOINTS[name], place, capfd)


def test_missing_bundled_weights_and_notebooks(checkout, place, capfd):
    runtime.asset("clip", "nano.safetensors").unlink()
    refused(run(), "bundled weights nano.safetensors are missing", place, capfd)
    os.rename(checkout / "notebooks", checkout / "elsewhere")
    refused(run(), "run from a checkout", place, capfd)


def test_bundled_weights_that_were_changed(checkout, place, capfd):
    runtime.asset("clip", "nano.safetensors").write_bytes(b"other weights")
    runtime.asset("clip", "nano.card.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    refused(own(), "expected SHA-256 000000000000… for nano.safetensors", place, capfd)


def test_a_bug_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(partial(divmod, 1, 0))
