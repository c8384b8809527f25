"""What an evaluation leaves behind: per-example records, the row that sums them up, and the store of finished cells.

A *cell* is one (method, dataset, attack, ε, seed). Its records are a table with one row per image, in the order of the
data set; every accuracy, interval and worst case is recomputed from them and from nothing else.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .fingerprint import code_sha256
from .runtime import UserError

SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("dataset", pa.string()),
        ("attack", pa.string()),
        ("eps_255", pa.float64()),
        ("seed", pa.int64()),
        ("index", pa.int64()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("correct", pa.bool_()),
        ("margin", pa.float32()),  # true logit minus the best other; negative means wrong
        ("prediction_8bit", pa.int64()),
        ("correct_8bit", pa.bool_()),
        ("linf_255", pa.float32()),  # largest pixel change, in 1/255
    ]
)
CELL = ("method", "dataset", "attack", "eps_255", "seed")
ACCURACIES = ("clean_acc", "robust_acc", "robust_acc_worst", "robust_acc_8bit")


@dataclass(frozen=True)
class Row:
    """One number of a table with its interval and its price; accuracies are fractions, ε is in 1/255.

    `seconds`, `image_forwards` and `image_backwards` are what the attack cost (for clean rows: the classification).
    `extra` holds what a caption must say: seed, steps, step size, restarts. `records` are the examples behind it.
    """

    method: str
    dataset: str
    attack: str
    eps_255: float
    metric: str
    n: int
    value: float
    ci95: tuple[float, float]
    seconds: float = 0.0
    image_forwards: int = 0
    image_backwards: int = 0
    extra: dict = field(default_factory=dict)
    records: pa.Table | None = field(default=None, repr=False, compare=False)
    weights_sha256: str = field(default="", repr=False, compare=False)
    data_sha256: str = field(default="", repr=False, compare=False)

    def as_dict(self) -> dict:
        """The row as it stands in a card."""
        hidden = ("records", "weights_sha256", "data_sha256")
        return {k: v for k, v in vars(self).items() if k not in hidden} | {"ci95": list(self.ci95)}


def records_table(*, n: int, **columns) -> pa.Table:
    """The records of `n` images; a single value stands for a whole column."""
    full = {name: np.full(n, value) if np.ndim(value) == 0 else value for name, value in columns.items()}
    return pa.table({name: pa.array(full[name], type=SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)


def select(records: pa.Table, **where) -> pa.Table:
    """The records whose columns equal `where`, by index: `select(records, method="TeCoA", eps_255=1.0)`."""
    for name, value in where.items():
        records = records.filter(pc.equal(records[name], pa.scalar(value, type=SCHEMA.field(name).type)))
    return records.sort_by("index")


def column(records: pa.Table, name: str) -> np.ndarray:
    """One column as an array."""
    return records[name].to_numpy()


def verdicts(records: pa.Table, row: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """`(index [n], correct [n])` of the examples behind an accuracy row of a card; a worst case is their AND."""
    extra = row.get("extra", {})
    where = {k: row[k] for k in ("method", "dataset", "eps_255")} | ({"seed": extra["seed"]} if "seed" in extra else {})
    attacks = extra["attacks"] if row["metric"] == "robust_acc_worst" else [row["attack"]]
    parts = [select(records, attack=attack, **where) for attack in attacks]
    index, name = column(parts[0], "index"), "correct_8bit" if row["metric"] == "robust_acc_8bit" else "correct"
    if len(index) == 0 or any(not np.array_equal(index, column(part, "index")) for part in parts):
        raise UserError(f"expected one record per image of {row['method']} on {row['dataset']} under {attacks}")
    return index, np.logical_and.reduce([column(part, name) for part in parts])


def read_parquet(path: Path) -> pa.Table:
    """One file as a table. (`pq.read_table` would add columns for folders that are named like `a=b`.)"""
    with pq.ParquetFile(path) as file:
        return file.read()


def write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """`write` to `path`.tmp, then rename: a reader sees the whole file or none, whatever kills the writer."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free space there or choose another output folder") from None
    return path


@dataclass(frozen=True)
class Cell:
    """Records of one finished cell and what they cost."""

    records: pa.Table
    seconds: float
    image_forwards: int
    image_backwards: int


class Store:
    """Finished cells in a folder, one Parquet file each, so that a killed run goes on where it stopped.

    A key names everything that can change a cell: method, data set and hash of its images, attack and its parameters,
    ε, seed, n, hash of the weights, hash of this package. Another subset or a changed model therefore finds nothing.
    """

    def __init__(self, root):
        self.root = Path(root)
        self._code = code_sha256("")

    def get(self, key: dict) -> Cell | None:
        """The finished cell of this key, or None."""
        path, stamp = self._locate(key)
        try:
            records = read_parquet(path)
            kept = json.loads(records.schema.metadata[b"cell"])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
            return None  # absent or damaged: computed again
        whole = kept["key"] == stamp and column(records, "index").tolist() == list(range(key["n"]))
        return Cell(records.replace_schema_metadata(None), **kept["cost"]) if whole else None

    def put(self, key: dict, cell: Cell) -> None:
        """Keep a finished cell."""
        path, stamp = self._locate(key)
        cost = {k: v for k, v in vars(cell).items() if k != "records"}
        table = cell.records.replace_schema_metadata({"cell": json.dumps({"key": stamp, "cost": cost})})
        write_whole(path, lambda temporary: pq.write_table(table, temporary))

    def _locate(self, key: dict) -> tuple[Path, str]:
        stamp = json.dumps(key | {"code": self._code}, sort_keys=True, default=str)
        slug = re.sub(r"[^\w.-]+", "-", f"{key['method']}-{key['dataset']}-{key['attack']}-{key['eps_255']:g}")
        return self.root / f"{slug}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.parquet", stamp
