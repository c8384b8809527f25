"""Packs of 64 pixels made again from a source on a local server: same rows, same labels, nearly the same pixels."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_sets import tar

from robustvlm_lite import cli, data
from robustvlm_lite.data import PACKS, rebuild
from robustvlm_lite.data.subsets import labels_sha256, manifests
from robustvlm_lite.runtime import UserError, chapters

COMMIT, SOURCE = "0123abcd", {"repository": "github.com/someone/pictures", "commit": "0123abcd"}
COLORS = {"train": [(200, 10, 10), (10, 200, 10), (90, 90, 90)], "test": [(10, 10, 200), (200, 200, 10)]}


def picture(color, codec="PNG", size=(80, 100), mode="RGB") -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(kept, codec)
    return kept.getvalue()


def written(folder, short, rows):
    """A committed list of (split, path, label, mean color)."""
    split, path, label, mean = map(list, zip(*rows, strict=True))
    columns = {"split": split, "path": path, "mean": pa.array(mean, pa.list_(pa.uint8(), 3)), "label": label}
    facts = {"source": json.dumps(SOURCE), "class_names": '["a", "b"]', "huggingface": "{}", "classes": '{"names": ["a", "b"]}'}
    (folder / "packs").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(facts), folder / f"packs/{short}.parquet")


@pytest.fixture
def source(site, monkeypatch, tmp_path):
    """A pack whose splits hold images of the same paths, as cifar10's do; `source.files` is what the repository holds."""
    monkeypatch.setattr(rebuild, "HOST", site.url)
    monkeypatch.setattr(rebuild, "asset", lambda *parts: tmp_path.joinpath("lists", *parts))
    (tmp_path / "lists/packs").mkdir(parents=True)
    (tmp_path / "lists/packs/near_duplicates.csv").write_text("held_out_pack\n")
    rows = [(split, f"a/{i}.jpg", i % 2, color) for split, colors in COLORS.items() for i, color in reversed([*enumerate(colors)])]
    for short in ("cifar10", "stl10"):
        written(tmp_path / "lists", short, rows)
    files = {f"x-1/{split}/a/{i}.jpg": picture(color) for split, colors in COLORS.items() for i, color in enumerate(colors)}
    files["x-1/train/a/2.jpg"] = picture((90, 90, 90), "JPEG", mode="L")
    files["x-1/other/a/0.jpg"] = picture(COLORS["train"][0])  # the same picture once more
    files["x-1/README"] = b"no picture"

    def publish(**changed):
        site.files[f"/someone/pictures/tar.gz/{COMMIT}"] = tar({k: v for k, v in (files | changed).items() if v is not None})

    publish()
    return publish


def test_rows_come_in_the_order_of_the_list_each_from_its_own_split(source, site, tmp_path, capsys):
    root = tmp_path / "root"
    site.plan = ["truncate"]
    assert cli.main(["data", "prepare", "small/cifar10", "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert f"{root / 'cifar10'}" in shown and "3 train, 2 test" in shown
    assert sorted(p.name for p in root.iterdir()) == ["cifar10", "near_duplicates.csv"], "nothing else is left"
    for split, colors in COLORS.items():
        images = data.load("small/cifar10", split, data_root=str(root), size=8)
        assert images.ids == tuple(f"a/{i}.jpg" for i in reversed(range(len(colors))))
        assert images.labels.tolist() == [i % 2 for i in reversed(range(len(colors)))] and images.class_names == ("a", "b")
        assert np.abs(images.images[:, :, 4, 4].int().numpy() - np.array(colors[::-1])).max() <= 2
    stored = pq.read_table(root / "cifar10/train-00000-of-00001.parquet")["image"].to_pylist()
    assert stored[1]["bytes"] == picture(COLORS["train"][1]), "bytes are kept as stored"
    with Image.open(io.BytesIO(stored[0]["bytes"])) as gray:
        assert gray.mode == "RGB" and gray.size == (80, 100)
    asked = len(site.asked)
    assert cli.main(["data", "prepare", "small/cifar10", "--root", str(root)]) == 0 and len(site.asked) == asked


REFUSED = {
    "an image is gone": ({"x-1/train/a/1.jpg": None}, "1 are not there or are other pictures, the first a/1.jpg"),
    "another picture": ({"x-1/test/a/0.jpg": picture((60, 60, 60))}, "1 are not there or are other pictures, the first a/0.jpg"),
    "no image at all": ({"x-1/train/a/1.jpg": b"text"}, "expected a readable image x-1/train/a/1.jpg"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_changed_source_is_refused_and_nothing_is_left_in_place(source, tmp_path, capsys, what):
    changed, match = REFUSED[what]
    source(**changed)
    assert cli.main(["data", "prepare", "small/cifar10", "--root", str(tmp_path / "root")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert match in said[-1] and said[-1].startswith("robustvlm: ")
    assert not (tmp_path / "root/cifar10").exists()


def test_a_damaged_archive_is_removed_and_fetched_again(source, site, tmp_path):
    address = f"/someone/pictures/tar.gz/{COMMIT}"
    whole = site.files[address]
    site.files[address] = whole[: len(whole) // 2]
    with pytest.raises(UserError, match=f"expected a whole archive, {COMMIT}.tar.gz is damaged .+; removed it: run again"):
        rebuild.rebuild("small/cifar10", tmp_path / "root")
    site.files[address] = whole
    assert rebuild.rebuild("small/cifar10", tmp_path / "root").is_dir()


def test_a_killed_call_is_gone_on_from(source, site, tmp_path):
    work = tmp_path / "root/.cifar10.unfinished"
    (work / "pack").mkdir(parents=True)
    (work / "pack/train-00000-of-00001.parquet").write_bytes(b"half")
    (work / f"{COMMIT}.tar.gz").write_bytes(site.files[f"/someone/pictures/tar.gz/{COMMIT}"])
    folder = rebuild.rebuild("small/cifar10", tmp_path / "root")
    assert site.asked == [] and len(data.read_rows(folder, "train")[2]) == 3 and not work.exists()


def test_images_are_reduced_and_compressed_as_the_pack_was(source, tmp_path):
    folder = rebuild.rebuild("small/stl10", tmp_path / "root")
    for stored in data.read_rows(folder, "train")[0]:
        with Image.open(io.BytesIO(stored)) as image:
            assert image.format == "JPEG" and image.size == (64, 80)


def test_the_page_says_which_packs_a_chapter_reads():
    """Its table against the profiles `small`."""
    text = (Path(__file__).parents[2] / "book/data_licences.md").read_text(encoding="utf-8")
    told = {}
    for numbers, names in re.findall(r"^\| ([\d, ]+) \| (all eight|`.+`) \|$", text, flags=re.M):
        packs = set(rebuild.FORMS) if names == "all eight" else set(re.findall(r"`(\w+)`", names))
        told |= dict.fromkeys(numbers.split(", "), packs)
    for chapter, entry in chapters().items():
        read = set(re.findall(r"small/(\w+)", str(entry["profiles"].get("small", ""))))
        assert told.get(chapter[:2], set()) == read, chapter


# ---- the committed lists


@pytest.mark.parametrize("short", rebuild.FORMS)
def test_a_committed_list_leads_to_the_committed_evaluation_rows(short):
    """So a rebuilt pack is taken by `data.load(..., n=...)`: its test labels are those that the subsets were drawn from."""
    rows, name = pq.read_table(rebuild.asset("packs", f"{short}.parquet")), f"small/{short}"
    test = [split == PACKS[name].test_split for split in rows["split"].to_pylist()]
    labels = np.array(rows["label"].to_pylist())[test]
    assert labels_sha256(labels) == manifests()[name]["labels_sha256"]
    source = json.loads(rows.schema.metadata[b"source"])
    assert source["repository"].startswith("github.com/") and len(source["commit"]) == 40
    names = json.loads(rows.schema.metadata[b"classes"])["names"]
    assert names == json.loads(rows.schema.metadata[b"class_names"]) and set(rows["label"].to_pylist()) == set(range(len(names)))
    assert set(rows["split"].to_pylist()) == {"train", PACKS[name].test_split}


def test_a_pack_made_from_its_own_images_is_the_pack(data_root, site, monkeypatch, tmp_path):
    """The real list of the smallest pack, and its own images in a repository of another layout: only compression differs."""
    short = "oxford_pets_3class"
    files = {}
    for split in ("train", "test"):
        stored, paths, *_ = data.read_rows(data_root / short, split)
        files |= {f"top/deep/images/{path}": bytes_ for bytes_, path in zip(stored, paths, strict=True)}
    source = json.loads(pq.read_schema(rebuild.asset("packs", f"{short}.parquet")).metadata[b"source"])
    site.files[f"/{source['repository'].removeprefix('github.com/')}/tar.gz/{source['commit']}"] = tar(files)
    monkeypatch.setattr(rebuild, "HOST", site.url)
    rebuild.rebuild(f"small/{short}", tmp_path)
    for split in ("train", "test"):
        ours, theirs = (data.load(f"small/{short}", split, data_root=str(root)) for root in (data_root, tmp_path))
        assert ours.ids == theirs.ids and ours.labels.equal(theirs.labels) and ours.class_names == theirs.class_names
        assert (ours.images.float() - theirs.images.float()).abs().mean() < 2
    assert data.load(f"small/{short}", n=90, data_root=str(tmp_path)).ids == data.load(f"small/{short}", n=90, data_root=str(data_root)).ids
