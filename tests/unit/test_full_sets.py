"""Full-size sets from disk, on a few images in each original layout: every image keeps its own class name."""

import io
import json

import numpy as np
import pytest
import small_sets
import torch
from PIL import Image
from small_sets import LEVELS, TORCHVISION, coop_pets, flat, put, shrink, write_parquet
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from robustvlm_lite import runner
from robustvlm_lite.data import load, uses
from robustvlm_lite.data.classnames import RULES
from robustvlm_lite.data.registry import find_use
from robustvlm_lite.practitioner import read_images
from robustvlm_lite.runtime import UserError


def agree(images, names_by_level):
    """Each image's red level belongs to the name of its label."""
    shown = [images.class_names[y] for y in images.labels.tolist()]
    assert shown == [names_by_level[int(image[0, 0, 0])] for image in images.images]
    assert (images.images[:, 1:] == 0).all() and images.images.dtype == torch.uint8


@pytest.mark.parametrize("short", TORCHVISION)
def test_torchvision_layouts(short, tmp_path, monkeypatch):
    keys = TORCHVISION[short](tmp_path / "full" / short, monkeypatch)
    name = f"tga_zsr/{short}"
    shrink(monkeypatch, name, keys)
    dataset, use = find_use(name)
    folded = {"".join(filter(str.isalnum, k.lower())): v for k, v in dataset.names.items()}
    expected = {
        red: folded.get("".join(filter(str.isalnum, key.lower()))) or RULES[use.naming]([key])[0]
        for key, red in keys.items()
    }
    images = load(name, data_root=str(tmp_path), size=16)
    assert images.images.shape == (6, 3, 16, 16) and images.name == name and images.templates == use.templates
    agree(images, expected)
    assert len(set(images.ids)) == 6 and images.labels.bincount().tolist() == [2, 2, 2]
    two = load(name, data_root=str(tmp_path), size=16, n=4, seed=3)
    assert two.ids == images.balanced(4, seed=3).ids and torch.equal(two.images, images.balanced(4, seed=3).images)
    if "train" in use.splits and short != "stanford_cars":
        agree(load(name, "train", data_root=str(tmp_path), size=8), expected)


def test_files_are_taken_in_the_order_of_their_paths(tmp_path, monkeypatch):
    small_sets.sun397(tmp_path / "full/sun397", monkeypatch)
    shrink(monkeypatch, "tga_zsr/sun397")
    ids = load("tga_zsr/sun397", data_root=str(tmp_path), size=8).ids
    assert list(ids) == sorted(ids) and ids[0] == "SUN397/a/abbey/sun_1.jpg"


@pytest.mark.parametrize("name, bicubic, short", [("tga_zsr/food101", False, 32), ("coop/food101", True, 28)])
def test_images_are_resized_as_the_papers_do(name, bicubic, short, tmp_path, monkeypatch):
    keys = small_sets.food101(tmp_path / "full/food101", monkeypatch)
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    put(tmp_path / "full/food101/food-101/images/sushi/1.jpg", buffer.getvalue())
    rows = [[f"{key}/{i}.jpg", c, key] for c, key in enumerate(keys) for i in (1, 2)]
    put(tmp_path / "full/food101/split_zhou_Food101.json", json.dumps({"test": rows}))
    shrink(monkeypatch, name, keys)
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    expected = center_crop(resize(image, [short, round(60 * short / 50)], mode), [28, 28])
    images = load(name, data_root=str(tmp_path), size=28)
    shown = images.images[images.ids.index(next(i for i in images.ids if i.endswith("sushi/1.jpg")))]
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), np.asarray(expected))


# ---- class folders


def test_imagenet_folders_and_ids(tmp_path, monkeypatch):
    ids = ["n01443537", "n01440764", "n02123045"]
    for name, folder in (("coop/imagenet", "val"), ("coop/imagenet_r", "imagenet-r"), ("tga_zsr/imagenet", "val")):
        short = name.split("/")[1]
        small_sets.class_folders(tmp_path / "full" / short / folder, ids, "{i}.JPEG")
        shrink(monkeypatch, name)
        expected = dict(zip(LEVELS, ("goldfish", "tench", "tabby cat"), strict=True))
        if name.startswith("tga"):
            expected[LEVELS[2]] = "tabby"
        agree(load(name, data_root=str(tmp_path), size=8), expected)


def test_numbered_folders_are_labels_not_strings(tmp_path, monkeypatch):
    small_sets.class_folders(
        tmp_path / "full/imagenet_v2/imagenetv2-matched-frequency-format-val", ["0", "10", "2"], "{i}.jpeg"
    )
    shrink(monkeypatch, "coop/imagenet_v2")
    images = load("coop/imagenet_v2", data_root=str(tmp_path), size=8)
    assert images.class_names == ("tench", "great white shark", "brambling")
    agree(images, {LEVELS[0]: "tench", LEVELS[1]: "brambling", LEVELS[2]: "great white shark"})


def test_tiny_imagenet_by_its_list_of_annotations(tmp_path, monkeypatch):
    base = tmp_path / "full/tiny_imagenet/tiny-imagenet-200"
    ids = ("n01443537", "n01629819", "n02123394")
    for i in range(6):
        put(base / f"val/images/val_{i}.JPEG", flat(LEVELS[i % 3]))
    put(
        base / "val/val_annotations.txt",
        "".join(f"val_{i}.JPEG\t{ids[i % 3]}\t0\t0\t9\t9\n" for i in (4, 1, 5, 0, 3, 2)),
    )
    small_sets.class_folders(base / "train", [f"{i}/images" for i in ids])
    shrink(monkeypatch, "tga_zsr/tiny_imagenet")
    expected = dict(zip(LEVELS, ("goldfish", "european fire salamander", "persian cat"), strict=True))
    test = load("tga_zsr/tiny_imagenet", data_root=str(tmp_path), size=8)
    agree(test, expected)
    train = load("tga_zsr/tiny_imagenet", "train", data_root=str(tmp_path), size=8)
    agree(train, expected)
    assert test.class_names == train.class_names


def test_a_broken_list_of_annotations_names_its_row(tmp_path, monkeypatch):
    put(tmp_path / "full/tiny_imagenet/tiny-imagenet-200/val/val_annotations.txt", "a.JPEG\tn01443537\nb.JPEG\n")
    with pytest.raises(UserError, match="in row 1 of .+val_annotations.txt, got .'b.JPEG'.; fetch it again"):
        load("tga_zsr/tiny_imagenet", data_root=str(tmp_path), size=8)


# ---- CoOp's split files


def test_split_files(tmp_path, monkeypatch):
    coop_pets(tmp_path)
    shrink(monkeypatch, "coop/oxford_pets")
    expected = dict(zip(LEVELS, ("abyssinian", "american bulldog", "bengal"), strict=True))
    for split in ("train", "val", "test"):
        agree(load("coop/oxford_pets", split, data_root=str(tmp_path), size=8), expected)
    one = load("coop/oxford_pets", "train", data_root=str(tmp_path), size=8, shots=1, seed=2)
    assert one.labels.tolist() == [0, 1, 2]
    agree(one, expected)


# ---- Parquet


def test_parquet_goes_before_the_other_layouts(tmp_path, monkeypatch):
    folder = tmp_path / "full/cifar100"
    names = ["sea", "road", "plain"]  # in another order than the registry's
    rows = [(flat(LEVELS[i % 3]), i % 3) for i in range(5)]
    columns = ("img", "fine_label")
    write_parquet(folder, "test", rows[:4], names, columns, "00000-of-00002", coarse_label=[0] * 4)
    write_parquet(folder, "test", rows[4:], names, columns, "00001-of-00002", coarse_label=[0])
    shrink(monkeypatch, "tga_zsr/cifar100", names, n=5)
    images = load("tga_zsr/cifar100", data_root=str(tmp_path), size=8)
    assert images.class_names == ("sea", "road", "plain")
    agree(images, dict(zip(LEVELS, names, strict=True)))
    assert images.ids == ("000000", "000001", "000002", "000003", "000004")


def test_parquet_without_names_takes_the_registry_s_by_position(tmp_path, monkeypatch):
    write_parquet(tmp_path / "full/pcam", "test", [(flat(40), 0), (flat(120), 1)])
    shrink(monkeypatch, "tga_zsr/pcam", n=2, classes=2)
    images = load("tga_zsr/pcam", data_root=str(tmp_path), size=8)
    agree(images, {40: "healthy lymph node tissue", 120: "lymph node tumor tissue"})


# ---- what is refused


def spoiled_parquet(**change):
    def make(root):
        rows = [(flat(40), 0), (change.get("image", flat(120)), change.get("label", 1))] * 3
        names = change.get("names", ["abyssinian", "bengal", "sphynx"])
        write_parquet(root / "full/oxford_pets", "test", rows, names, change.get("columns", ("image", "label")))

    return make


def spoiled_list(change):
    return lambda root: coop_pets(root, change)


def edit(row, value):
    def change(split):
        split["test"][row] = value
        return split

    return change


def lose(root):
    (coop_pets(root) / "oxford-iiit-pet/images/bengal_1.jpg").unlink()


def spoil(root):
    put(coop_pets(root) / "oxford-iiit-pet/images/bengal_1.jpg", b"no image")


REFUSED = {
    "no folder": (lambda root: None, "Oxford-IIIT Pet in .+ found none; robustvlm data prepare oxford_pets --root DIR"),
    "no images": (
        lambda root: put(root / "full/oxford_pets/x", b""),
        "expected oxford-iiit-pet/images of Oxford-IIIT Pet in .+ found none",
    ),
    "no list": (
        lambda root: (coop_pets(root) / "split_zhou_OxfordPets.json").unlink(),
        "expected split_zhou_OxfordPets.json of Oxford-IIIT Pet in .+ found none; CoOp's data page links it",
    ),
    "list of another form": (spoiled_list(lambda split: [1, 2]), "in .+split_zhou_OxfordPets.json, got"),
    "row of another form": (spoiled_list(edit(1, ["a.jpg"])), "in .+split_zhou_OxfordPets.json, got ValueError"),
    "missing image": (lose, "image .+bengal_1.jpg, row 1 of test in split_zhou_OxfordPets.json, found none"),
    "undecodable image": (spoil, "8 bytes at .+bengal_1.jpg, row 1 of test in split_zhou_OxfordPets.json .no known"),
    "label out of range": (
        spoiled_list(edit(2, ["bengal_1.jpg", -1, "x"])),
        "labels in 0..2 in .+ got -1 to 2 .first at .+bengal_1.jpg, row 2 of test",
    ),
    "another class list": (spoiled_list(edit(2, ["bengal_1.jpg", 3, "x"])), "labels in 0..2 .+row 2 of test"),
    "fewer rows": (
        spoiled_list(lambda s: s | {"test": s["test"][:5]}),
        "expected 6 test images of Oxford-IIIT Pet in .+, got 5",
    ),
    "fewer classes": (
        spoiled_list(
            lambda s: (
                {k: [r for r in rows if r[1] < 2] * 2 for k, rows in s.items()}
                | {"test": s["test"][2:] + s["test"][2:4]}
            )
        ),
        "expected 3 classes of Oxford-IIIT Pet, got 2",
    ),
    "undecodable image in Parquet": (spoiled_parquet(image=b"?"), "1 bytes at .+ row 1 of test-00000-of-00001.parquet"),
    "no image in Parquet": (spoiled_parquet(image=None), "0 bytes at .+ row 1 of test-00000-of-00001.parquet"),
    "label out of range in Parquet": (spoiled_parquet(label=3), "got 0 to 3 .first at .+row 1 of test-00000"),
    "Parquet without a label": (spoiled_parquet(columns=("image", "y"), names=None), "and a label column in"),
    "another name in Parquet": (
        spoiled_parquet(names=["abyssinian", "bengal", "wolf"]),
        "expected the classes of Oxford-IIIT Pet, got 'wolf'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_file_and_row(what, tmp_path, monkeypatch):
    make, match = REFUSED[what]
    make(tmp_path)
    shrink(monkeypatch, "coop/oxford_pets")
    with pytest.raises(UserError, match=match) as error:
        load("coop/oxford_pets", data_root=str(tmp_path), size=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("short", ["cifar10", "stanford_cars", "food101"])
def test_a_layout_that_torchvision_does_not_know_is_one_line(short, tmp_path):
    (tmp_path / "full" / short / "other").mkdir(parents=True)
    with pytest.raises(
        UserError, match="expected the layout of torchvision's .+, got: .*; fetch the files again"
    ) as error:
        load(f"tga_zsr/{short}", data_root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_image_that_torchvision_lists_and_nobody_has(tmp_path, monkeypatch):
    keys = small_sets.food101(tmp_path / "full/food101", monkeypatch)
    shrink(monkeypatch, "tga_zsr/food101", keys)
    put(tmp_path / "full/food101/food-101/images/sushi/2.jpg", b"no image")
    with pytest.raises(UserError, match="got .+food-101/images/sushi/2.jpg, row 1 of torchvision's Food101 .no known"):
        load("tga_zsr/food101", data_root=str(tmp_path), size=8)
    (tmp_path / "full/food101/food-101/images/sushi/2.jpg").unlink()
    with pytest.raises(UserError, match="expected the image .+sushi/2.jpg, row 1 of torchvision's Food101, found none"):
        load("tga_zsr/food101", data_root=str(tmp_path), size=8)


def test_an_unprepared_set_and_a_split_that_it_lacks(tmp_path):
    for name, options, match in (
        ("coop/food101", {}, "pass data_root, the folder that holds full/food101/"),
        ("coop/imagenet_a", {"split": "train", "data_root": str(tmp_path)}, "expected split 'test' of coop/imagenet_a"),
        ("coop/imagenet", {"data_root": str(tmp_path)}, "obtain it: register at"),
        ("coop/food10", {}, "unknown dataset 'coop/food10'; did you mean 'coop/food101'"),
        ("flickr8k", {}, "unknown dataset 'flickr8k'"),
    ):
        with pytest.raises(UserError, match=match):
            load(name, **options)


def test_the_practitioner_s_door_decodes_no_more_than_is_asked(tmp_path, monkeypatch):
    keys = small_sets.food101(tmp_path / "full/food101", monkeypatch)
    shrink(monkeypatch, "tga_zsr/food101", keys)
    whole = load("tga_zsr/food101", data_root=str(tmp_path), size=8)
    for n, expected in ((None, 6), (3, 3)):
        images = read_images("tga_zsr/food101", data_root=str(tmp_path), size=8, n=n, seed=4)
        assert images.ids == whole.balanced(expected, seed=4).ids


def test_a_profile_that_names_a_full_set_asks_for_it_before_it_runs(tmp_path):
    profile = {"train": [["tga_zsr/tiny_imagenet", 0]], "unseen": [["coop/food101", 9], ["photos/web", 9]]}
    assert list(runner._data_sets(profile)) == ["tga_zsr/tiny_imagenet", "coop/food101"]
    assert {name.partition("/")[0] for name in uses()} == {"tga_zsr", "coop"}
