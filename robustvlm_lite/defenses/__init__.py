"""Defenses by name. A new one is one file here, one line in METHODS, and one chapter."""

from functools import partial
from pathlib import Path

from ..clip import ZeroShotCLIP
from ..runtime import UserError, asset, near_miss
from .base import Defense, TrainingAttack
from .checkpoints import load_change, read_facts, save_change
from .finetuning import FARE, PMGAFT, FTAdv, FTClean, TeCoA
from .tga_zsr import PRESETS, CompTGA, TGAConfig, TGAZSR, VisionGuided
from .training import FineTuning, Training

__all__ = [
    "METHODS", "PRESETS", "Defense", "FineTuning", "TGAConfig", "Training", "TrainingAttack", "build", "load_defense",
    "names", "read_facts", "save_change",
]  # fmt: skip

CE = TGAConfig(alpha=0.0, beta=0.0)
# name -> what makes an untrained defense of a CLIP
METHODS = {
    "FT-clean": FTClean,
    "FT-adv": FTAdv,
    "TeCoA": TeCoA,
    "PMG-AFT": PMGAFT,
    "FARE": FARE,
    "TGA-ZSR": partial(TGAZSR, config=PRESETS["strict"]),
    "TGA-ZSR (paper)": partial(TGAZSR, config=PRESETS["paper"]),
    "TGA-ZSR (released)": partial(TGAZSR, config=PRESETS["released"]),
    "Comp-TGA": partial(CompTGA, config=PRESETS["comp"]),
    "Vision-guided": VisionGuided,
}


def build(name: str, clip: ZeroShotCLIP, **options) -> FineTuning:
    """An untrained defense by name; options go to its constructor (for TGA-ZSR: config)."""
    if name not in METHODS:
        raise UserError(f"unknown defense {name!r}; {near_miss(name, names())}")
    return METHODS[name](clip, name=name, **options)


def names() -> tuple[str, ...]:
    """Names that `load_defense` takes: no defense, and every method of the book."""
    return ("none", *METHODS)


def load_defense(name: str, clip: ZeroShotCLIP) -> Defense:
    """A trained defense of `clip`: "none", a method with a bundled checkpoint, or the path of a checkpoint file."""
    if name in ("none", "CLIP"):
        return Defense(clip)
    path = Path(name)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"expected a defense checkpoint at {path}, found none; check the path")
        method = read_facts(path)["method"]
        defense = METHODS[method](clip, name=method) if method in METHODS else FineTuning(clip, name=method)
        return load_change(defense, path)
    if name not in METHODS:
        raise UserError(f"unknown defense {name!r}; {near_miss(name, names())}")
    path = checkpoint(name, clip.name)
    if not path.exists():
        raise UserError(f"no bundled checkpoint of {name!r} for {clip.name}; use nano or train it and pass its file's path")
    return load_change(build(name, clip), path)


def checkpoint(name: str, base: str) -> Path:
    """Where the bundled checkpoint of a method lies."""
    return asset("defenses", f"{base}-{name.lower().replace(' ', '-').replace('(', '').replace(')', '')}.safetensors")
