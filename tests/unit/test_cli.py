"""The commands: quick help, lists, claims against their cards, the practitioner's door, the doctor."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toy_book import CHAPTER

from robustvlm_lite import claims, cli, doctor, runtime
from robustvlm_lite import clip as clip_room
from robustvlm_lite.cards import Card, comparable, load_card, load_examples
from robustvlm_lite.records import Cell, Row, records_table
from robustvlm_lite.stats import wilson

COMMANDS = (["list"], ["run"], ["data", "list"], ["data", "prepare"], ["evaluate"], ["claims"], ["doctor"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    example = re.search(r"example: robustvlm (.*)", text).group(1)
    assert example.startswith(" ".join(command))
    assert cli.parser().parse_args(example.split()).function
    assert "1/255" in text or "--eps-255" not in text


def test_help_and_list_need_no_torch():
    code = "import sys; from robustvlm_lite import cli; cli.parser().format_help(); cli.main(['list']);"
    code += "sys.exit(bool({'torch', 'open_clip', 'papermill', 'jupytext'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_list_shows_every_chapter_and_profile(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name, chapter in runtime.chapters().items():
        assert name in shown and chapter["title"] in shown and chapter["reproduces"] in shown
        for profile, sizes in chapter["profiles"].items():
            minutes, guessed = sizes["minutes"], sizes.get("estimated", [])
            assert set(guessed) <= {"minutes", "memory_gb"} and sizes["memory_gb"] > 0
            took = "~" * ("minutes" in guessed) + (f"{minutes} min" if minutes <= 180 else f"{minutes / 60:.0f} h")
            memory = "~" * ("memory_gb" in guessed) + f"{sizes['memory_gb']} GB"
            assert re.search(rf"{profile} +{took} +{memory}  {re.escape(sizes['where'])}", shown)
    assert "~ is an estimate, the rest was measured" in shown


def test_data_list_says_what_is_where(tmp_path, capsys):
    from robustvlm_lite.data import names

    assert cli.main(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(names()) < set(lines)
    assert re.search(r"bundled +500 +3.7 MB +CC BY 4.0", lines["photos/caltech"])
    assert "missing" in lines["small/stl10"] and "rendered" in lines["scenes/shape"]
    (tmp_path / "stl10").mkdir()
    assert cli.main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert re.search(r"small/stl10 +here +0", capsys.readouterr().out)  # a folder without files: n says so


# ---- claims

CLAIM = f"""
- id: TOY-1
  chapter: {CHAPTER}
  paper: Toy
  statement: Half of the images survive.
  where: Table 1
  published: 50 %
  scale: toy
  profile: tiny
  measure: {{robust: acc("CLIP")}}
  reproduced: robust > 0.4
  partly: robust > 0.2
- id: TOY-2
  chapter: {CHAPTER}
  paper: Toy
  statement: It holds at scale.
  where: Table 2
  published: 60 %
  scale: large
  profile: paper
  measure: {{robust: acc("CLIP")}}
  reproduced: robust > 0.4
  partly: robust > 0.2
"""


@pytest.fixture
def committed(checkout, monkeypatch):
    """The folder of a committed toy card, in which half of four images survive."""
    monkeypatch.setattr(claims, "PACKAGE", checkout / "robustvlm_lite")
    folder = checkout / "book" / "cards" / f"{CHAPTER}-tiny"
    folder.mkdir(parents=True)
    (checkout / "book" / "claims.yml").write_text(CLAIM)
    right = [True, True, False, False]
    facts = {"label": 1, "prediction": [1, 1, 0, 0], "prediction_8bit": [1, 1, 0, 0], "seed": 0, "index": range(4)}
    facts |= {"correct": right, "correct_8bit": right, "margin": 0.5, "linf_255": 1.0}
    cell = {"method": "CLIP", "dataset": "toy/gray", "attack": "pgd-20", "eps_255": 1.0}
    records = Cell(records_table(n=4, **cell, **facts), 0.0, 4, 4).records
    card = Card(CHAPTER, "tiny", 0, {"eps_255": 1.0}, device="cpu")
    card.add(Row(**cell, metric="robust_acc", n=4, value=0.5, ci95=wilson(2, 4), extra={"seed": 0}, records=records))
    for decided in claims.decide(claims.load_claims(), card.as_dict(), card.examples):
        card.claim(**decided)
    card.write(folder)
    return folder


def test_claims_show_verdict_and_card_and_stand_the_check(committed, capsys):
    assert cli.main(["claims"]) == 0
    shown = capsys.readouterr().out
    assert f"TOY-1  reproduced  (book/cards/{CHAPTER}-tiny/card.json)\n    Half of the images survive. [Tab" in shown
    assert "TOY-2  not_tested" in shown
    assert cli.main(["claims", "--check"]) == 0
    assert "1 cards: every verdict" in capsys.readouterr().out


def test_claims_check_finds_a_typed_verdict_and_a_typed_number(committed, capsys):
    card = load_card(committed)
    card["claims"][0]["verdict"] = "partly"
    card["rows"][0]["value"] = 0.6
    (committed / "card.json").write_text(json.dumps(card))
    assert cli.main(["claims", "--check"]) == 1
    shown = capsys.readouterr().out
    assert "TOY-1 says partly, its examples give reproduced" in shown
    assert "robust_acc says 0.6 [" in shown and "its examples give 0.5 [" in shown


def test_claims_without_a_card_are_not_tested(committed, capsys):
    (committed / "card.json").unlink()
    assert cli.main(["claims"]) == 0
    assert "TOY-1  not_tested  (no card yet)" in capsys.readouterr().out


# ---- evaluate


class Brightness(torch.nn.Module):
    """A CLIP that sees brightness only: class 0 is dark."""

    name, image_size, weights_sha256 = "brightness", 8, "w"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def classifier(self, class_names, templates):
        return self

    def fast(self):
        return self

    def forward(self, x):
        z = self.scale * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-z, z], dim=1)


def test_evaluate_makes_a_card_of_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_room, "load_clip", lambda *args, **options: Brightness())
    for name, levels in {"a_dark": (20, 60, 127), "bright": (200, 128, 100)}.items():
        (tmp_path / "own" / name).mkdir(parents=True)
        for i, level in enumerate(levels):
            image = Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8))
            image.save(tmp_path / "own" / name / f"{i}.png")
    command = ["evaluate", "--data", str(tmp_path / "own"), "--eps-255", "2", "--out", str(tmp_path / "runs")]
    assert cli.main(command) == 0
    (path,) = tmp_path.glob("runs/evaluate/own-0-*/card.json")
    card = load_card(path)
    assert card["chapter"] == "evaluate" and card["parameters"]["attack"] == "pgd-20" and card["parameters"]["n"] == 6
    values = {row["metric"]: row["value"] for row in card["rows"]}
    assert values == {"clean_acc": 5 / 6, "robust_acc": 3 / 6, "robust_acc_8bit": 3 / 6}  # 127 and 128 fall
    assert len(load_examples(path)) == 12
    shown = capsys.readouterr().out
    assert re.search(r"own/own +CLIP +pgd-20 +2 +6 +50\.0 ", shown) and str(path) in shown

    assert cli.main([*command, "--resume"]) == 0
    assert "had finished before; nothing is computed again" in capsys.readouterr().out
    path.unlink()  # as if it had been killed before the last step
    assert cli.main([*command, "--resume"]) == 0
    assert comparable(load_card(path)) == comparable(card)
    assert cli.main([*command, "-n", "4", "--attack", "cw", "--steps", "3"]) == 0
    (other,) = set(tmp_path.glob("runs/evaluate/*/card.json")) - {path}
    assert load_card(other)["parameters"]["attack"] == "cw-3" and load_card(other)["rows"][0]["n"] == 4


# ---- doctor


def fail(error):
    def check():
        raise error

    return check


def test_doctor_prints_a_line_a_check_and_its_code(capsys, monkeypatch):
    names = ("python", "torch_pair", "packages", "device", "weights", "photographs", "disk", "browser", "commit")
    for name in names:
        monkeypatch.setattr(doctor, name, lambda name=name: f"{name} is well")
    monkeypatch.setattr(doctor, "published_weights", lambda: [(True, "weights a: here"), (False, "weights b: missing")])
    assert cli.main(["doctor"]) == 0
    lines = [*(f"✓ {name} is well" for name in names), "✓ weights a: here", "– weights b: missing"]
    assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr(doctor, "published_weights", fail(OSError("no registry")))
    assert cli.main(["doctor"]) == 0
    assert "– check: OSError: no registry; reinstall" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "browser", fail(doctor.Problem("no chromium; install it")))
    assert cli.main(["doctor"]) == 0  # only the book's tests need it
    assert "– no chromium; install it" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "weights", fail(KeyError("weights_sha256")))
    assert cli.main(["doctor"]) == 1
    assert "✗ check: KeyError: 'weights_sha256'; reinstall" in capsys.readouterr().out


def test_doctor_on_this_environment():
    for check in (doctor.python, doctor.packages, doctor.device, doctor.photographs, doctor.disk):
        assert doctor.outcome(check)[0], doctor.outcome(check)[1]


def test_doctor_names_a_torch_without_its_torchvision(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    passed, line = doctor.outcome(doctor.torch_pair)
    assert not passed and "nms does not exist" in line and f"uv pip install --python {sys.executable} -r requirements.lock" in line


def test_doctor_names_python_packages_and_disk(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert "Python 3.9.1, expected" in doctor.outcome(doctor.python)[1]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-package>=1", "numpy<1", "numpy"])
    line = doctor.outcome(doctor.packages)[1]
    assert "no-such-package absent (expected >=1)" in line and re.search(r"numpy [\d.]+ \(expected <1\)", line)
    monkeypatch.setattr(doctor, "NEEDED_GB", 1e9)
    assert "GB free" in doctor.outcome(doctor.disk)[1] and not doctor.outcome(doctor.disk)[0]


def test_doctor_names_weights_and_files_that_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    folder, photos = tmp_path / "assets" / "clip", tmp_path / "assets" / "photos" / "web"
    folder.mkdir(parents=True)
    photos.mkdir(parents=True)
    assert "no bundled CLIP" in doctor.outcome(doctor.weights)[1]
    for name in ("nano", "small"):  # the second is not trained yet
        (folder / f"{name}.json").write_text("{}")
    assert "no bundled CLIP" in doctor.outcome(doctor.weights)[1]
    (folder / "nano.card.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(b"weights").hexdigest()}))
    assert "nano.safetensors is missing" in doctor.outcome(doctor.weights)[1]
    (folder / "nano.safetensors").write_bytes(b"weights")
    assert doctor.outcome(doctor.weights) == (True, "bundled weights: nano")
    (folder / "nano.safetensors").write_bytes(b"weighty")
    assert "differ from the checksum" in doctor.outcome(doctor.weights)[1]

    assert "no bundled photographs" in doctor.outcome(doctor.photographs)[1]
    (photos / "test.parquet").write_bytes(b"pixels")
    assert doctor.outcome(doctor.photographs) == (True, "bundled photographs: 1 files")
    sums = tmp_path / "assets" / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(b'pixels').hexdigest()}  photos/web/test.parquet\n")
    assert doctor.outcome(doctor.photographs) == (True, "bundled files: 1 checksums agree")
    (photos / "test.parquet").write_bytes(b"pixel")
    assert "differs from its checksum" in doctor.outcome(doctor.photographs)[1]
    (photos / "test.parquet").unlink()
    sums.write_text(sums.read_text())
    (photos / "other.parquet").touch()
    assert "test.parquet is missing" in doctor.outcome(doctor.photographs)[1]


def test_doctor_says_which_published_weights_are_here_and_how_to_get_the_rest(tmp_path, monkeypatch):
    import huggingface_hub.constants

    from robustvlm_lite.clip import registry

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ROBUSTVLM_WEIGHTS", str(tmp_path))
    (tmp_path / "tecoa1-vit-b-32.pt").touch()
    lines = {text.split()[1]: (here, text) for here, text in doctor.published_weights()}
    assert [name.rstrip(":") for name in lines] == list(registry.published())
    assert lines["tecoa1-vit-b-32:"] == (True, f"weights tecoa1-vit-b-32: {tmp_path / 'tecoa1-vit-b-32.pt'}")
    assert [here for here, _ in lines.values()].count(True) == 1
    hub, other = lines["fare2-vit-l-14:"][1], lines["tecoa4-vit-b-32:"][1]
    assert "missing; downloaded at the first use; without network, fetch open_clip_pytorch_model.bin of chs20" in hub
    assert "missing; fetch https://" in other and not any("\n" in text for _, text in lines.values())


def test_doctor_looks_at_a_data_root(tmp_path):
    def look(root):
        return doctor.outcome(lambda: doctor.packs(str(root)))

    assert "is no folder" in look(tmp_path / "absent")[1]
    assert "holds no pack" in look(tmp_path)[1]
    (tmp_path / "stl10").mkdir()
    (tmp_path / "stl10" / "classes.json").write_text("{}")
    assert look(tmp_path) == (True, f"data root {tmp_path}: stl10")
    (tmp_path / "full" / "food101").mkdir(parents=True)
    (tmp_path / "full" / ".dtd.unfinished").mkdir()
    assert look(tmp_path) == (True, f"data root {tmp_path}: stl10, full/food101")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  stl10/classes.json\n")
    assert "differs from its checksum" in look(tmp_path)[1]
