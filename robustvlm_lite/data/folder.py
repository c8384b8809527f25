"""The practitioner's own images: one subfolder a class, or Parquet in the Hugging Face image layout."""

from pathlib import Path

import torch

from ..runtime import UserError
from .imageset import ImageSet
from .packs import PACKS, PHOTO, read_pack
from .sources import folder_listing


def from_path(path: str, *, size: int = 64, templates: tuple[str, ...] = (), split: str = "test") -> ImageSet:
    """Images of a folder: Parquet with `classes.json` (its test or validation split where it has one), or subfolders.

    Where another split than `split` is taken, the set's name says so. Images of subfolders are turned upright and lose
    their transparency to white. A folder that holds a broken image, an empty class or only one class is refused by name.
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
        name = f"own/{folder.name}" + (f" ({splits[0]} split)" if splits[0] != split else "")
        images = read_pack(folder, splits[0], name=name, templates=templates, size=size)
    else:
        images = _from_subfolders(folder, templates or PHOTO, size)
    if len(images.class_names) < 2:
        raise UserError(
            f"expected at least two classes in {path}, got {len(images.class_names)}; zero-shot needs a choice"
        )
    return images


def _from_subfolders(folder: Path, templates: tuple[str, ...], size: int) -> ImageSet:
    listing = folder_listing(folder)
    if not listing.keys:
        raise UserError(
            f"expected one subfolder a class in {folder}, found none; put each class into a folder of its name"
        )
    images = listing.images(torch.arange(len(listing.labels)), size, own=True)
    names = tuple(key.replace("_", " ") for key in listing.keys)
    return ImageSet(f"own/{folder.name}", images, listing.labels, names, templates, ids=listing.ids)
