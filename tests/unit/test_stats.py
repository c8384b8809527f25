import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import (
    bootstrap_mean,
    harmonic_mean,
    mcnemar,
    paired_bootstrap,
    paired_shares,
    seed_spread,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (41, 100), (1, 5000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(successes, n, level):
    expected = scipy_stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_known_values():
    # 0 of 10 at 95 %: hi = z^2 / (n + z^2) with z = 1.959964
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(UserError, match="successes"):
        wilson(successes, n)


def test_bootstrap_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    half = 1.96 * values.std() / math.sqrt(len(values))
    lo, hi = bootstrap_mean(values)
    assert lo == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert hi == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_counting_levels_is_the_ordinary_bootstrap():
    values = (np.arange(200) % 3 == 0).astype(float)
    rng = np.random.default_rng(5)
    plain = values[rng.integers(200, size=(4000, 200))].mean(axis=1)
    assert bootstrap_mean(values) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.008)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    b = rng.random(400) < 0.5
    a = b.copy()
    a[np.flatnonzero(~b)[:20]] = True  # a gets the same ones right and 20 more
    diff, lo, hi = paired_bootstrap(a, b)
    sd = math.sqrt(0.05 * 0.95 / 400)
    assert diff == pytest.approx(0.05)
    assert (lo, hi) == pytest.approx((0.05 - 1.96 * sd, 0.05 + 1.96 * sd), abs=0.004)
    assert lo > 0
    assert np.array([paired_bootstrap(b, a)]) == pytest.approx(np.array([[-diff, -hi, -lo]]), abs=0.003)


def verdicts(both, only_a, only_b, neither):
    """Two lists of verdicts with these counts."""
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    return a, np.repeat([True, False, True, False], [both, only_a, only_b, neither])


def test_paired_shares_is_the_worked_example_of_its_method():
    """Altman et al., Statistics with Confidence (2000), Table 6.2 and page 52: 0.122, 95 % interval 0.011 to 0.226."""
    diff, lo, hi = paired_shares(*verdicts(14, 5, 0, 22))
    assert (diff, lo, hi) == pytest.approx((5 / 41, 0.011, 0.226), abs=6e-4)
    assert paired_shares(*verdicts(14, 0, 5, 22)) == pytest.approx((-diff, -hi, -lo))


def test_paired_shares_keeps_a_width_where_no_verdict_differs():
    for right in (0, 30, 100):
        diff, lo, hi = paired_shares(*verdicts(right, 0, 0, 100 - right))
        assert diff == 0 and 0.005 < hi < 0.05 and lo == pytest.approx(-hi)
    # Of nothing right on either side: the ends are those of Wilson's interval, z² / (n + z²).
    assert paired_shares(*verdicts(0, 0, 0, 100))[2] == pytest.approx(3.841459 / 103.841459, abs=1e-6)


def test_paired_shares_agrees_with_resampling_where_many_verdicts_differ():
    a, b = verdicts(900, 400, 250, 450)
    assert paired_shares(a, b) == pytest.approx(paired_bootstrap(a, b), abs=0.002)


@pytest.mark.parametrize("chances", [(0.4, 0.05, 0.02, 0.53), (0.02, 0.03, 0.0, 0.95), (0.3, 0.2, 0.2, 0.3)])
def test_paired_shares_covers_the_truth_as_often_as_it_says(chances):
    """Over all tables of 24 images, each with its probability."""
    n, covered = 24, 0.0
    for counts in (c for c in itertools.product(range(n + 1), repeat=4) if sum(c) == n):
        weight = scipy_stats.multinomial.pmf(counts, n, chances)
        if weight > 1e-7:
            _, lo, hi = paired_shares(*verdicts(*counts))
            covered += weight * (lo <= chances[1] - chances[2] <= hi)
    assert 0.93 < covered <= 1


def test_strata_weigh_equally():
    # Group "x" of 10 gains 1.0, group "y" of 90 gains 0: the unweighted mean is 0.5, the pooled one would be 0.1.
    a = np.r_[np.ones(10), np.zeros(90)]
    diff, lo, hi = paired_bootstrap(a, np.zeros(100), strata=["x"] * 10 + ["y"] * 90)
    assert (diff, lo, hi) == (0.5, 0.5, 0.5)


def test_same_seed_same_interval():
    a, b = np.arange(50) % 2, np.arange(50) % 5 == 0
    first, again, other = (paired_bootstrap(a, b, seed=seed, n_resamples=199) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (3, 9), (7, 7), (400, 460)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    a = np.r_[np.ones(only_a), np.zeros(only_b), np.ones(30), np.zeros(4)]
    b = np.r_[np.zeros(only_a), np.ones(only_b), np.ones(30), np.zeros(4)]
    flips = only_a + only_b
    expected = scipy_stats.binomtest(only_a, flips).pvalue if flips else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_seed_spread():
    assert seed_spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    mean, sd, n = seed_spread([0.4])
    assert (mean, n) == (0.4, 1) and math.isnan(sd)


def test_harmonic_mean_is_that_of_the_base_to_new_tables():
    """Rows of Tables 2 and 3 of CBA-FAPT, and the H4 that the specification computed from them."""
    assert harmonic_mean(70.74, 55.74) == pytest.approx(62.35, abs=0.005)
    assert harmonic_mean(70.52, 38.05, 49.58, 21.86) == pytest.approx(37.60, abs=0.005)
    assert harmonic_mean(0.5, 0.0) == 0.0 and harmonic_mean(0.3) == pytest.approx(0.3)
    with pytest.raises(UserError, match="accuracies of at least 0"):
        harmonic_mean(0.5, -0.1)


@pytest.mark.parametrize("bad", [[], [0.1, math.nan], [[0.1, 0.2]]])
def test_bad_values_are_refused(bad):
    with pytest.raises(UserError, match="finite"):
        bootstrap_mean(bad)


def test_unequal_examples_are_refused():
    for test in (paired_bootstrap, paired_shares, mcnemar):
        with pytest.raises(UserError, match="3 and 4"):
            test([0, 1, 1], [0, 1, 1, 0])
