"""Intervals against known values, and by simulation: how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probe.stats import (
    Interval,
    difference,
    family_wise,
    mean_interval,
    paired_difference,
    wilson,
)

pytestmark = pytest.mark.filterwarnings("error")

LEVEL = 0.95


def wilson_covers(n: int, share: float | np.ndarray, draws: int, seed: int) -> float:
    """The part of simulated experiments in which Wilson's interval holds the true share."""
    rng = np.random.default_rng(seed)
    ends = np.array([(found.low, found.high) for found in (wilson(k, n) for k in range(n + 1))])
    low, high = ends[rng.binomial(n, share, size=draws)].T
    return float(np.mean((low <= share) & (share <= high)))


# Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.estimate == successes / n
    assert found.n == n


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0
    assert wilson(10, 10).low == pytest.approx(1 - wilson(0, 10).high)
    nothing = wilson(0, 0)
    assert math.isnan(nothing.estimate)
    assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)


def test_difference_known_values() -> None:
    """Newcombe (1998), table II, method 10."""
    for counts, low, high in (
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((10, 10, 0, 10), 0.6075, 1.0),
        ((6, 7, 2, 7), 0.0582, 0.8062),
    ):
        found = difference(wilson(*counts[:2]), wilson(*counts[2:]))
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_takes_counts_only() -> None:
    assert wilson(np.int64(3), np.int64(4)) == wilson(3, 4)
    for successes, n in ((5, 4), (-1, 4), (0, -1)):
        with pytest.raises(ValueError, match="trials"):
            wilson(successes, n)
    with pytest.raises(TypeError):
        wilson(0.5, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level"):
        wilson(1, 2, level=95)


@pytest.mark.parametrize("n", [30, 64, 1000])
def test_wilson_coverage_averages_to_its_level(n: int) -> None:
    # Over shares drawn uniformly, the mean coverage is within 0.003 of 0.95 for n >= 30 (summed over the binomial
    # distribution: 0.9523, 0.9515, 0.9503). With 40 000 draws the standard error is 0.0011; allowed are three of them
    # more.
    shares = np.random.default_rng(n).uniform(size=40_000)
    assert abs(wilson_covers(n, shares, 40_000, seed=0) - LEVEL) < 0.003 + 0.0033


@pytest.mark.parametrize(
    ("n", "share", "exact"),
    [
        (30, 0.5, 0.9572),
        (64, 0.5, 0.9401),
        (1000, 0.5, 0.9463),
        (30, 0.99, 0.9639),
        (64, 0.99, 0.9735),
        (1000, 0.99, 0.9635),
    ],
)
def test_wilson_coverage_at_a_share(n: int, share: float, exact: float) -> None:
    # The coverage at one share jumps with n. `exact` is the sum of the binomial probabilities of the counts whose
    # interval, by the score test |count/n - share| <= z * sqrt(share * (1 - share) / n), holds the share. Allowed: 3
    # standard errors.
    z, counts = 1.959964, np.arange(n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts])
    probability = np.exp(log_choose + counts * math.log(share) + (n - counts) * math.log1p(-share))
    kept = np.abs(counts / n - share) <= z * math.sqrt(share * (1 - share) / n)
    assert float(probability[kept].sum()) == pytest.approx(exact, abs=1e-4)
    assert 0.93 < exact < 0.98
    error = math.sqrt(exact * (1 - exact) / 20_000)
    assert wilson_covers(n, share, 20_000, seed=n) == pytest.approx(exact, abs=3 * error)


def test_bca_coverage_on_skewed_values() -> None:
    # Exponential values, n = 30: a longer simulation (2000 samples) gave 0.925, with misses on both sides. With 400
    # samples the standard error is 0.014, so 0.88..0.97 is about three on each side.
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.exponential(size=30), seed=seed, resamples=1000) for seed in range(400)]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in found])
    assert 0.88 < covered < 0.97
    # the long tail is on the right, and so is the longer arm
    assert np.mean([interval.high - 1 > 1 - interval.low for interval in found]) > 0.5
    assert np.mean([i.high - i.estimate > 1.1 * (i.estimate - i.low) for i in found]) > 0.9


def test_bca_agrees_with_student_where_both_hold() -> None:
    x = np.random.default_rng(1).normal(3, 2, size=1000)
    found = mean_interval(x)
    half = 1.962 * x.std(ddof=1) / math.sqrt(len(x))  # 0.975 quantile of t with 999 degrees of freedom
    assert found.estimate == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.08 * half)
    wider = mean_interval(x, level=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_mean_interval_is_seeded() -> None:
    x = np.random.default_rng(2).exponential(size=40)
    assert mean_interval(x) == mean_interval(x)
    assert mean_interval(x, seed=1) != mean_interval(x)


def test_mean_interval_leaves_nan_out() -> None:
    x = np.random.default_rng(3).exponential(size=(5, 8))
    with_holes = np.concatenate([x.ravel(), [np.nan] * 10])
    assert mean_interval(with_holes) == mean_interval(x)
    assert mean_interval(with_holes).n == 40


@pytest.mark.parametrize("values", [[], [np.nan], [2.0], [2.0, np.nan]])
def test_mean_interval_of_too_few(values: list[float]) -> None:
    found = mean_interval(values)
    assert found.n == sum(not math.isnan(value) for value in values)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.estimate == 2.0 if found.n else math.isnan(found.estimate)


@pytest.mark.parametrize("values", [[0.1] * 10, [0.0] * 5, [0.3 - 0.0] * 20 + [0.4 - 0.1]])
def test_mean_interval_of_equal_values(values: list[float]) -> None:
    found = mean_interval(values)
    assert found.low == found.estimate == found.high == values[0]


@pytest.mark.parametrize("values", [[1.0, 2.0], [0] * 31 + [1], [0] * 31 + [1e-12], [0] * 999 + [1]])
def test_mean_interval_of_nearly_equal_values(values: list[float]) -> None:
    found = mean_interval(values)
    assert found.low <= found.estimate <= found.high
    assert found.low < found.high


def test_mean_interval_refuses_infinity() -> None:
    with pytest.raises(ValueError, match="infinite"):
        mean_interval([1.0, math.inf])


def test_interval_prints_as_many_digits_as_matter() -> None:
    assert str(Interval(0.4123, 0.3708, 0.4551, 30, "")) == "0.412 [0.371, 0.455]"
    assert str(Interval(0.00041, 0.00032, 0.00055, 30, "")) == "0.00041 [0.00032, 0.00055]"
    assert str(Interval(1.0, 1.0, 1.0, 30, "")) == "1.000 [1.000, 1.000]"
    assert str(mean_interval([2.0])) == "2.000"  # one episode has no interval
    assert str(mean_interval([])) == "–"


def test_paired_differences_cover_what_is_true():
    """Pairs that agree more than by chance; also near the end, where a bootstrap has no width."""
    rng = np.random.default_rng(5)
    for p, change, n in ((0.7, 0.15, 60), (0.97, 0.02, 80), (0.5, 0.0, 40)):
        truth, covered = -change * p, 0
        for _ in range(600):
            before = rng.random(n) < p
            after = before & (rng.random(n) >= change)
            interval = paired_difference(after.astype(int), before.astype(int))
            covered += interval.low <= truth <= interval.high
        assert covered / 600 > 0.92, (p, change, n)
    unchanged = paired_difference([1] * 20, [1] * 20)
    assert unchanged.estimate == 0 and unchanged.high - unchanged.low > 0.1
    with pytest.raises(ValueError, match="0 or 1"):
        paired_difference([0.5, 1], [0, 1])


def test_uncorrelated_pairs_are_as_two_samples():
    one, other = [1, 1, 0, 0] * 5, [1, 0, 1, 0] * 5
    pair, apart = paired_difference(one, other), difference(wilson(10, 20), wilson(10, 20))
    assert pair.ends == pytest.approx(apart.ends)


def test_family_wise_errors_are_as_rare_as_promised():
    """Eight correlated tests without any effect: one of them is called significant in 5 % of the experiments."""
    rng = np.random.default_rng(6)
    found = [
        family_wise(rng.normal(size=(8, 24)) + rng.normal(size=24), seed=i, resamples=300).min() < 0.05
        for i in range(400)
    ]
    assert 0.02 < np.mean(found) < 0.085
    values = rng.normal(size=(8, 24))
    values[3] += 2
    p = family_wise(values)
    assert p[3] < 0.01 and (np.delete(p, 3) > 0.05).all()
    assert family_wise(np.zeros((2, 9))).tolist() == [1, 1]
    assert family_wise(np.full((1, 12), -0.5))[0] < 0.01  # all alike, and none of them 0
    missing = np.vstack([values, np.full(24, np.nan)])
    missing[0, 5] = np.nan  # leaves out an episode for all
    assert np.isnan(family_wise(missing)[8])
    assert family_wise(missing)[:8].tolist() == family_wise(np.delete(values, 5, axis=1)).tolist()
    assert np.isnan(family_wise([[1.0, np.nan]])).all()
    with pytest.raises(ValueError, match="infinite"):
        family_wise([[1.0, np.inf]])
