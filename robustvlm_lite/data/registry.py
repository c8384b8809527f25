"""The full-size data sets of the five papers, as `assets/datasets.yml` states them."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml

from ..runtime import UserError, asset, near_miss

FOLDER = "full"  # below the data root, so that a full-size set never lies where a 64-pixel pack of its name does
CLASSIFICATION = "classification"


@dataclass(frozen=True)
class Use:
    """How one line of papers reads a data set.

    templates: with one {} for the class; classes: how many; splits: {split: {"n": images, and what the source needs}};
    options: what the source needs for every split; naming: a rule of `classnames`; zoom and bicubic: how the papers resize.
    """

    templates: tuple[str, ...]
    classes: int
    source: str
    splits: dict[str, dict]
    naming: str = ""
    zoom: float = 1.0
    bicubic: bool = False
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """One entry of the registry; `names` maps the data's own class keys to prompt names, in label order."""

    name: str
    title: str
    task: str
    licence: str
    obtain: str
    gigabytes: float
    downloads: tuple[dict, ...]
    names: dict[str, str]
    uses: dict[str, Use]

    def folder(self, data_root: str) -> Path:
        """Where its files lie below a data root."""
        return Path(data_root) / FOLDER / self.name


def _use(entry: dict, use: dict) -> Use:
    stated = {"classes": entry["classes"]} | use | {"templates": tuple(use["templates"])}
    options = {key: stated.pop(key) for key in ("class", "file", "images") if key in stated}
    return Use(**stated, options=options)


def _dataset(name: str, entry: dict) -> Dataset:
    names = entry.get("names", {})
    return Dataset(
        name,
        entry["title"],
        entry["task"],
        entry["licence"],
        entry["obtain"],
        entry.get("gigabytes", 0.0),
        tuple(entry.get("downloads", ())),
        names if isinstance(names, dict) else {name: name for name in names},
        {group: _use(entry, use) for group, use in entry.get("uses", {}).items()},
    )


@lru_cache
def datasets() -> dict[str, Dataset]:
    """Every registered data set by name."""
    entries = yaml.safe_load(asset("datasets.yml").read_text(encoding="utf-8"))
    return {name: _dataset(name, entry) for name, entry in entries.items()}


def uses() -> tuple[str, ...]:
    """The names that can be loaded, such as "tga_zsr/food101"."""
    return tuple(f"{group}/{name}" for name, dataset in datasets().items() for group in dataset.uses)


def find(name: str) -> Dataset:
    """The data set of "food101", or of one of its uses, "coop/food101"."""
    short = name.rpartition("/")[2]
    if short not in datasets() or name not in (short, *uses()):
        raise UserError(f"unknown dataset {name!r}; {near_miss(name, (*datasets(), *uses()))}")
    return datasets()[short]


def find_use(name: str) -> tuple[Dataset, Use]:
    """The data set and the use of a name such as "tga_zsr/food101"."""
    if name not in uses():
        raise UserError(f"unknown dataset {name!r}; {near_miss(name, uses())}")
    group, _, short = name.partition("/")
    return datasets()[short], datasets()[short].uses[group]
