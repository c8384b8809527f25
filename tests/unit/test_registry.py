"""The registry's facts against independent sources: torchvision's own constants and lists, timm's WordNet ids, the papers."""

import inspect
import json
import pkgutil

import pytest
import torchvision.datasets
from timm.data import ImageNetInfo
from torchvision.datasets import CIFAR10, Flowers102

from robustvlm_lite import data
from robustvlm_lite.data import classnames
from robustvlm_lite.data.classnames import prompt_names
from robustvlm_lite.data.registry import CLASSIFICATION, datasets, find, find_use, uses
from robustvlm_lite.runtime import UserError

TGA_ZSR = (  # test images and classes, as the paper's tables were computed on
    ("tiny_imagenet", 10000, 200),
    ("cifar10", 10000, 10),
    ("cifar100", 10000, 100),
    ("stl10", 8000, 10),
    ("sun397", 108754, 397),
    ("food101", 25250, 101),
    ("oxford_pets", 3669, 37),
    ("flowers102", 6149, 102),
    ("dtd", 1880, 47),
    ("eurosat", 27000, 10),
    ("fgvc_aircraft", 3333, 100),
    ("imagenet", 50000, 1000),
    ("caltech101", 8677, 101),
    ("caltech256", 30607, 257),
    ("stanford_cars", 8041, 196),
    ("pcam", 32768, 2),
)
COOP = (  # train, validation, test, classes of CoOp's splits
    ("caltech101", 4128, 1649, 2465, 100),
    ("oxford_pets", 2944, 736, 3669, 37),
    ("stanford_cars", 6509, 1635, 8041, 196),
    ("flowers102", 4093, 1633, 2463, 102),
    ("food101", 50500, 20200, 30300, 101),
    ("fgvc_aircraft", 3334, 3333, 3333, 100),
    ("sun397", 15880, 3970, 19850, 397),
    ("dtd", 2820, 1128, 1692, 47),
    ("eurosat", 13500, 5400, 8100, 10),
    ("ucf101", 7639, 1898, 3783, 101),
)
SHIFTS = {"imagenet_v2": 10000, "imagenet_sketch": 50889, "imagenet_a": 7500, "imagenet_r": 30000}


def test_every_data_set_of_the_papers_is_there():
    tga = {name: d.uses["tga_zsr"] for name, d in datasets().items() if "tga_zsr" in d.uses}
    assert {(name, use.splits["test"]["n"], use.classes) for name, use in tga.items()} == set(TGA_ZSR)
    assert sum(n for _, n, _ in TGA_ZSR) == 344128, "the papers' total"
    coop = {name: d.uses["coop"] for name, d in datasets().items() if "coop" in d.uses}
    for name, train, val, test, classes in COOP:
        use = coop.pop(name)
        assert [use.splits[s]["n"] for s in ("train", "val", "test")] == [train, val, test], name
        assert use.classes == classes
    assert {name: use.splits["test"]["n"] for name, use in coop.items()} == SHIFTS | {"imagenet": 50000}
    others = {name: d.task for name, d in datasets().items() if d.task != CLASSIFICATION}
    assert sorted(others) == ["coco_captions", "flickr30k", "flickr8k", "visual_genome_qa", "vqav2"]
    assert set(uses()) < set(data.names())


@pytest.mark.parametrize("name", datasets())
def test_an_entry_is_complete(name):
    dataset = datasets()[name]
    assert dataset.title and dataset.licence and dataset.obtain
    assert all(set(d) <= {"url", "md5", "into", "inner"} for d in dataset.downloads)
    assert all(d["url"].startswith("http") and len(d.get("md5", "0" * 32)) == 32 for d in dataset.downloads)
    assert (dataset.task == CLASSIFICATION) == bool(dataset.uses)
    for use in dataset.uses.values():
        assert use.naming in classnames.RULES and use.source in ("torchvision", "split_file", "folder", "parquet")
        assert use.templates and all(t.count("{}") == 1 for t in use.templates)
        if dataset.names:
            assert len(dataset.names) == use.classes == len(set(dataset.names.values()))
        if use.source == "torchvision":
            parameters = inspect.signature(getattr(torchvision.datasets, use.options["class"])).parameters
            asked = {key for split in use.splits.values() for key in split} - {"n", "parquet"}
            assert asked <= set(parameters)


@pytest.mark.parametrize(
    "dataset", [d for d in datasets().values() if any(u.source == "torchvision" for u in d.uses.values())]
)
def test_addresses_and_checksums_are_those_that_torchvision_publishes(dataset):
    use = next(u for u in dataset.uses.values() if u.source == "torchvision")
    source = inspect.getsource(inspect.getmodule(getattr(torchvision.datasets, use.options["class"])))
    for download in dataset.downloads:
        assert download["url"].rpartition("/")[2] in source and download["url"].split("/")[2] in source
        assert download.get("md5", "") in source
        assert "md5" in download or "md5" not in source.lower(), "torchvision publishes one: state it"


def test_class_lists_agree_with_lists_of_others():
    flowers = [classnames._same(name) for name in datasets()["flowers102"].names]
    assert flowers == [classnames._same(name) for name in Flowers102.classes]
    for name in ("food101", "dtd", "oxford_pets", "cifar10", "cifar100", "stl10", "eurosat"):
        keys = [key.replace(" ", "_") for key in datasets()[name].names]
        assert keys == sorted(keys), f"{name}: labels follow the sorted folder names"
    assert CIFAR10.meta["key"] == "label_names" and len(datasets()["cifar10"].names) == 10


def test_packs_and_registry_name_the_same_classes(data_root):
    def stored(pack, field="names"):
        return json.loads((data_root / pack / "classes.json").read_text())[field]

    assert list(datasets()["cifar10"].names) == stored("cifar10")
    assert list(datasets()["cifar100"].names) == stored("cifar100")
    assert list(datasets()["stl10"].names) == stored("stl10")
    assert list(datasets()["oxford_pets"].names) == [n.lower() for n in stored("oxford_pets_3class", "all_37_names")]


# ---- from keys to names


def use_of(name):
    dataset, use = find_use(name)
    return lambda keys, **more: prompt_names(dataset, use, keys, "here", **more)


def test_keys_become_names_in_the_order_of_the_data():
    keys = list(datasets()["eurosat"].names)
    named = use_of("tga_zsr/eurosat")(keys[::-1])
    assert named[0] == "a sea or a lake" and named[-1] == "annual crop land" and len(named) == 10
    food = [key.replace(" ", "_") for key in datasets()["food101"].names][::-1]
    assert use_of("coop/food101")(food)[:2] == ("waffles", "tuna tartare")
    assert use_of("tga_zsr/stl10")(()) == tuple(datasets()["stl10"].names), "data without names: by position"
    assert use_of("coop/eurosat")([f"Land {i}" for i in range(10)], named=True)[3] == "Land 3"


@pytest.mark.parametrize(
    "rule, key, name",
    [
        ("", "apartment_building/outdoor", "apartment building outdoor"),
        ("", "Faces_easy", "faces easy"),
        ("as_is", "707-320", "707-320"),
        ("boeing", "737-700", "boeing 737 700"),
        ("boeing", "A380", "a380"),
        ("no_year", "Audi TT Hatchback 2011", "audi tt hatchback"),
        ("numbered", "251.airplanes-101", "airplanes"),
        ("numbered", "257.clutter", "clutter"),
        ("lemma", "n01440764", "tench"),
        ("cleaned", "n01440764", "tench"),
        ("cleaned", "837", "sunglasses"),
    ],
)
def test_naming_rules(rule, key, name):
    assert classnames.RULES[rule]([key]) == [name]


def test_imagenet_names_follow_the_ids_not_the_order():
    ids = pkgutil.get_data("timm.data", "_info/imagenet_a_synsets.txt").decode().split()
    names = dict(zip(ids, use_of("coop/imagenet_a")(ids[::-1])[::-1], strict=True))
    assert names["n01498041"] == "stingray" and names["n09472597"] == "volcano" and len(set(names.values())) == 200
    v2 = use_of("coop/imagenet_v2")([str(i) for i in range(1000)])
    assert v2 == use_of("coop/imagenet")(ImageNetInfo().label_names()) and v2[:2] == ("tench", "goldfish")
    texts = ImageNetInfo().label_descriptions()
    texts[517] = "crane2"  # as one copy tells the machine from the bird
    assert use_of("coop/imagenet")(texts) == v2
    with pytest.raises(UserError, match="WordNet ids as classes"):
        use_of("coop/imagenet")(texts[::-1])
    assert v2.count("missile") == 2, "a known pair of equal names"


@pytest.mark.parametrize(
    "name, keys, match",
    [
        ("tga_zsr/cifar10", ["cat", "dog"], "expected 10 classes of CIFAR-10, got 2 in here; fetch"),
        ("tga_zsr/cifar10", [*"abcdefghi", "cat"], "expected the classes of CIFAR-10, got 'a' in here"),
        (
            "coop/imagenet_a",
            [f"n{i}" for i in range(200)],
            "WordNet ids as classes, got 'n0' in here; name the folders",
        ),
    ],
)
def test_other_class_lists_are_refused(name, keys, match):
    with pytest.raises(UserError, match=match):
        use_of(name)(keys)


def test_names_that_do_not_exist_are_answered_with_a_near_miss():
    assert find("coop/food101") is find("food101") is datasets()["food101"]
    for function, name, near in (
        (find, "food10", "food101"),
        (find_use, "coop/food10", "coop/food101"),
        (find_use, "food101", "food101"),
    ):
        with pytest.raises(UserError, match=f"unknown dataset '{name}'; did you mean '.*{near}'"):
            function(name)
