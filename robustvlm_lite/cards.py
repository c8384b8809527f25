"""The result card: what a run measured, the examples behind every accuracy, and where it came from.

A card is a folder with `card.json` (schema 1) and `examples.parquet`. The examples are written first and `card.json`
last, whole: where it exists, the run has finished.
"""

import hashlib
import json
import time
from copy import deepcopy
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from . import runtime
from .fingerprint import code_sha256
from .records import ACCURACIES, SCHEMA, Row, read_parquet, verdicts, write_whole
from .runtime import UserError, git_commit, multiplies_bfloat16, resolve_device, versions
from .stats import wilson

SCHEMA_VERSION = 1
VERDICTS = ("reproduced", "partly", "not_reproduced", "not_tested")
KEYS = {
    "card": "schema chapter profile seed parameters rows claims provenance",
    "row": "method dataset attack eps_255 metric n value ci95 seconds image_forwards image_backwards",
    "claim": "id verdict why",
    "provenance": "commit dirty package torch device weights_sha256 data_sha256 code_sha256 wall_s started",
}
TYPES = (  # of the keys that do not hold text
    dict.fromkeys(("schema", "seed", "n", "image_forwards", "image_backwards"), Integral)
    | dict.fromkeys(("eps_255", "value", "seconds", "wall_s"), Real)
    | {"parameters": dict, "provenance": dict, "rows": list, "claims": list, "ci95": list, "dirty": bool}
)


class Card:
    """Collects rows and verdicts during a run; `write` makes the card.

    weights_sha256: of the backbone's checkpoint file. If empty, the hashes of the evaluated models stand in its place.
    device: as `runtime.resolve_device` takes it.
    """

    def __init__(self, chapter: str, profile: str, seed: int, parameters: dict, *, weights_sha256="", device=""):
        self.chapter, self.profile, self.seed, self.parameters = chapter, profile, seed, dict(parameters)
        self._weights_sha256, self._device = weights_sha256, resolve_device(str(device))
        self._rows: dict[tuple, Row] = {}
        self._claims: dict[str, dict] = {}
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()

    def add(self, rows) -> "Card":
        """Add rows. The same again (a notebook cell run twice) replaces; another attack under its name is refused."""
        for row in [rows] if isinstance(rows, Row) else rows:
            key = (row.method, row.dataset, row.attack, row.eps_255, row.metric, row.extra.get("seed", self.seed))
            if row.metric in ACCURACIES and row.records is None:
                raise UserError(f"expected the records behind {row.metric} of {row.method}; add the rows of `evaluate`")
            if key in self._rows and self._rows[key].extra != row.extra:
                raise UserError(f"two different settings share the name {key[:5]}; give one attack another name")
            self._rows[key] = row
        return self

    def claim(self, id: str, verdict: str, why: str) -> "Card":
        """Add a computed verdict (`card.claim(**decided)` for what `claims.decide` returns)."""
        if verdict not in VERDICTS:
            raise UserError(f"claim {id}: expected a verdict of {', '.join(VERDICTS)}, got {verdict!r}")
        self._claims[id] = {"id": id, "verdict": verdict, "why": why}
        return self

    @property
    def examples(self) -> pa.Table:
        """The records of every cell, each once; worst cases are left out, they follow from the others."""
        cells = {key[:4] + key[5:]: row.records for key, row in self._rows.items() if row.records is not None}
        tables = [table for key, table in cells.items() if key[2] != "worst"]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def as_dict(self) -> dict:
        """The card, as it will be written."""
        return {
            "schema": SCHEMA_VERSION,
            "chapter": self.chapter,
            "profile": self.profile,
            "seed": self.seed,
            "parameters": self.parameters,
            "rows": [row.as_dict() for row in self._rows.values()],
            "claims": list(self._claims.values()),
            "provenance": self._provenance(),
        }

    def write(self, out_dir) -> Path:
        """Write the folder and return the path of its card.json. Raises UserError where it cannot be written."""
        out_dir, card, examples = Path(out_dir), self.as_dict(), self.examples
        validate(card, "the card")
        for row, again in zip(_accuracies(card), _recomputed(card, examples), strict=True):
            if row["value"] != again["value"]:
                raise UserError(f"the card: {row['metric']} of {row['method']} does not follow from its examples")
        text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"

        def write_examples(temporary):
            pq.write_table(examples, temporary)
            (out_dir / "card.json").unlink(missing_ok=True)  # an older card must not vouch for the new examples

        write_whole(out_dir / "examples.parquet", write_examples)
        return write_whole(out_dir / "card.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _provenance(self) -> dict:
        commit, dirty = git_commit()
        known = versions()
        rows = self._rows.values()
        weights = {row.method: row.weights_sha256 for row in rows if row.weights_sha256}
        data = {row.dataset: row.data_sha256 for row in rows if row.data_sha256}
        name = f"{torch.cuda.get_device_name(self._device)}, " if self._device.type == "cuda" else ""
        gradients = "bfloat16" if multiplies_bfloat16(self._device.type) else "float32"
        return {
            "commit": commit,
            "dirty": dirty,
            "package": known["robustvlm_lite"],
            "torch": known["torch"],
            "device": f"{self._device} ({name}gradients in {gradients})",
            "weights_sha256": self._weights_sha256 or _joint(weights),
            "data_sha256": _joint(data),
            "code_sha256": code_sha256(self.chapter, self.profile),
            "wall_s": round(time.perf_counter() - self._clock, 3),
            "started": self._started.isoformat(timespec="seconds"),
            "versions": known,
            "weights": weights,
            "data": data,
        }


def load_card(path) -> dict:
    """A validated card from its folder or its card.json. Raises UserError (one line) for anything that is no card."""
    path = Path(path)
    path = path / "card.json" if path.is_dir() else path
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no card at {path}; the run has not finished (`robustvlm run ... --resume`)") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({str(error).splitlines()[0]}); run the chapter again") from None
    validate(card, str(path))
    return card


def shelf() -> Path:
    """The folder of the committed cards: one folder for each, named CHAPTER-PROFILE."""
    return runtime.PACKAGE.parent / "book" / "cards"


def committed(chapter: str = "") -> dict[str, dict]:
    """Folder name -> card of every committed card, of one chapter if given."""
    cards = {path.parent.name: load_card(path) for path in sorted(shelf().glob("*/card.json"))}
    return {name: card for name, card in cards.items() if chapter in ("", card["chapter"])}


def load_examples(path) -> pa.Table:
    """The records beside a card (its folder or its card.json). Raises UserError if they are absent or damaged."""
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / "examples.parquet"
    try:
        examples = read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"no examples at {path}; intervals and verdicts need them: run the chapter again") from None
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no whole Parquet file ({reason}); run the chapter again") from None
    if examples.schema.names[: len(SCHEMA)] != SCHEMA.names:
        got = ", ".join(examples.schema.names)
        raise UserError(f"{path}: expected the columns {', '.join(SCHEMA.names)} first, got {got}")
    return examples


def validate(card, where: str) -> None:
    """Raises UserError, one line that begins with `where`, unless `card` follows schema 1."""

    def require(holds, text):
        if not holds:
            raise UserError(f"{where}: {text}")

    def require_fields(kind, name, part):
        require(isinstance(part, dict), f"expected {name} as an object, got {part!r:.40}")
        keys = KEYS[kind].split()
        missing = [key for key in keys if key not in part]
        require(not missing, f"{name} lacks {', '.join(missing)}")
        for key in keys:
            require(isinstance(part[key], TYPES.get(key, str)), f"{name}: unexpected {key} {part[key]!r:.40}")

    version = card.get("schema") if isinstance(card, dict) else None
    require(version == SCHEMA_VERSION, f"expected schema {SCHEMA_VERSION}, got {version!r}; another release made it")
    require_fields("card", "the card", card)
    require_fields("provenance", "provenance", card["provenance"])
    for i, row in enumerate(card["rows"]):
        require_fields("row", f"row {i}", row)
        n, value, ci95 = row["n"], row["value"], row["ci95"]
        require(n >= 1, f"row {i}: expected n >= 1, got {n}")
        around = len(ci95) == 2 and ci95[0] <= value <= ci95[1]
        require(around, f"row {i}: expected ci95 around the value {value}, got {ci95}")
        fraction = row["metric"] in (*ACCURACIES, "asr")
        require(not fraction or 0 <= value <= 1, f"row {i}: expected {row['metric']} as a fraction, got {value}")
    for i, claim in enumerate(card["claims"]):
        require_fields("claim", f"claim {i}", claim)
        verdict, known = claim["verdict"], ", ".join(VERDICTS)
        require(verdict in VERDICTS, f"claim {claim['id']}: expected one of {known}, got {verdict!r}")


def recompute(card_dir) -> list[tuple[dict, dict]]:
    """(as it stands, as its examples give it) of every accuracy row: n, value and ci95 come from the examples alone."""
    card = load_card(card_dir)
    return list(zip(_accuracies(card), _recomputed(card, load_examples(card_dir)), strict=True))


def is_stale(card: dict) -> bool:
    """Was the card made by other code (package or chapter source) than this?"""
    return card["provenance"]["code_sha256"] != code_sha256(card["chapter"], card["profile"])


def comparable(card: dict) -> dict:
    """The card without its time fields, the only ones in which two runs with the same seed may differ."""
    card = deepcopy(card)
    for row in card["rows"]:
        row.pop("seconds")
        if row["metric"] == "train_s":
            row |= {"value": None, "ci95": None}
    for field in ("wall_s", "started"):
        card["provenance"].pop(field)
    return card


def _accuracies(card: dict) -> list[dict]:
    return [row for row in card["rows"] if row["metric"] in ACCURACIES]


def _recomputed(card: dict, examples: pa.Table) -> list[dict]:
    rows = []
    for row in _accuracies(card):
        _, correct = verdicts(examples, row)
        n, hits = len(correct), int(correct.sum())
        rows.append(row | {"n": n, "value": hits / n, "ci95": list(wilson(hits, n))})
    return rows


def _joint(hashes: dict[str, str]) -> str:
    """One hash for several named ones; a single one stands for itself."""
    distinct = sorted(set(hashes.values()))
    if len(distinct) < 2:
        return "".join(distinct)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    raise UserError(f"expected plain numbers and text in a card, got {type(value).__name__} {value!r}")
