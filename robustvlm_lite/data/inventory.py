"""What of the named data sets is here, what is missing, how large it is and under which terms."""

from pathlib import Path

import pyarrow.parquet as pq

from .. import scenes
from ..runtime import UserError
from . import registry
from .packs import PACKS, pack_folder
from .sources import lacking

HEADER = ("data set", "where", "n (test)", "size", "licence")


def inventory(data_root: str) -> list[tuple[str, ...]]:
    """One row under HEADER for each data set, of the folder `data_root` (empty: only what is bundled is here)."""
    rows = [(f"scenes/{task}", "rendered", "any", "-", "drawn by this package") for task in scenes.TASKS]
    rows += [_pack(name, data_root) for name in PACKS]
    for short, dataset in registry.datasets().items():
        size = f"{dataset.gigabytes:g} GB" if dataset.gigabytes else "-"
        for group, use in dataset.uses.items():
            lacks = lacking(dataset, use, data_root) if data_root else short
            there = data_root and dataset.folder(data_root).is_dir()
            where = "here" if not lacks else f"lacks {lacks}" if there else "missing"
            rows.append((f"{group}/{short}", where, str(use.splits["test"]["n"]), size, dataset.licence))
        if dataset.task != registry.CLASSIFICATION:
            where = "here" if data_root and dataset.folder(data_root).is_dir() else "missing"
            rows.append((short, where, f"({dataset.task})", size, dataset.licence))
    return rows


def _pack(name: str, data_root: str) -> tuple[str, ...]:
    pack = PACKS[name]
    try:
        folder = pack_folder(name, data_root)
    except UserError:  # not under the data root
        return name, "missing", "-", "-", pack.licence
    n = sum(pq.read_metadata(file).num_rows for file in folder.glob(f"{pack.test_split}-*.parquet"))
    where = "bundled" if name.startswith("photos/") else "here"
    return name, where, str(n), _megabytes(folder), pack.licence


def _megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.parquet')) / 1e6:.1f} MB"
