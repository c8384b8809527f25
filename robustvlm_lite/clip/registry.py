"""Weights by name: the bundled ones, and those that `assets/clip/models.yml` lists; where they lie on this machine."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..runtime import asset


@dataclass(frozen=True)
class Weights:
    """One entry; the head of models.yml explains the fields. hub and obtain are empty for what is bundled."""

    name: str
    architecture: str
    activation: str
    image_size: int
    context_length: int
    source: str
    licence: str
    hub: str = ""
    tag: str = ""
    obtain: str = ""
    base: str = ""
    sha256: str = ""

    @property
    def bundled(self) -> bool:
        return not (self.hub or self.obtain)


def published() -> dict[str, Weights]:
    """The entries of models.yml by name."""
    entries = yaml.safe_load(asset("clip", "models.yml").read_text(encoding="utf-8"))
    return {name: Weights(name, **entry) for name, entry in entries.items()}


def bundled() -> dict[str, Weights]:
    """What ships with the package: each architecture of assets/clip that has weights or their card."""
    configs = [path for path in sorted(asset("clip").glob("*.json")) if not path.name.endswith(".card.json")]
    return {c.stem: _bundled(c) for c in configs if bundled_file(c.stem).exists() or card_file(c.stem).exists()}


def _bundled(path: Path) -> Weights:
    config, card = json.loads(path.read_text(encoding="utf-8")), card_file(path.stem)
    return Weights(
        path.stem,
        path.stem,
        "QuickGELU" if config.get("quick_gelu") else "GELU",
        config["vision_cfg"]["image_size"],
        config["text_cfg"]["context_length"],
        source="trained by data_scripts/pretrain_clip.py",
        licence="that of this repository",
        sha256=json.loads(card.read_text(encoding="utf-8"))["weights_sha256"] if card.exists() else "",
    )


def bundled_file(name: str) -> Path:
    """Where the weights of a bundled model lie."""
    return asset("clip", f"{name}.safetensors")


def card_file(name: str) -> Path:
    """Where the card of a bundled model lies: recipe, checksum and measurements."""
    return asset("clip", f"{name}.card.json")


def find(name: str, tag: str = "") -> Weights | None:
    """The entry of a registered name, or of an open_clip architecture and one of its tags; None where there is none."""
    known = bundled() | published()
    by_tag = (w for w in known.values() if tag and (w.architecture, w.tag) == (name, tag))
    return known.get(name) or next(by_tag, None)


def is_registered(name: str) -> bool:
    """Is `name` a bundled or published model, rather than an architecture, a tag or a file?"""
    return name in bundled() | published()


def by_sha256(digest: str) -> Weights | None:
    """The entry whose published file has this SHA-256."""
    return next((w for w in (bundled() | published()).values() if w.sha256 and w.sha256 == digest), None)


def folder() -> Path:
    """Where weights that a person fetched are looked for, as NAME.safetensors, NAME.pt …: ROBUSTVLM_WEIGHTS or a cache."""
    return Path(os.environ.get("ROBUSTVLM_WEIGHTS") or Path.home() / ".cache" / "robustvlm_lite")


def on_machine(weights: Weights) -> Path | None:
    """The file of an entry: bundled, in `folder`, or in the cache of the Hugging Face hub; None where it is missing."""
    if weights.bundled:
        return bundled_file(weights.name) if bundled_file(weights.name).is_file() else None
    by_hand = [path for path in sorted(folder().glob(f"{weights.name}.*")) if path.is_file()]
    if by_hand:
        return by_hand[0]
    if not weights.hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(*split_hub(weights.hub))
    return Path(cached) if isinstance(cached, str) else None


def split_hub(hub: str) -> tuple[str, str]:
    """("owner/repository", "file") of "owner/repository/file"."""
    repository, _, file = hub.rpartition("/")
    return repository, file


def how_to_get(weights: Weights) -> str:
    """What a person does who has no network, in one clause."""
    if weights.bundled:
        return f"check out {asset('clip')} again"
    repository, file = split_hub(weights.hub)
    what = f"{file} of {repository} (Hugging Face hub)" if weights.hub else weights.obtain
    return f"fetch {what} elsewhere and put it at {folder() / weights.name}{Path(file).suffix or '.pt'}"
