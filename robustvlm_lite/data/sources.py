"""Readers of full-size data sets as they lie on disk: torchvision's layouts, CoOp's split files, class folders, Parquet."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..runtime import UserError
from .listing import Listing
from .parts import check_labels, find_parts
from .registry import Dataset, Use

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read_listing(dataset: Dataset, use: Use, split: str, data_root: str) -> Listing:
    """The rows of a split as the registry counts them.

    Parquet files in the Hugging Face image layout go before the use's own source, where the folder holds them. Raises
    UserError if anything is missing, a label has no class, or rows are fewer or more than the registry says.
    """
    check_there(dataset, use, data_root)
    folder, wanted = dataset.folder(data_root), use.splits[split]
    parquet = wanted.get("parquet", split)
    if use.source == "parquet" or any(folder.glob(f"{parquet}-*.parquet")):
        listing = parquet_listing(folder, parquet, use.classes)
    elif use.source == "torchvision":
        kwargs = {k: v for k, v in wanted.items() if k not in ("n", "parquet")}
        listing = torchvision_listing(folder, use.options["class"], kwargs)
    elif use.source == "split_file":
        listing = split_file_listing(folder / use.options["file"], folder / use.options["images"], split)
    else:
        listing = folder_listing(folder / wanted["folder"], wanted.get("annotations", ""))
    check_labels(listing.labels, use.classes, folder, listing.where)
    if len(listing.labels) != wanted["n"]:
        raise UserError(
            f"expected {wanted['n']} {split} images of {dataset.title} in {folder}, got {len(listing.labels)}; "
            "complete the files or fetch them again"
        )
    return listing


def lacking(dataset: Dataset, use: Use, data_root: str) -> str:
    """The first file or folder that the test split of a use needs and `data_root` lacks; empty if nothing is."""
    folder, test = dataset.folder(data_root), use.splits["test"]
    parquet = f"{test.get('parquet', 'test')}-*.parquet"
    if any(folder.glob(parquet)):
        return ""
    if use.source == "parquet":
        return parquet
    if use.source == "torchvision":  # how it names its folder is its own affair
        return "" if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()) else "image folders"
    wanted = [use.options["images"], use.options["file"]] if use.source == "split_file" else [test["folder"]]
    return next((name for name in wanted if not (folder / name).exists()), "")


def check_there(dataset: Dataset, use: Use, data_root: str) -> None:
    """Refuse a set whose files are not below `data_root`, with the command that fetches them or what a person has to do."""
    if not (lacks := lacking(dataset, use, data_root)):
        return
    if lacks == use.options.get("file"):
        how = "CoOp's data page links it"
    elif dataset.downloads:
        how = f"robustvlm data prepare {dataset.name} --root DIR fetches it"
    else:
        how = f"obtain it: {dataset.obtain}"
    raise UserError(f"expected {lacks} of {dataset.title} in {dataset.folder(data_root)}, found none; {how}")


# ---- torchvision


def torchvision_listing(folder: Path, class_name: str, kwargs: dict) -> Listing:
    """A split as a data set class of torchvision reads it below `folder`; files are taken in the order of their paths."""
    from torchvision import datasets

    try:
        data = getattr(datasets, class_name)(str(folder), **kwargs)
    except Exception as error:  # each class of torchvision stumbles in its own way over files that are not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"expected the layout of torchvision's {class_name} in {folder}, got: {reason}; fetch the files again"
        ) from None
    samples = getattr(data, "samples", getattr(data, "_samples", None))  # (path, label) of image folders and cars
    labels = [y for _, y in samples] if samples else _first(data, ("targets", "labels", "_labels", "y"))
    labels = torch.as_tensor(list(map(int, labels)))
    keys = tuple(_first(data, ("classes", "categories"), ()))
    files = [p for p, _ in samples] if samples else _first(data, ("_image_files", "_images"), None)
    if files is not None:
        ids = [Path(p).relative_to(folder).as_posix() for p in files]
    elif hasattr(data, "index"):  # the Caltech sets count images inside each class
        ids = [f"{keys[y]}/{i}" for y, i in zip(labels.tolist(), data.index, strict=True)]
    else:
        ids = [f"{i:06d}" for i in range(len(labels))]
    order = sorted(range(len(ids)), key=lambda i: ids[i]) if files is not None else list(range(len(ids)))
    return Listing(
        labels[order],
        tuple(ids[i] for i in order),
        keys,
        lambda row: data[order[row]][0],
        lambda row: f"{folder / ids[order[row]]}, row {order[row]} of torchvision's {class_name}",
    )


def _first(data, attributes: Sequence[str], *default):
    """The first of these attributes that a data set has: torchvision's classes name theirs differently."""
    name = next((name for name in attributes if hasattr(data, name)), attributes[0])
    return getattr(data, name, *default)


# ---- CoOp's split files


def split_file_listing(path: Path, images: Path, split: str) -> Listing:
    """A split of a JSON file {train, val, test: [[path, label, class name], …]}; paths start from the folder `images`.

    Raises UserError for a file of another form, and for an image that is listed and absent, naming its row.
    """
    try:
        stored = json.loads(path.read_text())
        names = {int(label): str(name) for rows in stored.values() for _, label, name in rows}
        rows = [(str(file).lstrip("/"), int(label)) for file, label, _ in stored[split]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(
            f"expected {{{split}: [[path, label, class name], …]}} in {path}, got {got}; fetch the file again"
        ) from None

    def where(row: int) -> str:
        return f"{images / rows[row][0]}, row {row} of {split} in {path.name}"

    if (row := next((i for i, (file, _) in enumerate(rows) if not (images / file).is_file()), None)) is not None:
        raise UserError(f"expected the image {where(row)}, found none; fetch the images again")
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    keys = tuple(names[label].replace("_", " ") for label in sorted(names))
    return Listing(
        labels, tuple(f for f, _ in rows), keys, lambda row: (images / rows[row][0]).read_bytes(), where, True
    )


# ---- one subfolder a class


def folder_listing(folder: Path, annotations: str = "") -> Listing:
    """Images in one subfolder a class, or named by a file `annotations` of lines "image <tab> class" beside images/."""
    if not folder.is_dir():
        raise UserError(f"expected the folder {folder}, found none; fetch the files again")
    if annotations and (folder / annotations).is_file():
        lines = [line.split("\t")[:2] for line in (folder / annotations).read_text().splitlines()]
        if (row := next((i for i, line in enumerate(lines) if len(line) < 2), None)) is not None:
            raise UserError(
                f"expected image <tab> class in row {row} of {folder / annotations}, got {lines[row]}; fetch it again"
            )
        rows = sorted((f"images/{name}", key) for name, key in lines)
        keys = sorted({key for _, key in rows})
    else:
        classes = [sub.name for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
        keys = sorted(classes, key=lambda key: (int(key), key) if key.isdigit() else (0, key))
        found = [sorted(f for f in (folder / key).rglob("*") if f.suffix.lower() in SUFFIXES) for key in keys]
        if empty := [folder / key for key, files in zip(keys, found, strict=True) if not files]:
            raise UserError(f"expected images in the class folder {empty[0]}, found none; fill or remove it")
        rows = [(f.relative_to(folder).as_posix(), key) for key, files in zip(keys, found, strict=True) for f in files]
    label_of = {key: label for label, key in enumerate(keys)}
    return Listing(
        torch.tensor([label_of[key] for _, key in rows], dtype=torch.int64),
        tuple(name for name, _ in rows),
        tuple(keys),
        lambda row: (folder / rows[row][0]).read_bytes(),
        lambda row: str(folder / rows[row][0]),
    )


# ---- Parquet in the Hugging Face image layout


def parquet_listing(folder: Path, split: str, n_classes: int) -> Listing:
    """A split of Parquet files: a column {bytes, path} and a label column, whose ClassLabel names are the keys if stored."""
    parts = find_parts(folder, split)
    try:
        schema = pq.read_schema(parts.files[0])
        image, label, keys = _columns(schema, n_classes)
        table = pa.concat_tables([pq.ParquetFile(f).read(columns=[label, f"{image}.path"]) for f in parts.files])
        labels = torch.tensor(table[label].to_pylist(), dtype=torch.int64)
        paths = [row["path"] for row in table[image].to_pylist()]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"expected Parquet with an image column {{bytes, path}} and a label column in {folder}, got {reason}; "
            "fetch the files again"
        ) from None

    @lru_cache(maxsize=1)  # rows are asked for in order: one group is read once, and only one is held
    def group_rows(file: Path, group: int) -> list[dict]:
        return pq.ParquetFile(file).read_row_group(group, columns=[image])[image].to_pylist()

    def read(row: int) -> bytes:
        file, row = parts.locate(row)
        metadata, group = pq.read_metadata(file), 0
        while row >= (rows := metadata.row_group(group).num_rows):
            group, row = group + 1, row - rows
        return group_rows(file, group)[row]["bytes"]

    ids = tuple(path or f"{i:06d}" for i, path in enumerate(paths))
    return Listing(labels, ids, keys, read, lambda row: f"{folder.name}/{ids[row]}, {parts.place(row)}")


def _columns(schema: pa.Schema, n_classes: int) -> tuple[str, str, tuple[str, ...]]:
    """(image column, label column, class names): of several label columns, the one with `n_classes` names."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    named = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    label = next((name for name, names in named.items() if len(names) == n_classes), "label")
    if not structs or label not in schema.names:
        raise KeyError(f"the columns {', '.join(schema.names)}")
    return structs[0], label, tuple(named.get(label, ()))
