"""Intervals and tests for accuracies: Wilson, paired scores, (paired) bootstrap, McNemar, spread over seeds."""

import math
from statistics import NormalDist

import numpy as np

from .runtime import UserError


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, 1927): `(lo, hi)` as fractions. Honest at 0 and n, unlike Wald's."""
    if not 0 <= successes <= n or n < 1:
        raise UserError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}; was anything measured?")
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    center = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    # At the ends the bound is exactly 0 or 1; the formula misses it by one rounding.
    return (center - half if successes else 0.0), (center + half if successes < n else 1.0)


def bootstrap_mean(values, *, seed: int = 0, n_resamples: int = 10_000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval `(lo, hi)` of the mean of `values` `[n]`."""
    values = _finite(values, "values")
    return _percentiles(_resampled_means(values, np.random.default_rng(seed), n_resamples), level)


def paired_bootstrap(
    a, b, *, strata=None, seed: int = 0, n_resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of mean(a) - mean(b), resampling examples, so that what both share cancels.

    a, b: `[n]` scores of the same examples in the same order (0/1, or shares when several runs were averaged).
    strata: `[n]` group names, e.g. data sets; then the unweighted means over groups are compared, each group resampled.
    """
    a, b = _finite(a, "a"), _finite(b, "b")
    if a.shape != b.shape:
        raise UserError(f"expected scores of the same examples, got {len(a)} and {len(b)}; compare equal subsets")
    strata = np.zeros(len(a), dtype=int) if strata is None else np.asarray(strata)
    rng, delta = np.random.default_rng(seed), a - b
    groups = [delta[strata == name] for name in np.unique(strata)]
    means = np.mean([_resampled_means(group, rng, n_resamples) for group in groups], axis=0)
    return (float(np.mean([group.mean() for group in groups])), *_percentiles(means, level))


def paired_shares(a, b, level: float = 0.95) -> tuple[float, float, float]:
    """`(diff, lo, hi)` of share(a) - share(b) for verdicts `[n]` on the same examples: a score interval.

    Wilson's intervals of both shares, squared and added with the correlation of the verdicts (Newcombe, 1998, paired data,
    method 10). Where no verdict differs it still has a width, which resampling does not.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"expected verdicts on the same examples, got {len(a)} and {len(b)}; compare equal subsets")
    n, both, neither = len(a), int((a & b).sum()), int((~a & ~b).sum())
    ones = [int(v.sum()) for v in (a, b)]
    (low_a, high_a), (low_b, high_b) = (wilson(k, n, level) for k in ones)
    p_a, p_b = (k / n for k in ones)
    excess = both * neither - (ones[0] - both) * (ones[1] - both)
    spread = math.sqrt(math.prod(k * (n - k) for k in ones))
    phi = (max(excess - n / 2, 0) if excess > 0 else excess) / spread if spread else 0.0  # corrected for continuity

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    diff = p_a - p_b
    return diff, diff - reach(p_a - low_a, high_b - p_b), diff + reach(p_b - low_b, high_a - p_a)


def mcnemar(a, b) -> float:
    """Exact two-sided p of McNemar's test: does `a` get as many right that `b` gets wrong as the reverse?"""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise UserError(f"expected verdicts on the same examples, got {len(a)} and {len(b)}; compare equal subsets")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    flips = only_a + only_b
    tail = sum(math.comb(flips, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**flips)


def seed_spread(values) -> tuple[float, float, int]:
    """`(mean, sd, n)` over seeds; sd is the sample's (n - 1), and NaN for a single seed, where no spread is known."""
    values = _finite(values, "values")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan, len(values)


def harmonic_mean(*values: float) -> float:
    """n / (1/a + 1/b + ...), as base-to-new tables report it; 0 where one of them is 0."""
    values = _finite(values, "values").tolist()
    if min(values) < 0:
        raise UserError(f"expected accuracies of at least 0, got {values}; their harmonic mean has no meaning")
    return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0


def _finite(values, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise UserError(f"expected {name} as a non-empty list of finite numbers, got shape {values.shape}")
    return values


def _resampled_means(values: np.ndarray, rng: np.random.Generator, n_resamples: int) -> np.ndarray:
    # Resampling n examples is drawing how often each distinct value comes up: exact, and for 0/1 data 3 columns, not n.
    levels, counts = np.unique(values, return_counts=True)
    chunk = max(1, 4_000_000 // len(levels))
    sizes = [min(chunk, n_resamples - done) for done in range(0, n_resamples, chunk)]
    draws = [rng.multinomial(len(values), counts / len(values), size=size) @ levels for size in sizes]
    return np.concatenate(draws) / len(values)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    lo, hi = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(lo), float(hi)
