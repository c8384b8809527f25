"""Which rows of a data set are used: committed evaluation subsets, few-shot lists, base and new classes.

All of it is a function of (labels, name, seed): the same on every machine, whatever was drawn before.
"""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..runtime import UserError, asset, generator, near_miss
from .imageset import ImageSet, balanced_rows

SHOTS = (1, 2, 4, 8, 16)  # of the papers on few-shot tuning
FEW_SHOT_SEEDS = (1, 2, 3)


def choose_rows(labels: Tensor, name: str, split: str, *, n: int = 0, shots: int = 0, seed: int = 0) -> Tensor:
    """Rows of a balanced subset (n > 0), of a few-shot list (shots > 0), or all of labels [N].

    With seed 0, the subset of a split that a committed list covers is taken from there.
    """
    if n and shots:
        raise UserError(f"expected n or shots of {name}, got both (n={n}, shots={shots}); leave one out")
    if shots:
        return few_shot_rows(labels, shots, seed, name)
    committed = manifests().get(name)
    if committed and split == committed["split"] and seed == 0 and 0 < n <= len(committed["rows"]):
        return evaluation_rows(labels, n, name)
    return balanced_rows(labels, n, seed, name) if n else torch.arange(len(labels))


def few_shot_rows(labels: Tensor, shots: int, seed: int, name: str) -> Tensor:
    """`shots` rows of every class of labels [N], class by class. 16 shots begin with the 8 of the same seed."""
    chosen = []
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero().flatten()
        if not 0 < shots <= len(rows):
            raise UserError(f"expected 1 to {len(rows)} shots of class {c} of {name}, got {shots}; ask for fewer")
        chosen.append(rows[torch.randperm(len(rows), generator=generator(seed, name, "few-shot", c))[:shots]])
    return torch.cat(chosen)


def base_and_new(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """CoOp's generalization split: images of the first half of the classes, rounded up, and of the rest, labels from 0.

    Each half knows its own class names and no other.
    """
    half = (len(images.class_names) + 1) // 2
    return _classes(images, 0, half), _classes(images, half, len(images.class_names))


def domains(images: ImageSet) -> tuple[str, ...]:
    """The domains of a set whose images lie in one folder each, in order (PACS: art_painting, cartoon, photo, sketch)."""
    classes: dict[str, set[int]] = {}
    for name, label in zip(images.ids, images.labels.tolist(), strict=False):
        classes.setdefault(name.partition("/")[0], set()).add(label)
    if len(classes) < 2 or min(map(len, classes.values())) < 2:  # a folder a class, as most sets have it
        raise UserError(
            f"expected at least 2 domains with several classes each in {images.name}, found none; small/pacs has four"
        )
    return tuple(sorted(classes))


def leave_out(images: ImageSet, domain: str) -> tuple[ImageSet, ImageSet]:
    """(images of the other domains, images of `domain`): to learn on the ones, to be asked about the other."""
    if domain not in (known := domains(images)):
        raise UserError(f"unknown domain {domain!r} of {images.name}; {near_miss(domain, known)}")
    inside = torch.tensor([name.partition("/")[0] == domain for name in images.ids])
    return images.take((~inside).nonzero().flatten()), images.take(inside.nonzero().flatten())


def few_shot(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """`shots` images of every class of a set that is at hand, as `load(..., shots=...)` draws them; 0 keeps all."""
    return images.take(few_shot_rows(images.labels, shots, seed, images.name)) if shots else images


def _classes(images: ImageSet, first: int, end: int) -> ImageSet:
    part = images.take(((images.labels >= first) & (images.labels < end)).nonzero().flatten())
    return replace(part, labels=part.labels - first, class_names=images.class_names[first:end])


def labels_sha256(labels: Tensor) -> str:
    """Hash of labels [N] in row order, by which a committed list knows its split again."""
    return hashlib.sha256(",".join(map(str, labels.tolist())).encode()).hexdigest()


@lru_cache
def manifests() -> dict[str, dict]:
    """{data set: {"split", "labels_sha256", "rows"}} as `data_scripts/make_subsets.py` wrote them."""
    return json.loads(asset("subsets.json").read_text())


def evaluation_rows(labels: Tensor, n: int, name: str) -> Tensor:
    """The first n rows of the committed evaluation subset of `name`: balanced, and 1,000 begin with the 500.

    labels: int64 [N] of the whole test split. Raises UserError if they are not those that the list was made from.
    """
    manifest = manifests()[name]
    if (got := labels_sha256(labels)) != manifest["labels_sha256"]:
        raise UserError(
            f"expected the labels of {name} with SHA-256 {manifest['labels_sha256'][:12]}…, got {got[:12]}…; "
            "the committed subset belongs to another version of these files: fetch them again"
        )
    return torch.tensor(manifest["rows"][:n])
