"""The Parquet files of one split: all there, each with its checksum, each label with a class."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq
from torch import Tensor

from ..runtime import UserError, sha256

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Parts:
    """The files of a split in order; rows are counted over all of them."""

    files: tuple[Path, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Row behind the last one of each file."""
        return list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

    def locate(self, row: int) -> tuple[Path, int]:
        """(file, row inside it)."""
        part = next(i for i, end in enumerate(self.ends) if row < end)
        return self.files[part], row - (self.ends[part - 1] if part else 0)

    def place(self, row: int) -> str:
        """ "row 3 of test-00001-of-00002.parquet"."""
        file, row = self.locate(row)
        return f"row {row} of {file.name}"


def find_parts(folder: Path, split: str) -> Parts:
    """SPLIT-*.parquet of a folder.

    Raises UserError for a split without files, for a part that SPLIT-00000-of-0000N promises and is absent, and for a
    file whose SHA-256 differs from the one in SHA256SUMS of the folder above, where there is such a list.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise UserError(f"expected Parquet files {split}-*.parquet in {folder}, found none; check data_root and split")
    numbered = [re.fullmatch(rf"{re.escape(split)}-(\d+)-of-(\d+)(-\w+)?", file.stem) for file in files]
    if all(numbered):
        here, of = {int(match[1]) for match in numbered}, int(numbered[0][2])
        if missing := set(range(of)) - here:
            name = f"{split}-{min(missing):05d}-of-{of:05d}.parquet"
            raise UserError(f"expected {of} {split} files in {folder}, {name} is missing; fetch it again")
        if len(files) > of:
            raise UserError(
                f"expected {of} {split} files in {folder}, got {len(files)}; remove those of another version"
            )
    sums = _sums(folder.parent / SUMS)
    for file in files:
        expected = sums.get(f"{folder.name}/{file.name}")
        if expected and (got := sha256(file)) != expected:
            raise UserError(f"expected SHA-256 {expected[:12]}… for {file}, got {got[:12]}…; fetch the file again")
    return Parts(tuple(files))


def _sums(path: Path) -> dict[str, str]:
    """{file name: SHA-256} of a list as `sha256sum` writes it; empty where there is none."""
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}


def check_labels(labels: Tensor, n_classes: int, where, place: Callable[[int], str]) -> None:
    """Refuse labels [N] outside 0..n_classes-1, naming the first such row."""
    if wrong := ((labels < 0) | (labels >= n_classes)).nonzero().flatten().tolist():
        got = f"{int(labels.min())} to {int(labels.max())} (first at {place(wrong[0])})"
        raise UserError(f"expected labels in 0..{n_classes - 1} in {where}, got {got}; fetch or mend the files")
