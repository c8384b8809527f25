"""Make a 64-pixel pack again from its public source: the same images in the same rows, found by a committed list.

A list (`assets/packs/NAME.parquet`, written by `data_scripts/make_pack_lists.py`) holds each row's split, path, label and mean
color, in the order of the pack; its metadata hold classes.json and the commit of the source. What a program compresses anew
differs from another's by rounding, so a rebuilt pack has the rows and labels of ours and nearly its pixels.
"""

import io
import json
import os
import shutil
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ..runtime import UserError, asset, near_miss
from .decoding import UNREADABLE
from .download import fetch

HOST = "https://codeload.github.com"
COLUMNS = ("split", "path", "mean")  # of a list, and not of a pack
NEAR = "near_duplicates.csv"  # pairs of a training and a test image, which pre-training leaves out
FAR = 4  # gray levels between two mean colors: not the same picture


@dataclass(frozen=True)
class Form:
    """How the images of a pack were stored: bytes as the source has them (no codec), or reduced and compressed."""

    codec: str = ""
    quality: int = 0
    subsampling: int = 0  # of JPEG's color, as Pillow counts it
    side: int = 0  # the short side is reduced to so many pixels
    folder: str = ""  # part of a folder's name that both splits were drawn from, where it is not the split's own

    def encode(self, data: bytes) -> bytes:
        """The image of a source as the pack stores it."""
        with Image.open(io.BytesIO(data)) as image:
            if not self.codec:
                return data if image.mode == "RGB" else _with_three_channels(image)
            image = image.convert("RGB")
            if self.side:
                scale = self.side / min(image.size)
                image = image.resize([max(self.side, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
            kept, options = io.BytesIO(), {"subsampling": self.subsampling} if self.codec == "JPEG" else {}
            image.save(kept, self.codec, quality=self.quality, **options)
            return kept.getvalue()


FORMS = {
    "tiny_imagenet": Form(),
    "cifar10": Form(),
    "cifar100": Form("JPEG", 90),
    "stl10": Form("JPEG", 92, 2, side=64, folder="train"),
    "flowers102": Form("WEBP", 86, side=64),
    "caltech101": Form("WEBP", 86, side=64),
    "pacs": Form("WEBP", 86, side=64),
    "oxford_pets_3class": Form("JPEG", 92, 2, side=64),
}


def rebuild(name: str, root: str) -> Path:
    """Fetch the source of the pack `name` ("small/cifar10") and write ROOT/cifar10 as `data.load` reads it; returns that folder.

    Beside it comes the list of near duplicates over all packs. A pack that is there is left as it is; a call that was killed is
    gone on from. Raises UserError for what the download refuses, and for a source that lacks an image of the list or holds
    another picture under its path.
    """
    short = name.removeprefix("small/")
    if short not in FORMS:
        raise UserError(f"unknown pack {name!r}; {near_miss(name, [f'small/{known}' for known in FORMS])}")
    folder = Path(root) / short
    if folder.is_dir():
        return folder
    rows = pq.read_table(asset("packs", f"{short}.parquet"))
    source = json.loads(rows.schema.metadata[b"source"])
    archive = Path(root) / f".{short}.unfinished" / f"{source['commit']}.tar.gz"
    try:
        if not archive.is_file():
            owner_and_repository = source["repository"].removeprefix("github.com/")
            fetch(f"{HOST}/{owner_and_repository}/tar.gz/{source['commit']}", archive)
        stored = _images(archive, rows, FORMS[short])
        made = archive.with_name("pack")
        shutil.rmtree(made, ignore_errors=True)  # of a call that was killed
        _write(made, short, rows, stored)
        shutil.copyfile(asset("packs", NEAR), Path(root) / NEAR)
        os.replace(made, folder)
        shutil.rmtree(archive.parent)
    except OSError as error:
        raise UserError(f"cannot write below {root}: {error.strerror or error}; choose another --root") from None
    return folder


def mean_color(data: bytes) -> list[int]:
    """Mean red, green and blue of an encoded image, in gray levels: enough to tell whether a path still holds the picture."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).mean(axis=(0, 1)).round().astype(int).tolist()


def _images(archive: Path, rows: pa.Table, form: Form) -> list[bytes]:
    """The bytes of every row. Of several files whose paths end alike, one in the split's folder goes before, then the nearest color."""
    split, path, mean = (rows[column].to_pylist() for column in COLUMNS)
    asked = defaultdict(list)
    for row, name in enumerate(path):
        asked[name].append(row)
    best: dict[int, tuple] = {}  # row -> (no such folder, distance, bytes)
    for member, data in _members(archive):
        parts = member.split("/")
        for row in (r for k in range(len(parts)) for r in asked.get("/".join(parts[k:]), ())):
            try:
                image = form.encode(data)
                distance = max(abs(a - b) for a, b in zip(mean_color(image), mean[row], strict=True))
            except UNREADABLE as error:
                raise UserError(f"expected a readable image {member} in {archive.name}, got {error}; remove {archive}") from None
            elsewhere = not any((form.folder or split[row]) in part for part in parts[1:-1])
            if distance <= FAR:
                best[row] = min(best.get(row, (2, 0, b"")), (elsewhere, distance, image))
    if lost := [row for row in range(len(rows)) if row not in best]:
        raise UserError(
            f"expected all {len(rows)} images of the list in {archive.name}, {len(lost)} are not there or are other pictures, "
            f"the first {path[lost[0]]}; the source has changed: make the pack by hand from the data page"
        )
    return [best[row][2] for row in range(len(rows))]


def _members(archive: Path):
    """(path, bytes) of each plain file of a .tar.gz, read from start to end; nothing is unpacked."""
    try:
        with tarfile.open(archive, "r|gz") as stored:
            for member in tqdm(stored, desc=archive.name, unit="file", disable=None):
                if member.isfile():
                    yield member.name, stored.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        archive.unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"expected a whole archive, {archive.name} is damaged ({reason}); removed it: run again") from None


def _write(folder: Path, short: str, rows: pa.Table, stored: list[bytes]) -> None:
    """One Parquet file a split in the Hugging Face image layout, and classes.json."""
    folder.mkdir(parents=True)
    facts = rows.schema.metadata
    layout, split = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), rows["split"].to_pylist()
    for part in dict.fromkeys(split):
        chosen = [row for row, of in enumerate(split) if of == part]
        images = [{"bytes": stored[row], "path": rows["path"][row].as_py()} for row in chosen]
        rest = rows.drop_columns(list(COLUMNS)).take(chosen)
        table = pa.table({"image": pa.array(images, layout)} | {c: rest[c] for c in rest.column_names})
        told = {k: facts[k] for k in (b"huggingface", b"class_names", b"source")} | {b"dataset": short, b"split": part}
        pq.write_table(table.replace_schema_metadata(told), folder / f"{part}-00000-of-00001.parquet", row_group_size=1000)
    (folder / "classes.json").write_bytes(facts[b"classes"])


def _with_three_channels(image: Image.Image) -> bytes:
    """A gray JPEG as a color one of the same quantization."""
    kept = io.BytesIO()
    image.convert("RGB").save(kept, "JPEG", qtables=[image.quantization[0]] * 2, subsampling=0)
    return kept.getvalue()
