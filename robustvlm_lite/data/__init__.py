"""Datasets by name: rendered scenes, bundled photographs, 64-pixel packs, the papers' full sets, and the reader's own images."""

import torch

from .. import scenes
from ..runtime import UserError, generator, near_miss
from .classnames import prompt_names
from .folder import from_path
from .imageset import ImageSet
from .packs import PACKS, PHOTO, Pack, pack_folder, read_pack, read_rows
from .registry import find_use, uses
from .sources import check_there, read_listing
from .subsets import FEW_SHOT_SEEDS, SHOTS, base_and_new, choose_rows, domains, few_shot, leave_out

__all__ = [
    "FEW_SHOT_SEEDS",
    "PACKS",
    "PHOTO",
    "SHOTS",
    "ImageSet",
    "Pack",
    "base_and_new",
    "domains",
    "few_shot",
    "find_use",
    "from_path",
    "leave_out",
    "load",
    "names",
    "pack_folder",
    "read_rows",
    "require",
    "uses",
]

SCENE_TEST_SIZE = 1000  # rendered test images of a task when no size is asked


def names() -> tuple[str, ...]:
    """Every dataset name that `load` takes."""
    return tuple(f"scenes/{task}" for task in scenes.TASKS) + tuple(PACKS) + uses()


def load(
    name: str, split: str = "test", *, data_root: str = "", size: int = 64, n: int = 0, shots: int = 0, seed: int = 0
) -> ImageSet:
    """A named dataset, `size` pixels a side.

    n > 0 asks for a seeded, class-balanced subset, shots > 0 for as many images of every class. split: "train" or "test"
    (for Tiny-ImageNet the held-out split is its validation split); a full-size set may have "val" too. The training split
    of scenes/pair knows the names of the pairs that it shows and no other.
    """
    if n < 0 or shots < 0:
        raise UserError(f"expected n >= 0 and shots >= 0 of {name}, got n={n}, shots={shots}; 0 takes the whole split")
    group, _, task = name.partition("/")
    if group in {use.partition("/")[0] for use in uses()}:
        return _full(name, split, data_root, size, n, shots, seed)
    if split not in ("train", "test"):
        raise UserError(f"expected split 'train' or 'test', got {split!r}")
    if group == "scenes":
        drawn = _render(name, task, split, size, n or SCENE_TEST_SIZE, seed)
        return drawn.take(choose_rows(drawn.labels, name, split, shots=shots, seed=seed)) if shots else drawn
    folder = pack_folder(name, data_root)
    pack = PACKS[name]
    stored = pack.test_split if split == "test" else "train"
    return read_pack(folder, stored, name=name, templates=pack.templates, size=size, n=n, shots=shots, seed=seed)


def require(name: str, data_root: str) -> None:
    """Refuse a dataset that is not bundled and whose files are not below `data_root`, before anything is computed."""
    if name not in uses():
        pack_folder(name, data_root)
        return
    dataset, use = find_use(name)
    if not data_root:
        raise UserError(f"dataset {name!r} is not bundled; pass data_root, the folder that holds full/{dataset.name}/")
    check_there(dataset, use, data_root)


def _full(name: str, split: str, data_root: str, size: int, n: int, shots: int, seed: int) -> ImageSet:
    dataset, use = find_use(name)
    if split not in use.splits:
        known = " or ".join(map(repr, use.splits))
        raise UserError(f"expected split {known} of {name}, got {split!r}")
    require(name, data_root)
    listing = read_listing(dataset, use, split, data_root)
    class_names = prompt_names(dataset, use, listing.keys, dataset.folder(data_root), listing.named)
    rows = choose_rows(listing.labels, name, split, n=n, shots=shots, seed=seed)
    ids = tuple(listing.ids[row] for row in rows.tolist())
    images = listing.images(rows, size, use.zoom, use.bicubic)
    return ImageSet(name, images, listing.labels[rows], class_names, use.templates, split, ids=ids)


def _render(name: str, task: str, split: str, size: int, n: int, seed: int) -> ImageSet:
    if task not in scenes.TASKS:
        raise UserError(f"unknown dataset {name!r}; {near_miss(name, names())}")
    class_names, templates = scenes.TASKS[task]
    drawn = scenes.sample(n, generator(seed, name, split), task=task, size=size)
    labels = drawn.labels(task)
    if split == "train" and task == "pair":  # as wrong answers in training, held-out pairs would be pushed down
        seen = [i for i, pair in enumerate(class_names) if pair not in scenes.HELD_OUT_PAIRS]
        class_names = [class_names[i] for i in seen]
        labels = torch.searchsorted(torch.tensor(seen), labels)
    return ImageSet(name, drawn.images, labels, tuple(class_names), tuple(templates), split, masks=drawn.masks)
