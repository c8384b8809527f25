"""Image packs: Parquet files in the Hugging Face image layout, with `classes.json` beside them.

`small/...` packs lie under a `data_root` of the reader's; `photos/...` ship with the package.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..runtime import UserError, asset, near_miss
from .decoding import decode
from .imageset import ImageSet
from .parts import Parts, check_labels, find_parts
from .subsets import choose_rows

PHOTO = ("a photo of a {}.", "a picture of a {}.", "this is a photo of a {}.", "a {}.")
FLOWER = tuple(t[:-1] + ", a type of flower." for t in PHOTO[:3]) + PHOTO[3:]
PET = tuple(t[:-1] + ", a type of pet." for t in PHOTO[:3]) + PHOTO[3:]
PACS = ("a photo of a {}.", "an art painting of a {}.", "a cartoon of a {}.", "a sketch of a {}.")


@dataclass(frozen=True)
class Pack:
    """One data set: its templates, the name of its held-out split, and what may be done with it."""

    templates: tuple[str, ...]
    licence: str
    test_split: str = "test"


RESEARCH = "research use; see the data page"
PACKS = {
    "small/tiny_imagenet": Pack(PHOTO, "ImageNet terms, non-commercial research", "validation"),
    "small/cifar10": Pack(PHOTO, RESEARCH),
    "small/cifar100": Pack(PHOTO, RESEARCH),
    "small/stl10": Pack(PHOTO, RESEARCH),
    "small/flowers102": Pack(FLOWER, RESEARCH),
    "small/caltech101": Pack(PHOTO, "CC BY 4.0"),
    "small/pacs": Pack(PACS, RESEARCH),
    "small/oxford_pets_3class": Pack(PET, "CC BY-SA 4.0"),
    "photos/caltech": Pack(PHOTO, "CC BY 4.0, bundled"),
    "photos/web": Pack(PHOTO, "CC BY 2.0 each image, bundled"),
}


def read_rows(folder: Path, split: str) -> tuple[list[bytes], list[str], torch.Tensor, tuple[str, ...], pa.Table]:
    """(image bytes, image paths, labels [N], class names, table) of one split of a pack folder."""
    return _read(folder, find_parts(folder, split), split)


def _read(folder: Path, parts: Parts, split: str) -> tuple:
    try:
        table = pa.concat_tables([pq.read_table(f) for f in parts.files])
        names = tuple(json.loads((folder / "classes.json").read_text())["names"])
        rows = table["image"].to_pylist()
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
        data, paths = [r["bytes"] for r in rows], [r["path"] for r in rows]
        stored = json.loads((table.schema.metadata or {}).get(b"class_names", b"null"))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"expected Parquet with columns image {{bytes, path}} and label, and classes.json with names, in {folder}; "
            f"got {type(error).__name__}: {reason}"
        ) from None
    if not len(labels):
        raise UserError(f"expected images in {folder}, got {split} Parquet files without a row; fetch them again")
    if stored is not None and len(stored) != len(names):
        raise UserError(
            f"expected the {len(stored)} classes of {parts.files[0].name} in {folder / 'classes.json'}, got {len(names)}; "
            "fetch both again"
        )
    check_labels(labels, len(names), folder, parts.place)
    return data, paths, labels, names, table


def pack_folder(name: str, data_root: str) -> Path:
    """Where the files of a named pack lie; a missing data root is an error that names the mend."""
    if name not in PACKS:
        raise UserError(f"unknown dataset {name!r}; {near_miss(name, PACKS)}")
    group, short = name.split("/")
    if group == "photos":
        return asset("photos", short)
    if not data_root:
        raise UserError(f"dataset {name!r} is not bundled; pass data_root, the folder that holds {short}/")
    folder = Path(data_root) / short
    if not folder.is_dir():
        raise UserError(f"expected the folder {folder} for dataset {name!r}, found none; check data_root")
    return folder


def read_pack(
    folder: Path,
    split: str,
    *,
    name: str,
    templates: tuple[str, ...],
    size: int,
    n: int = 0,
    shots: int = 0,
    seed: int = 0,
) -> ImageSet:
    """One split of a pack folder, `size` pixels a side; n or shots > 0 decodes only the rows that `choose_rows` names."""
    parts = find_parts(folder, split)
    data, paths, labels, names, _ = _read(folder, parts, split)
    rows = choose_rows(labels, name, split, n=n, shots=shots, seed=seed).tolist()
    images = np.stack([decode(data[i], size, f"{folder.name}/{paths[i]}, {parts.place(i)}") for i in rows])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(name, images, labels[rows], names, templates, split, ids=tuple(paths[i] for i in rows))
