"""How much of a caption an attack leaves, counted from the floor: the same score against another image's caption.

A model that says one thing about every picture keeps all of it under any attack. Its floor says so (specification of
arXiv 2402.03627, section 4.2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime import UserError, generator
from .captions import CaptionMetrics, CaptionScores
from .resampling import Values, bootstrap_values, corpus_values

UNDEFINED = "undefined"  # the corrected score where the floor leaves nothing above it
ROOM = 1e-6  # a floor closer to 1 counts as 1: pycocoevalcap's BLEU of equal texts misses it by 1e-9


@dataclass(frozen=True)
class Consistency:
    """Attacked captions scored against the model's own clean ones, and against those of other images."""

    scores: CaptionScores
    floors: CaptionScores

    def row(self, metric: str) -> dict[str, float | str]:
        """{"score", "floor", "corrected"} of a metric, for tables and cards; corrected is a number or "undefined"."""
        score, floor = self.scores.corpus[metric], self.floors.corpus[metric]
        corrected = float(_corrected(metric, np.array([score]), np.array([floor]))[0])
        return {"score": score, "floor": floor, "corrected": UNDEFINED if math.isnan(corrected) else corrected}

    def corrected_values(self, metric: str) -> Values:
        """The corrected score of resampled images, as `corpus_values` gives a plain one; NaN where it is undefined."""
        score, floor = corpus_values(self.scores, metric), corpus_values(self.floors, metric)
        return lambda counts: _corrected(metric, score(counts), floor(counts))


def consistency(metrics: CaptionMetrics, attacked: Sequence[str], clean: Sequence[str], *, seed: int = 0) -> Consistency:
    """Score attacked [N] against clean captions [N] of the same images, and against those of a seeded permutation.

    No image meets its own caption in the permutation. Raises UserError for fewer than two images, where there is no other.
    """
    if len(attacked) != len(clean):
        raise UserError(f"expected captions of the same images, got {len(attacked)} attacked and {len(clean)} clean ones")
    other = derangement(len(clean), seed)
    return Consistency(metrics.score(attacked, clean), metrics.score(attacked, [clean[i] for i in other]))


def paired_corrected(
    a: Consistency, b: Consistency, metric: str, *, seed: int = 0, n_resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of the corrected score of a minus that of b over resampled images; NaN where one is undefined."""
    if len(a.scores) != len(b.scores):
        raise UserError(f"expected scores of the same images, got {len(a.scores)} and {len(b.scores)}; compare equal subsets")
    of_a, of_b = a.corrected_values(metric), b.corrected_values(metric)
    return bootstrap_values(lambda w: of_a(w) - of_b(w), len(a.scores), seed=seed, n_resamples=n_resamples, level=level)


def derangement(n: int, seed: int = 0) -> list[int]:
    """A seeded permutation of 0..n-1 that leaves nothing in its place: every image follows another on one random circle."""
    if n < 2:
        raise UserError(f"expected at least 2 images for a floor, got {n}; add images")
    circle = torch.randperm(n, generator=generator(seed, "floor")).tolist()
    other = [0] * n
    for here, there in zip(circle, circle[1:] + circle[:1], strict=True):
        other[here] = there
    return other


def _corrected(metric: str, score: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """(score - floor) / (1 - floor), NaN where the floor is 1; CIDEr does not end at 1, so its difference alone."""
    if metric == "cider":
        return score - floor
    room = 1 - floor
    return np.divide(score - floor, room, out=np.full_like(room, math.nan), where=room > ROOM)
