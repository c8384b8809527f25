"""Intervals of corpus scores: images are drawn again and the score of the set is computed again, not averaged.

BLEU is a function of sums over images, and CIDEr of sums whose word weights depend on the images drawn. Both are written here as
products with the counts of a resample, so that a thousand of them cost a second; they give what pycocoevalcap gives.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..runtime import UserError, near_miss
from .captions import BLEUS, CaptionScores

Values = Callable[[np.ndarray], np.ndarray]  # counts [R, N] of how often each image was drawn -> corpus scores [R]
N_GRAMS = 4
SIGMA = 6.0  # of CIDEr's penalty on a difference of lengths, in bigrams, as pycocoevalcap counts them
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's guards of BLEU against division by 0


def corpus_values(scores: CaptionScores, metric: str) -> Values:
    """The function that scores a resample of the images by `metric`: BLEU and CIDEr recomputed, the others a mean over images.

    METEOR of a set is not the mean of its images, but close to it; its intervals are those of the mean.
    """
    if metric not in scores.corpus:
        raise UserError(f"expected a metric that was scored, got {metric!r}; {near_miss(metric, scores.corpus)}")
    if metric in BLEUS:
        return _bleu(scores, int(metric[-1]))
    if metric == "cider":
        return _cider(scores)
    each = scores.per_image[metric]
    return lambda counts: counts @ each / counts.sum(1)


def bootstrap_values(
    statistic: Values, n: int, *, seed: int = 0, n_resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """`(value, lo, hi)` of any function of resampled images: its value on all n, and the percentile interval.

    An undefined value in a resample makes the bounds NaN, which no rule takes for a difference.
    """
    if n < 2 or n_resamples < 1:
        raise UserError(f"expected at least 2 images and 1 resample, got {n} and {n_resamples}")
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // n)
    sizes = [min(chunk, n_resamples - done) for done in range(0, n_resamples, chunk)]
    drawn = np.concatenate([statistic(rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)) for size in sizes])
    value = float(statistic(np.ones((1, n)))[0])
    if not np.isfinite(drawn).all():
        return value, math.nan, math.nan
    lo, hi = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return value, float(lo), float(hi)


def paired_corpus_bootstrap(
    a: CaptionScores, b: CaptionScores, metric: str, *, seed: int = 0, n_resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of the corpus score of a minus that of b, on the same images in the same order."""
    if len(a) != len(b):
        raise UserError(f"expected scores of the same images, got {len(a)} and {len(b)}; compare equal subsets")
    of_a, of_b = corpus_values(a, metric), corpus_values(b, metric)
    return bootstrap_values(lambda w: of_a(w) - of_b(w), len(a), seed=seed, n_resamples=n_resamples, level=level)


# ---- BLEU


def _bleu(scores: CaptionScores, order: int) -> Values:
    """Corpus BLEU of orders up to `order` with the closest reference length (Papineni et al., 2002)."""
    rows = []
    for said, known in zip(scores.hypotheses, scores.references, strict=True):
        length = len(said.split())
        closest = min((abs(len(text.split()) - length), len(text.split())) for text in known)[1]
        right, possible = [], []
        for k in range(1, order + 1):
            grams, most = _grams(said, k), Counter()
            for text in known:
                most |= _grams(text, k)
            right.append((grams & most).total())
            possible.append(max(0, length - k + 1))
        rows.append([length, closest, *right, *possible])
    table = np.array(rows, dtype=float)

    def values(counts: np.ndarray) -> np.ndarray:
        sums = counts @ table
        precision = (sums[:, 2 : 2 + order] + TINY) / (sums[:, 2 + order :] + SMALL)
        ratio = (sums[:, 0] + TINY) / (sums[:, 1] + SMALL)
        brief = np.exp(np.minimum(0, 1 - 1 / ratio))
        return brief * np.exp(np.log(precision).mean(axis=1))

    return values


# ---- CIDEr


def _cider(scores: CaptionScores) -> Values:
    """CIDEr-D as pycocoevalcap computes it: the mean over images, references and orders of a clipped cosine, times 10.

    With the weight idf of an n-gram, all three sums of the cosine are linear in idf²: sum min(h, r) r idf² over the root of
    (sum h² idf²)(sum r² idf²). The weights are those of the images drawn: ln(n) - ln(max(1, images whose references hold it)).
    """
    n_references = [len(row) for row in scores.references]
    image_of = np.repeat(np.arange(len(scores)), n_references)  # of each pair (image, reference)
    pairs = [(said, text) for said, row in zip(scores.hypotheses, scores.references, strict=True) for text in row]
    penalty = np.array([math.exp(-((_n_bigrams(said) - _n_bigrams(text)) ** 2) / (2 * SIGMA**2)) for said, text in pairs])
    share = penalty / np.array(n_references)[image_of]
    orders = [_cider_sums(scores, pairs, k) for k in range(1, N_GRAMS + 1)]

    def one(counts: np.ndarray) -> float:
        n, total = counts.sum(), np.zeros(len(pairs))
        for held, shared, said, known in orders:
            weight = (np.log(n) - np.log(np.maximum(1, held.times(counts)))) ** 2
            norm = np.sqrt(said.times(weight) * known.times(weight))
            total += np.divide(shared.times(weight), norm, out=np.zeros_like(norm), where=norm > 0)
        return 10 / N_GRAMS * float(counts[image_of] @ (share * total)) / n

    return lambda counts: np.array([one(row) for row in counts])


class _Sparse:
    """A sparse matrix of cells (row, column, value), for its products with a vector."""

    def __init__(self, cells: Sequence[tuple[int, int, float]], n_rows: int):
        rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
        self.rows, self.columns = np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)
        self.values, self.n_rows = np.array(values, dtype=float), n_rows

    def times(self, vector: np.ndarray) -> np.ndarray:
        return np.bincount(self.rows, self.values * vector[self.columns], minlength=self.n_rows)


def _cider_sums(scores: CaptionScores, pairs: list[tuple[str, str]], k: int) -> tuple[_Sparse, ...]:
    """For k-grams: [V, N], whether an image's references hold one; and min(h, r) r, h² and r², each [pairs, V]."""
    index: dict[tuple[str, ...], int] = {}
    held, shared, said, known = [], [], [], []

    def at(gram) -> int:
        return index.setdefault(gram, len(index))

    for image, row in enumerate(scores.references):
        held += [(at(gram), image, 1.0) for gram in set().union(*(_grams(text, k) for text in row))]
    for pair, (hypothesis, reference) in enumerate(pairs):
        h, r = _grams(hypothesis, k), _grams(reference, k)
        shared += [(pair, at(gram), least * r[gram]) for gram, least in (h & r).items()]
        said += [(pair, at(gram), n * n) for gram, n in h.items()]
        known += [(pair, at(gram), n * n) for gram, n in r.items()]
    return (_Sparse(held, len(index)), *(_Sparse(cells, len(pairs)) for cells in (shared, said, known)))


def _grams(text: str, k: int) -> Counter:
    split = text.split()
    return Counter(tuple(split[i : i + k]) for i in range(len(split) - k + 1))


def _n_bigrams(text: str) -> int:
    return max(0, len(text.split()) - 1)
