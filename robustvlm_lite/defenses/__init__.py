"""Defenses by name. A new one is one file here, one line in METHODS, and one chapter."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..clip import ZeroShotCLIP
from ..prompts import PromptSpec
from ..runtime import UserError, asset, near_miss
from . import a_tpt, capt, cba_fapt, test_time
from .base import Defense, TrainingAttack
from .checkpoints import load_change, read_facts, save_change
from .finetuning import FARE, PMGAFT, FTAdv, FTClean, TeCoA
from .prompt_files import KIND, load_prompts, prompt_facts, save_prompts
from .prompt_tuning import RIVALS, LinearProbe
from .prompting import Method, PromptTraining, PromptTuning, gradient_shares, scaled_spec
from .rates import SEARCHED, rate_search, scores, searched_rate, winner
from .recipe import Evidence, Passes, Recipe
from .test_time import TestTime, TestTimeClassifier
from .tga_zsr import PRESETS, TGAZSR, CompTGA, TGAConfig, VisionGuided
from .training import FineTuning, Training
from .ttc import TTC

__all__ = [
    "METHODS", "PRESETS", "PROMPT_METHODS", "SEARCHED", "TEST_TIME", "TTC", "Defense", "Evidence", "FineTuning", "Method", "Passes",
    "PromptTraining", "PromptTuning", "Recipe", "TGAConfig", "TestTime", "TestTimeClassifier", "Training", "TrainingAttack", "build",
    "build_prompts", "build_test_time", "gradient_shares", "load_defense", "names", "rate_search", "read_facts",
    "save_change", "save_prompts", "scores", "search_results", "searched_rate", "winner",
]  # fmt: skip

STRICT = PRESETS["strict"]
# By how much a metric's gradient falls short of L2's on the maps of attacked training images (benchmarks/metric_force.py).
GAIN_L1, GAIN_COSINE = 245.7, 1407.4
# name -> (class, configuration); the ablations change one thing of "TGA-ZSR" each
METHODS: dict[str, tuple[type[FineTuning], TGAConfig | None]] = {
    "FT-clean": (FTClean, None),
    "FT-adv": (FTAdv, None),
    "TeCoA": (TeCoA, None),
    "PMG-AFT": (PMGAFT, None),
    "FARE": (FARE, None),
    "TGA-ZSR": (TGAZSR, STRICT),
    "TGA-ZSR (paper)": (TGAZSR, PRESETS["paper"]),
    "TGA-ZSR (released)": (TGAZSR, PRESETS["released"]),
    "Comp-TGA": (CompTGA, PRESETS["comp"]),
    "Vision-guided": (VisionGuided, STRICT),
    "CE + L_AR": (TGAZSR, replace(STRICT, beta=0.0)),
    "CE + L_AMC": (TGAZSR, replace(STRICT, alpha=0.0)),
    "TGA-ZSR (l1)": (TGAZSR, replace(STRICT, metric="l1")),
    "TGA-ZSR (cos)": (TGAZSR, replace(STRICT, metric="cosine")),
    "TGA-ZSR (l1, equal force)": (TGAZSR, replace(STRICT, metric="l1", gain=GAIN_L1)),
    "TGA-ZSR (cos, equal force)": (TGAZSR, replace(STRICT, metric="cosine", gain=GAIN_COSINE)),
}
# The prompt-tuned ones, each with the prompts, the style and the choices of its paper.
PROMPT_METHODS: dict[str, Method] = {**RIVALS, **capt.METHODS, **cba_fapt.METHODS}
# Those that train nothing and adapt to each image; None: no recipe, a class of its own.
TEST_TIME: dict[str, Recipe | None] = {**test_time.METHODS, "TTC": None, **a_tpt.METHODS}


def build(name: str, clip: ZeroShotCLIP, *, alpha: float = STRICT.alpha, beta: float = STRICT.beta) -> FineTuning:
    """An untrained defense by name. alpha, beta: the weights of "TGA-ZSR"; its variants follow in proportion."""
    if name not in METHODS:
        raise UserError(f"unknown defense {name!r}; {near_miss(name, names())}")
    kind, config = METHODS[name]
    if config is None:
        return kind(clip, name)
    weights = {"alpha": config.alpha * alpha / STRICT.alpha, "beta": config.beta * beta / STRICT.beta}
    return kind(clip, replace(config, **weights), name)


def build_prompts(
    name: str, clip: ZeroShotCLIP, class_names: Sequence[str] = (), *, spec: PromptSpec | None = None, config=None, **options
) -> PromptTuning | LinearProbe:
    """An untrained prompt-tuned defense by name, in front of `clip`, which it freezes and shares.

    class_names: read by methods that know their classes (class-specific contexts, PAFT). spec, config: other prompts or
    choices than the paper's, which are scaled to the towers (`scaled_spec`). options: "teacher" of CAPT.
    """
    if name not in PROMPT_METHODS:
        raise UserError(f"unknown prompt-tuned defense {name!r}; {near_miss(name, PROMPT_METHODS)}")
    method = PROMPT_METHODS[name]
    spec = scaled_spec(clip, method.spec) if spec is None else spec
    own = class_names if spec.class_specific or method.kind is LinearProbe else ()
    return method.kind(clip, spec, name, own, method.config if config is None else config, **options)


def build_test_time(name: str, clip: ZeroShotCLIP, recipe: Recipe | None = None) -> TestTime | TTC:
    """A defense at test time by name, in front of any CLIP, fine-tuned or not. recipe: another than the name's.

    Raises UserError for a recipe that the tower cannot serve.
    """
    if recipe is None and name not in TEST_TIME:
        raise UserError(f"unknown test-time defense {name!r}; {near_miss(name, TEST_TIME)}")
    recipe = TEST_TIME[name] if recipe is None else recipe
    return TTC(clip) if recipe is None else TestTime(clip, name, recipe)


def names() -> tuple[str, ...]:
    """Names that `load_defense` takes: no defense, and every method of the book."""
    return ("none", *METHODS, *PROMPT_METHODS, *TEST_TIME)


def load_defense(name: str, clip: ZeroShotCLIP) -> Defense:
    """A defense of `clip`: "none", a test-time one, one with a bundled checkpoint, or the path of a checkpoint file."""
    if name in ("none", "CLIP"):
        return Defense(clip)
    if name in TEST_TIME:
        return build_test_time(name, clip)
    path = Path(name)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"expected a defense checkpoint at {path}, found none; check the path")
        return _from_file(path, clip)
    if name not in names():
        raise UserError(f"unknown defense {name!r}; {near_miss(name, names())}")
    path = checkpoint(name, clip.name)
    if not path.exists():
        raise UserError(
            f"no bundled checkpoint of {name!r} for {clip.name}; use nano or train it and pass its file's path"
        )
    return _from_file(path, clip)


def _from_file(path: Path, clip: ZeroShotCLIP) -> Defense:
    facts = read_facts(path)
    method = facts["method"]
    if facts.get("kind") != KIND:
        return load_change(build(method, clip) if method in METHODS else FineTuning(clip, method), path)
    facts = prompt_facts(path)
    if method not in PROMPT_METHODS:
        raise UserError(f"{path.name}: unknown prompt-tuned defense {method!r}; {near_miss(method, PROMPT_METHODS)}")
    default = PROMPT_METHODS[method].config
    try:
        spec, config = PromptSpec(**facts["spec"]), default and type(default)(**facts["config"])
    except TypeError as error:
        raise UserError(f"{path.name}: expected the choices of {method}, got others ({error}); make it again") from None
    carrier = load_defense(facts["backbone"], clip).clip
    return load_prompts(build_prompts(method, carrier, facts["class_names"], spec=spec, config=config), path)


def checkpoint(name: str, base: str) -> Path:
    """Where the bundled checkpoint of a method lies."""
    return asset("defenses", f"{base}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.safetensors")


def search_results(base: str) -> dict:
    """Every setting that was tried on held-back training images before the bundled checkpoints were trained."""
    return json.loads(asset("defenses", f"{base}-search.json").read_text())
