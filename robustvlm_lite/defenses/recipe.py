"""What a defense at test time does with an image, as one set of choices; what it costs, and what it saw."""

from dataclasses import dataclass, replace

from torch import Tensor

from .. import attention, views
from ..runtime import UserError, near_miss

MIXING = ("none", "augmix", "guided")
LOSSES = ("", "marginal", "pointwise")
ANSWERS = ("anchor", "uniform", "neighbors", "tv", "mode")
CONTROLS = ("random", "inverted", "uniform")  # beside the forms of `attention.guide`


@dataclass(frozen=True)
class Recipe:
    """What a method does with an image; the defaults are those that TPT and its heirs share.

    n_views: with the image itself as the first. base, mixing: how the others are made: `views.KINDS`, then nothing,
    AugMix blended with the base, or mixed under attention (A-TPT).  chosen: how many of the surest views the loss reads.
    loss: of the one AdamW step on the context: "" tunes nothing, "marginal" is the entropy of the mean prediction (TPT),
    "pointwise" the mean of the entropies (R-TPT, A-TPT); dispersion: weight of the spread of the class texts (C-TPT).
    answer: the image's own ("anchor"), all views alike ("uniform"), weighed by their neighbors (R-TPT) or by the calm of
    their maps (A-TPT), or the text nearest to the features' mode (MTA).  as_logits: views are averaged as logits, not as
    probabilities.

    guide, r, lam_high, lam_low: of the guided mixing, see `attention.guide` and `views.guided_mix`; a "random" map, the
    "inverted" mask and a "uniform" strength are its controls.  tv_scale, tv_temperature: see `attention.total_variation`.
    Quirks of released code: quirk_leak, the map is made with the context that the image before left behind;
    quirk_quantile and quirk_self, see `views.protected` and `views.neighbor_weights`; quirk_truncate, pixels are cut off to
    8 bits, not rounded.
    """

    template: str = "a photo of a {}."
    n_views: int = 64
    base: str = "rrc_flip"
    mixing: str = "augmix"
    chosen: int = 6
    loss: str = ""
    dispersion: float = 0.0
    answer: str = "anchor"
    as_logits: bool = False
    n_neighbors: int = 20
    lr: float = 5e-3
    weight_decay: float = 0.01
    guide: str = "paper"
    r: float = 0.2
    lam_high: float = 0.2
    lam_low: float = 0.8
    tv_scale: str = "minmax_grid"
    tv_temperature: float = 1.0
    quirk_leak: bool = False
    quirk_quantile: bool = False
    quirk_self: bool = False
    quirk_truncate: bool = False

    def __post_init__(self):
        named = {"base": views.KINDS, "mixing": MIXING, "loss": LOSSES, "answer": ANSWERS}
        named |= {"guide": (*attention.FORMS, *CONTROLS), "tv_scale": attention.SCALES}
        for name, known in named.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; {near_miss(str(getattr(self, name)), known)}")
        if self.n_views < 1:
            raise UserError(f"n_views: expected at least 1, the image itself, got {self.n_views}; the papers take 64")
        if not 1 <= self.chosen <= self.n_views:
            raise UserError(f"chosen: expected 1 to {self.n_views}, the number of views, got {self.chosen}; draw more views")
        if not 0 < self.r < 1:
            raise UserError(f"r: expected a share of pixels between 0 and 1, got {self.r!r}; A-TPT's code uses 0.2")
        if not 0 <= self.lam_high <= self.lam_low <= 1:
            got = f"lam_high {self.lam_high!r} and lam_low {self.lam_low!r}"
            raise UserError(f"expected 0 <= lam_high <= lam_low <= 1 (protected pixels are mixed less), got {got}; swap them")
        if not (self.lr > 0 and self.tv_temperature > 0):
            raise UserError(f"expected lr and tv_temperature above 0, got {self.lr!r} and {self.tv_temperature!r}")

    def fewer(self, n_views: int) -> "Recipe":
        """The same method on another number of views, with its counts in proportion; for attackers and small machines."""
        share = n_views / self.n_views
        return replace(
            self, n_views=n_views, chosen=max(1, round(share * self.chosen)), n_neighbors=max(1, round(share * self.n_neighbors))
        )


@dataclass
class Passes:
    """What a defense has cost so far: images and views through the image tower, class texts through the text tower."""

    image_forwards: int = 0
    image_backwards: int = 0
    text_forwards: int = 0
    text_backwards: int = 0


@dataclass
class Evidence:
    """All that a method saw of I images: views [I, V, 3, S, S], base [I, V - 1, 3, S, S] and mask [I, V - 1, S, S] of guided
    mixing, unit features [I, V, D], first [I, V, C] (logits before the step), chosen [I, k], text [C, D] or [I, C, D] after
    it, weights [I, V], logits [I, C]."""

    views: Tensor
    base: Tensor | None = None
    mask: Tensor | None = None
    features: Tensor | None = None
    first: Tensor | None = None
    chosen: Tensor | None = None
    text: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None
