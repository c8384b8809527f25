"""The practitioner's own images: one subfolder a class, or Parquet in the Hugging Face image layout."""

from pathlib import Path

import numpy as np
import torch

from ..runtime import UserError
from .imageset import ImageSet
from .packs import PACKS, PHOTO, decode, read_pack

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def from_path(path: str, *, size: int = 64, templates: tuple[str, ...] = (), split: str = "test") -> ImageSet:
    """Images of a folder: Parquet with `classes.json` (its test or validation split where it has one), or subfolders.

    A folder that holds a broken image, an empty class or only one class is refused by name.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"expected a folder of images or Parquet files, found none at {path}; check --data")
    if any(folder.glob("*.parquet")):
        known = PACKS.get(f"small/{folder.name}")
        splits = [s for s in (split, "validation", "train") if any(folder.glob(f"{s}-*.parquet"))]
        if not splits:
            raise UserError(f"expected Parquet files named SPLIT-*.parquet (split test, validation or train) in {path}")
        templates = templates or (known.templates if known else PHOTO)
        images = read_pack(folder, splits[0], name=f"own/{folder.name}", templates=templates, size=size)
    else:
        images = _from_subfolders(folder, templates or PHOTO, size)
    if len(images.class_names) < 2:
        raise UserError(
            f"expected at least two classes in {path}, got {len(images.class_names)}; zero-shot needs a choice"
        )
    return images


def _from_subfolders(folder: Path, templates: tuple[str, ...], size: int) -> ImageSet:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise UserError(
            f"expected one subfolder a class in {folder}, found none; put each class into a folder of its name"
        )
    pictures, labels, ids = [], [], []
    for label, sub in enumerate(classes):
        files = sorted(f for f in sub.iterdir() if f.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"expected images in the class folder {sub}, found none; fill or remove it")
        for f in files:
            pictures.append(decode(f.read_bytes(), size, str(f)))
            labels.append(label)
            ids.append(f"{sub.name}/{f.name}")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    names = tuple(c.name.replace("_", " ") for c in classes)
    return ImageSet(f"own/{folder.name}", images, torch.tensor(labels), names, templates, ids=tuple(ids))
