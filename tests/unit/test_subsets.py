"""Which rows are used: committed lists that follow from their rule, balanced few-shot lists, base and new classes."""

import hashlib
import json

import make_subsets
import pytest
import small_sets
import torch

from robustvlm_lite import data
from robustvlm_lite.data import ImageSet, base_and_new, domains, few_shot, leave_out, load, read_rows, subsets
from robustvlm_lite.data.imageset import balanced_rows
from robustvlm_lite.data.packs import PACKS, pack_folder
from robustvlm_lite.data.subsets import (
    FEW_SHOT_SEEDS,
    SHOTS,
    choose_rows,
    evaluation_rows,
    few_shot_rows,
    labels_sha256,
    manifests,
)
from robustvlm_lite.runtime import UserError, asset, profile


def random_labels(counts=(30, 17, 44, 21), seed=0):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


# ---- committed evaluation subsets


@pytest.mark.parametrize("name", [name for name in PACKS if name.startswith("photos/")])
def test_committed_rows_of_bundled_photographs_follow_from_their_rule(name):
    check(name, read_rows(pack_folder(name, ""), "test")[2])


@pytest.mark.parametrize("name", [name for name in PACKS if name.startswith("small/")])
def test_committed_rows_of_packs_follow_from_their_rule(name, data_root):
    check(name, read_rows(pack_folder(name, str(data_root)), PACKS[name].test_split)[2])


def check(name, labels):
    manifest = manifests()[name]
    rows = torch.tensor(manifest["rows"])
    assert manifest["split"] == PACKS[name].test_split and len(rows) == min(1000, len(labels))
    assert torch.equal(rows, balanced_rows(labels, len(rows), 0, name)), "make_subsets.py would write another list"
    digest = hashlib.sha256(",".join(str(int(y)) for y in labels).encode()).hexdigest()
    assert manifest["labels_sha256"] == digest
    for n in (100, 500, len(rows)):
        n = min(n, len(rows))
        assert torch.equal(evaluation_rows(labels, n, name), rows[:n])
        count, most = labels[rows[:n]].bincount(minlength=int(labels.max()) + 1), labels.bincount()
        assert len(set(rows[:n].tolist())) == n
        level = count.max()  # no class may be short of the fullest one but for want of images
        assert ((count >= level - 1) | (count == most)).all()


def test_every_pack_has_a_committed_list():
    assert set(manifests()) >= set(PACKS)


# ---- committed few-shot lists

LISTS = json.loads(asset("few_shot.json").read_text())


@pytest.mark.parametrize("name", LISTS)
def test_committed_shots_are_those_that_are_drawn(name, request):
    root = "" if name.startswith("photos/") else str(request.getfixturevalue("data_root"))
    labels, kept = read_rows(pack_folder(name, root), "train")[2], LISTS[name]
    assert kept["labels_sha256"] == labels_sha256(labels) and list(kept["rows"]) == [str(s) for s in FEW_SHOT_SEEDS]
    for seed in FEW_SHOT_SEEDS:
        rows = torch.tensor(kept["rows"][str(seed)]).view(-1, kept["shots"])
        for shots in [k for k in SHOTS if k <= kept["shots"]]:
            assert torch.equal(few_shot_rows(labels, shots, seed, name), rows[:, :shots].flatten())
        assert (labels[rows] == torch.arange(len(rows))[:, None]).all() and len(rows.unique()) == rows.numel()


def test_every_pack_that_a_chapter_takes_shots_from_has_its_lists():
    pools = {name for chapter in ("05_capt", "06_cba_fapt") for p in ("tiny", "small") for name, _ in profile(chapter, p).train}
    assert {name for name in pools if not name.startswith("scenes/")} <= set(LISTS)


def test_the_script_writes_what_is_here_and_keeps_the_rest(tmp_path, monkeypatch):
    small_sets.class_folders(tmp_path / "full/imagenet_a/imagenet-a", ["n01498041", "n09472597", "n12267677"])
    small_sets.shrink(monkeypatch, "coop/imagenet_a")
    real = make_subsets.asset
    monkeypatch.setattr(make_subsets, "asset", lambda *p: tmp_path / p[0] if p[0].endswith(".json") and len(p) == 1 else real(*p))
    make_subsets.main(["--data-root", str(tmp_path)])
    written, shots = (json.loads((tmp_path / file).read_text()) for file in ("subsets.json", "few_shot.json"))
    assert shots == {name: LISTS[name] for name in LISTS if name.startswith("photos/")}, "of what is here"
    new = written.pop("coop/imagenet_a")
    assert written == manifests()
    assert new["split"] == "test" and sorted(new["rows"]) == list(range(6))
    monkeypatch.setattr(subsets, "manifests", lambda: {"coop/imagenet_a": new | {"rows": new["rows"][::-1]}})
    images = load("coop/imagenet_a", data_root=str(tmp_path), size=8, n=6)
    whole = load("coop/imagenet_a", data_root=str(tmp_path), size=8)
    assert images.ids == tuple(whole.ids[row] for row in new["rows"][::-1]), "the list, not the rule, is what counts"


def test_loading_a_subset_takes_the_committed_rows():
    whole, part = load("photos/caltech"), load("photos/caltech", n=120)
    assert part.ids == tuple(whole.ids[row] for row in manifests()["photos/caltech"]["rows"][:120])


def test_a_list_knows_that_the_labels_are_of_another_version():
    labels = read_rows(pack_folder("photos/caltech", ""), "test")[2].roll(1)
    with pytest.raises(UserError, match="labels of photos/caltech with SHA-256 .+another version of these files"):
        choose_rows(labels, "photos/caltech", "test", n=10)
    assert len(choose_rows(labels, "photos/caltech", "test", n=10, seed=1)) == 10, "other seeds need no list"
    assert len(choose_rows(labels, "photos/caltech", "train", n=10)) == 10


def test_the_hash_of_labels_moves_with_order_and_length():
    labels = random_labels()
    hashes = {
        labels_sha256(labels),
        labels_sha256(labels[:-1]),
        labels_sha256(labels.flip(0)),
        labels_sha256(labels + 1),
    }
    assert len(hashes) == 4 and labels_sha256(torch.tensor([1, 11])) != labels_sha256(torch.tensor([11, 1]))


# ---- few shots


@pytest.mark.parametrize("seed", FEW_SHOT_SEEDS)
def test_few_shots_are_balanced_nested_and_of_their_class(seed):
    labels = random_labels()
    before = {}
    for shots in SHOTS:
        rows = few_shot_rows(labels, shots, seed, "toy")
        assert labels[rows].tolist() == [c for c in range(4) for _ in range(shots)]
        assert len(set(rows.tolist())) == 4 * shots
        for c in range(4):
            mine = rows[labels[rows] == c].tolist()
            assert mine[: len(before.get(c, []))] == before.get(c, []), "more shots only add images"
            before[c] = mine


def test_few_shots_depend_on_seed_name_and_nothing_else():
    labels = random_labels()
    first = few_shot_rows(labels, 4, 1, "toy")
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(few_shot_rows(labels, 4, 1, "toy"), first)
    others = [few_shot_rows(labels, 4, 2, "toy"), few_shot_rows(labels, 4, 1, "boy")]
    assert all(not torch.equal(first, other) for other in others)


def test_few_shots_are_the_same_on_every_machine():
    """Written down once: a change of the drawing would silently change every few-shot result."""
    assert few_shot_rows(torch.arange(3).repeat(20), 2, 1, "toy").tolist() == [42, 36, 13, 49, 50, 47]


def test_every_image_is_drawn_as_often_as_any_other():
    labels = torch.zeros(20, dtype=torch.int64)
    drawn = torch.cat([few_shot_rows(labels, 5, seed, "toy") for seed in range(400)]).bincount(minlength=20)
    assert drawn.sum() == 2000 and ((drawn - 100).abs() < 45).all()  # 5 standard deviations


@pytest.mark.parametrize("shots", [0, 22, -1])
def test_impossible_shots_are_refused(shots):
    with pytest.raises(UserError, match=f"shots of class . of toy, got {shots}; ask for fewer"):
        few_shot_rows(random_labels((30, 21)), shots, 1, "toy")


def test_few_shot_sets_load_without_a_test_photograph():
    test = set(load("photos/caltech").ids)
    whole = load("photos/caltech", "train")
    for seed in FEW_SHOT_SEEDS:
        few = load("photos/caltech", "train", shots=16, seed=seed)
        assert few.labels.bincount().tolist() == [16] * 25 and not set(few.ids) & test
        assert few.class_names == whole.class_names
        k = whole.ids.index(few.ids[7])
        assert torch.equal(few.images[7], whole.images[k]) and few.labels[7] == whole.labels[k]
    drawn = load("scenes/shape", "train", shots=4, seed=1)
    assert set(drawn.labels.bincount().tolist()) == {4}


def test_few_shots_of_packs_hold_no_test_image(data_root):
    for name in ("small/oxford_pets_3class", "small/pacs"):
        test = {image.tobytes() for image in load(name, data_root=str(data_root)).images.numpy()}
        few = load(name, "train", data_root=str(data_root), shots=16, seed=1)
        assert not {image.tobytes() for image in few.images.numpy()} & test


def test_a_subset_and_shots_are_not_asked_together():
    with pytest.raises(UserError, match="n or shots of photos/caltech, got both"):
        load("photos/caltech", "train", n=10, shots=2)
    with pytest.raises(UserError, match="shots=-1"):
        load("photos/caltech", "train", shots=-1)


# ---- base and new classes


@pytest.mark.parametrize("names", ["abcd", "abcde"])
def test_base_and_new_part_the_classes_in_label_order(names):
    labels = random_labels((6,) * len(names))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    ids = tuple(map(str, range(len(labels))))
    base, new = base_and_new(ImageSet("toy", images, labels, tuple(names), ("a {}",), ids=ids))
    half = {4: 2, 5: 3}[len(names)]
    assert base.class_names == tuple(names[:half]) and new.class_names == tuple(names[half:])
    assert set(base.ids).isdisjoint(new.ids) and len(base) + len(new) == len(labels)
    for part in (base, new):
        assert [part.class_names[y] for y in part.labels] == [names[labels[int(i)]] for i in part.ids]
        assert part.images[:, 0, 0, 0].tolist() == [int(i) for i in part.ids]
        assert set(part.labels.tolist()) == set(range(len(part.class_names)))


def test_few_shots_come_before_the_halves():
    """CoOp draws once and then parts: the base half of 16 shots is part of the whole's 16 shots."""
    few = load("photos/caltech", "train", shots=8, seed=2)
    base, new = base_and_new(few)
    assert len(base) == 13 * 8 and len(new) == 12 * 8 and data.base_and_new is base_and_new
    assert base.ids + new.ids == few.ids


# ---- domains


def with_domains():
    labels = torch.arange(24) % 2
    ids = tuple(f"{('photo', 'sketch', 'art_painting')[i % 3]}/{i}.jpg" for i in range(24))
    return ImageSet("toy", torch.zeros(24, 3, 2, 2, dtype=torch.uint8), labels, ("a", "b"), ("a {}",), ids=ids)


def test_a_domain_is_left_out_whole():
    images = with_domains()
    assert domains(images) == ("art_painting", "photo", "sketch")
    others, held_out = leave_out(images, "photo")
    assert len(held_out) == 8 and all(name.startswith("photo/") for name in held_out.ids)
    assert len(others) == 16 and set(others.ids) | set(held_out.ids) == set(images.ids)
    assert [images.labels[images.ids.index(name)] for name in held_out.ids] == held_out.labels.tolist()


def test_unknown_and_absent_domains_are_refused():
    with pytest.raises(UserError, match="unknown domain 'photos' of toy; did you mean 'photo'"):
        leave_out(with_domains(), "photos")
    with pytest.raises(UserError, match="expected at least 2 domains with several classes each in photos/caltech"):
        domains(load("photos/caltech"))


def test_pacs_has_its_four_domains(data_root):
    test = load("small/pacs", data_root=str(data_root))
    assert domains(test) == ("art_painting", "cartoon", "photo", "sketch")
    assert len(leave_out(test, "sketch")[1]) == 140


def test_shots_of_a_set_at_hand_are_those_of_load():
    whole = load("photos/caltech", "train")
    assert few_shot(whole, 4, 2).ids == load("photos/caltech", "train", shots=4, seed=2).ids
    assert few_shot(whole, 0, 2) is whole
