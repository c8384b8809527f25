"""Datasets by name: rendered scenes, bundled photographs, 64-pixel packs, and the reader's own images."""

import torch

from .. import scenes
from ..runtime import UserError, generator, near_miss
from .folder import from_path
from .imageset import ImageSet
from .packs import PACKS, PHOTO, Pack, pack_folder, read_pack, read_rows

__all__ = ["PACKS", "PHOTO", "ImageSet", "Pack", "from_path", "load", "names", "read_rows"]

SCENE_TEST_SIZE = 1000  # rendered test images of a task when no size is asked


def names() -> tuple[str, ...]:
    """Every dataset name that `load` takes."""
    return tuple(f"scenes/{task}" for task in scenes.TASKS) + tuple(PACKS)


def load(name: str, split: str = "test", *, data_root: str = "", size: int = 64, n: int = 0, seed: int = 0) -> ImageSet:
    """A named dataset, `size` pixels a side; n > 0 asks for a seeded, class-balanced subset.

    split: "train" or "test" (for Tiny-ImageNet the held-out split is its validation split). The training split of
    scenes/pair knows the names of the pairs that it shows and no other.
    """
    if split not in ("train", "test"):
        raise UserError(f"expected split 'train' or 'test', got {split!r}")
    if n < 0:
        raise UserError(f"expected n >= 0 images of {name}, got n={n}; 0 takes the whole split")
    group, _, task = name.partition("/")
    if group == "scenes":
        return _render(name, task, split, size, n or SCENE_TEST_SIZE, seed)
    folder = pack_folder(name, data_root)
    pack = PACKS[name]
    stored = pack.test_split if split == "test" else "train"
    return read_pack(folder, stored, name=name, templates=pack.templates, size=size, n=n, seed=seed)


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
