"""A chapter's run: checked arguments in, figures and glued numbers on the way, a result card at the end."""

import math
import os
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .. import data, runtime
from ..cards import Card
from ..claims import decide, load_claims
from ..clip import ZeroShotCLIP, is_registered, load_clip
from ..data import ImageSet
from ..records import Store, write_whole
from ..runner import OUT, check_resources, check_seed
from ..runtime import UserError
from .markup import Html, display, figure
from .tables import command_line, provenance_table

OWN = ("profile", "seed", "device", "data_root", "pretrained", "out")
PRINTED = ("python", "robustvlm_lite", "torch", "open_clip_torch", "torchattacks")  # the card names the others too
MIN_ALT = 15  # characters; less describes nothing
_current: "Run | None" = None  # the run that `show` and `glue` belong to


@dataclass
class Run:
    """One execution of a chapter. `card` collects its rows, `store` keeps its finished cells, `out` holds its files."""

    chapter: str
    profile: str
    seed: int
    device: torch.device
    data_root: str
    pretrained: str
    sizes: SimpleNamespace
    out: Path
    kept: bool  # False if `out` is a temporary folder
    parameters: dict
    store: Store
    card: Card
    glued: dict = field(default_factory=dict)
    _clip: ZeroShotCLIP | None = None

    def load_clip(self) -> ZeroShotCLIP:
        """The profile's CLIP, or the registered one that `pretrained` names, on the run's device; loaded once."""
        if self._clip is None:
            named = is_registered(self.pretrained)
            model, weights = (self.pretrained, "") if named else (self.sizes.model, self.pretrained)
            self._clip = load_clip(model, pretrained=weights, device=str(self.device))
        return self._clip

    def load(self, name: str, split: str = "test", n: int = 0) -> ImageSet:
        """A data set by name at the CLIP's image size; n > 0: a class-balanced subset drawn by the run's seed.

        Training images are the same for every seed, as for the bundled checkpoints.
        """
        size, seed = self.load_clip().image_size, self.seed if split == "test" else 0
        return data.load(name, split, data_root=self.data_root, size=size, n=n, seed=seed)

    def finish(self) -> Path:
        """Decide the claims, write examples.parquet and then card.json; returns the path of the card.

        May be called again, e.g. when a reader runs the last cell twice.
        """
        for decided in decide(load_claims(chapter=self.chapter), self.card.as_dict(), self.card.examples):
            self.card.claim(**decided)
        return self.card.write(self.out)


def start(
    chapter: str,
    *,
    profile: str = "tiny",
    seed: int = 0,
    device: str = "",
    data_root: str = "",
    pretrained: str = "",
    out: str = "",
    **parameters,
) -> Run:
    """Begin a chapter: check everything that was asked, print where it runs, and return the Run.

    out: folder of the card, figures and finished cells; empty takes the one that `robustvlm run` names in the
    environment, or makes a temporary one. parameters: the chapter's own
    (`eps_255=1.0`), checked against the ranges in assets/profiles.yml and written into the card; a 0 is replaced by what
    the profile has under that name.

    Our own code draws from keyed generators; the global ones are seeded for third-party code. Raises UserError.
    """
    global _current
    sizes = runtime.profile(chapter, profile)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed: expected a whole number, got {seed!r}; 0 is the book's")
    check_seed(seed)
    parameters = {name: value or getattr(sizes, name, value) for name, value in parameters.items()}
    _check_parameters(parameters, runtime.chapters()[chapter].get("parameters", {}))
    out = out or os.environ.get(OUT, "")
    texts = {"device": device, "data_root": data_root, "pretrained": pretrained, "out": out}
    for name, value in texts.items():
        if not isinstance(value, str | Path):
            raise UserError(f"{name}: expected text, got {value!r}; leave it empty for the default")
    check_resources(chapter, profile, sizes, {name: str(value) for name, value in texts.items()})
    where = runtime.resolve_device(str(device))
    folder = _writable(Path(out)) if out else Path(tempfile.mkdtemp(prefix="robustvlm-"))
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)

    # The card names data and weights by their hashes: their places on this disk are nobody else's. A registered name is.
    if named := is_registered(str(pretrained)):
        parameters |= {"pretrained": str(pretrained)}
    bundled = runtime.asset("clip", f"{pretrained if named else getattr(sizes, 'model', '')}.safetensors")
    weights = Path(pretrained) if pretrained and not named else bundled
    digest = runtime.sha256(weights) if weights.is_file() else ""
    card = Card(chapter, profile, seed, parameters, weights_sha256=digest, device=str(where))
    _current = Run(
        **{"chapter": chapter, "profile": profile, "seed": seed, "device": where, "sizes": sizes},
        **{"data_root": str(data_root), "pretrained": str(pretrained), "parameters": parameters},
        **{"out": folder, "kept": bool(out), "store": Store(folder / "cells"), "card": card},
    )
    print(f"{chapter} · profile {profile} · seed {seed} · {where}, threads: {torch.get_num_threads()}")
    print(" · ".join(f"{name} {version}" for name, version in runtime.versions().items() if name in PRINTED))
    print(f"results: {folder}" if out else "results: a temporary folder (run.out); give out= to keep them")
    return _current


def _check_parameters(parameters: dict, ranges: dict) -> None:
    for name, value in parameters.items():
        meant = get_close_matches(name, (*OWN, *ranges), n=1)
        if name in ranges:
            low, high = ranges[name]
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low < value <= high:
                raise UserError(f"{name}: expected a number in ({low:g}, {high:g}], got {value!r}; choose one inside")
        elif meant:
            raise UserError(f"unknown parameter {name!r}; did you mean {meant[0]!r}?")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"cannot write {folder}: {os.strerror(error.errno)}; choose another out=") from None


def show(fig, name: str, *, alt: str, caption: str = "") -> None:
    """Display a figure, or several side by side, with its alternative text and caption; during a run also save it.

    fig: a matplotlib Figure or a list of them. name: of the PNG under the run's figures/. alt: what a reader who does
    not see the picture must know.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"figure name: expected letters, digits, - and _, got {name!r}; it becomes a file name")
    if len(alt.strip()) < MIN_ALT:
        raise UserError(f"alt: expected a sentence that says what figure {name!r} shows, got {alt!r}")
    figs = list(fig) if isinstance(fig, Sequence) else [fig]
    html, pictures = figure(figs, alt=alt, caption=caption, short=f"figure {name}: {alt}")
    if _current:
        for i, png in enumerate(pictures):
            file = f"{name}-{i + 1}.png" if len(figs) > 1 else f"{name}.png"
            write_whole(_current.out / "figures" / file, lambda path, png=png: path.write_bytes(png))
    display(html)
    for each in figs:
        if hasattr(each, "number"):  # pyplot keeps it and would show it again at the end of the cell
            from matplotlib import pyplot

            pyplot.close(each)


def glue(name: str, value) -> None:
    """Make a measured value quotable in the text as {glue:text}`name:.1f`; the run keeps it in `glued`."""
    value = value.item() if hasattr(value, "item") else value
    if _current:
        _current.glued[name] = value
    from IPython import get_ipython

    if get_ipython() is not None:
        from myst_nb import glue as glue_to_page

        glue_to_page(name, value, display=False)


def footer(run: Run) -> Html:
    """Finish the run (`Run.finish`) and show where its numbers come from; the last code cell of a chapter."""
    run.finish()
    places = {"data_root": run.data_root, "pretrained": run.pretrained}
    given = {name: place for name, place in places.items() if place} | run.parameters
    command = command_line(run.chapter, run.profile, run.seed, given)
    return provenance_table(run.card.as_dict(), out=str(run.out) if run.kept else "", command=command)
