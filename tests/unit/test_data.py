"""What is measured on: counts, splits without leaks, subsets by seed."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from robustvlm_lite import data, scenes
from robustvlm_lite.data import ImageSet, from_path, load
from robustvlm_lite.data.packs import read_rows
from robustvlm_lite.runtime import UserError, asset, generator

SHORT = {"tiny_imagenet", "cifar10", "cifar100", "stl10", "flowers102", "caltech101", "pacs", "oxford_pets_3class"}


def test_training_pairs_do_not_know_the_names_of_held_out_ones():
    train, test = load("scenes/pair", "train", n=400), load("scenes/pair", n=400)
    assert set(test.class_names) - set(train.class_names) == set(scenes.HELD_OUT_PAIRS)
    drawn = scenes.sample(400, generator(0, "scenes/pair", "train"), task="pair")
    named = [scenes.PAIRS[i] for i in drawn.labels("pair").tolist()]
    assert [train.class_names[i] for i in train.labels.tolist()] == named


def random_set(counts=(7, 5, 9, 6), name="toy") -> ImageSet:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.randint(
        0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    ids = tuple(f"{i}.png" for i in range(len(labels)))
    return ImageSet(name, images, labels, tuple("abcd"), ("a {}",), ids=ids)


def pixels_of(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


# --- the bundled photographs


@pytest.fixture(scope="module")
def caltech():
    return {split: load("photos/caltech", split) for split in ("train", "test")}


def test_caltech_photographs_are_as_many_as_stated(caltech):
    for split, n, each in (("train", 1500, 60), ("test", 500, 20)):
        photos = caltech[split]
        assert photos.images.shape == (n, 3, 64, 64) and photos.images.dtype == torch.uint8
        assert photos.labels.bincount().tolist() == [each] * 25 == [each] * len(photos.class_names)
        assert len(set(photos.ids)) == n and photos.split == split and photos.name == "photos/caltech"
    assert len(set(caltech["test"].class_names)) == 25 and caltech["test"].class_names == caltech["train"].class_names


def test_web_photographs_each_have_a_credit():
    photos = load("photos/web")
    assert photos.images.shape == (139, 3, 64, 64) and len(photos.class_names) == 79
    assert set(photos.labels.tolist()) == set(range(79))
    with open(asset("photos", "web", "attribution.csv")) as f:
        credits = {line["image_id"]: line for line in csv.DictReader(f)}
    assert sorted(credits) == sorted(Path(i).stem for i in photos.ids)
    assert all(
        line["author"] and line["license"].startswith("https://creativecommons.org/licenses/by/2.0")
        for line in credits.values()
    )


def test_no_test_photograph_is_a_training_photograph(caltech):
    train, test, web = (pixels_of(s) for s in (caltech["train"], caltech["test"], load("photos/web")))
    assert len(set(test)) == len(test) and len(set(web)) == len(web)
    assert not set(train) & (set(test) | set(web))


def test_photographs_come_from_the_same_split_of_their_pack(data_root):
    """So the bundled CLIP, which is trained on the train splits, has seen no test photograph."""
    stored = {split: set(read_rows(data_root / "caltech101", split)[0]) for split in ("train", "test")}
    with open(data_root / "near_duplicates.csv") as f:
        copies = {row["train_path"] for row in csv.DictReader(f) if row["train_pack"] == "caltech101"}
    for split, bundled in ((s, read_rows(asset("photos", "caltech"), s)) for s in ("train", "test")):
        assert set(bundled[0]) <= stored[split]
        if split == "train":
            assert not set(bundled[1]) & copies


def test_bundled_photographs_are_small():
    assert sum(f.stat().st_size for f in asset("photos").rglob("*") if f.is_file()) <= 5e6


# --- packs


def test_packs_hold_what_their_readme_counts(data_root):
    if not (data_root / "README.md").is_file():
        pytest.skip(f"no README.md with counts in {data_root}: these packs were made again")
    cells = [[c.strip() for c in line.split("|")] for line in (data_root / "README.md").read_text().splitlines()]
    counted = {(c[1], c[2]): (int(c[3]), c[5]) for c in cells if len(c) > 6 and c[3].isdigit()}
    for (pack, split), (rows, _) in counted.items():
        files = (data_root / pack).glob(f"{split}-*.parquet")
        assert sum(pq.read_metadata(f).num_rows for f in files) == rows, (pack, split)
    assert {f"small/{p}" for p in SHORT} == {n for n in data.PACKS if n.startswith("small/")}
    for short in SHORT:
        n = min(210, counted[short, data.PACKS[f"small/{short}"].test_split][0])
        images = load(f"small/{short}", data_root=str(data_root), n=n)
        held_out = data.PACKS[f"small/{short}"].test_split
        rows, classes = counted[short, held_out]
        assert len(images) == n <= rows and images.images.shape[1:] == (3, 64, 64)
        assert len(images.class_names) == int(classes), short
        present = images.labels.bincount(minlength=int(classes))
        assert present.max() - present.min() <= 1, "balanced"


def test_a_folder_reads_like_the_pack_it_is(data_root):
    own, named = from_path(data_root / "oxford_pets_3class"), load("small/oxford_pets_3class", data_root=str(data_root))
    assert own.sha256 == named.sha256 and own.ids == named.ids and own.templates == named.templates
    assert own.name == "own/oxford_pets_3class"


# --- subsets


def test_a_subset_is_balanced_seeded_and_nested():
    full = random_set()
    for n in (1, 4, 10, 20, 27):
        part = full.balanced(n)
        present = part.labels.bincount(minlength=4)
        room = torch.tensor([7, 5, 9, 6])
        level = max(k for k in range(10) if room.clamp(max=k).sum() <= n)  # to which every class is filled
        assert ((present == room.clamp(max=level)) | (present == room.clamp(max=level + 1))).all()
        assert len(set(part.ids)) == len(part) == n
        for i, name in enumerate(part.ids):
            k = full.ids.index(name)
            assert part.labels[i] == full.labels[k] and torch.equal(part.images[i], full.images[k])
    assert full.balanced(20).ids[:10] == full.balanced(10).ids, "more images of one seed only add some"
    assert full.balanced(10).ids != full.balanced(10, seed=1).ids
    assert full.balanced(10).ids != random_set(name="other").balanced(10).ids
    assert not torch.equal(full.balanced(20).labels, full.balanced(20).labels.sort().values), "shuffled"


def test_a_subset_does_not_depend_on_what_was_drawn_before():
    first = random_set().balanced(9, seed=3).ids
    torch.manual_seed(0)
    random_set().balanced(5, seed=4)
    torch.rand(7)
    assert random_set().balanced(9, seed=3).ids == first


def test_loading_a_subset_is_the_subset_of_the_loaded(caltech):
    assert load("photos/caltech", n=60, seed=5).sha256 == caltech["test"].balanced(60, seed=5).sha256
    assert load("photos/caltech", n=60, seed=6).sha256 != caltech["test"].balanced(60, seed=5).sha256


@pytest.mark.parametrize("n", [-1, 501])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(UserError, match=f"n={n}"):
        load("photos/caltech", n=n)


def test_split_off_is_disjoint_complete_and_seeded():
    full = random_set()
    rest, share = full.split_off(0.2)
    assert len(share) == 5 and not set(rest.ids) & set(share.ids) and set(rest.ids) | set(share.ids) == set(full.ids)
    assert full.split_off(0.2)[1].ids == share.ids != full.split_off(0.2, seed=1)[1].ids


def test_pixels_and_take():
    full = random_set()
    assert torch.equal(full.pixels([2, 0]) * 255, full.images[[2, 0]].float()) and full.pixels().max() <= 1
    masked = ImageSet("m", full.images, full.labels, full.class_names, full.templates, masks=full.images[:, 0] > 99)
    assert torch.equal(masked.take([3, 1]).masks, masked.masks[[3, 1]]) and masked.take([3]).ids == ()


def test_the_hash_moves_with_every_part():
    full = random_set()
    hashes = {full.sha256, full.take(torch.arange(len(full)).flip(0)).sha256}
    pixel, label = full.take(range(len(full))), full.take(range(len(full)))
    assert pixel.sha256 in hashes, "a copy has the same hash"
    pixel, label = full.take(range(len(full))), full.take(range(len(full)))
    pixel.images[4, 2, 7, 7] ^= 1
    label.labels[4] = (label.labels[4] + 1) % 4
    hashes |= {pixel.sha256, label.sha256}
    for names, templates in ((("a", "b", "c", "e"), full.templates), (full.class_names, ("the {}",))):
        hashes.add(ImageSet("toy", full.images, full.labels, names, templates).sha256)
    assert len(hashes) == 6


# --- rendered scenes by name


@pytest.mark.parametrize("task", scenes.TASKS)
def test_scenes_load_by_name(task):
    drawn = load(f"scenes/{task}", n=24)
    assert drawn.images.shape == (24, 3, 64, 64) and drawn.masks.shape == (24, 64, 64) and drawn.masks.any()
    names = [drawn.class_names[y] for y in drawn.labels]
    assert drawn.sha256 == load(f"scenes/{task}", n=24).sha256
    assert (
        len({drawn.sha256, load(f"scenes/{task}", n=24, seed=1).sha256, load(f"scenes/{task}", "train", n=24).sha256})
        == 3
    )
    if task.startswith("pair"):
        assert all((name in scenes.HELD_OUT_PAIRS) == (task == "pair-heldout") for name in names)


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("photos/caltec", {}, "unknown dataset 'photos/caltec'; did you mean 'photos/caltech'"),
        ("scenes/shap", {}, "unknown dataset 'scenes/shap'; did you mean 'scenes/shape'"),
        ("small/cifar10", {}, "'small/cifar10' is not bundled; pass data_root, the folder that holds cifar10/"),
        ("small/cifar10", {"data_root": "/nowhere"}, "expected the folder /nowhere/cifar10 .+ check data_root"),
        ("photos/caltech", {"split": "validation"}, "split 'train' or 'test', got 'validation'"),
        ("photos/web", {"split": "train"}, "train-.+found none"),
    ],
)
def test_what_cannot_be_loaded_says_so(name, options, match):
    with pytest.raises(UserError, match=match) as error:
        load(name, **options)
    assert "\n" not in str(error.value)
