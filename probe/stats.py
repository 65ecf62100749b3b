"""Intervals: how far a number may be off because only so many episodes were seen.

A share of episodes (accuracy, copy rate) takes :func:`wilson`, a change of it between two readings of the same episodes
:func:`paired_difference`; the mean of any other number per episode, and a paired difference is one, takes
:func:`mean_interval`. All speak of *other episodes of the same kind*, with the model, the
seeds and everything else held as they are.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
"""Bootstrap resamples: the ends of a 95 % interval then rest on about 100 of them each."""

ROUNDING = 1e-12
"""Values that differ by less than this, relative to the largest, are equal: 0.3 - 0.0 and 0.4 - 0.1 are."""


ENDS = ("estimate", "low", "high")
"""What summaries of results hold along their dimension ``end``."""


@dataclass(frozen=True)
class Interval:
    """A number with its uncertainty.

    Attributes
    ----------
    estimate
        The share or the mean; NaN if there was nothing to take it from.
    low, high
        The ends of the interval; NaN where none can be given.
    n
        The number of values that it rests on.
    method
        How the interval was found.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str

    @property
    def ends(self) -> list[float]:
        """In the order of :data:`ENDS`."""
        return [self.estimate, self.low, self.high]

    def __str__(self) -> str:
        """Three decimals, or as many as show two digits of the width: ``0.412 [0.371, 0.455]``; no ends: ``0.412``."""
        if math.isnan(self.low):
            return "–" if math.isnan(self.estimate) else f"{self.estimate:.3f}"
        width = self.high - self.low
        digits = 3 if width <= 0 else min(9, max(3, 1 - math.floor(math.log10(width))))
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def wilson(successes: SupportsIndex, n: SupportsIndex, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Unlike the estimate plus or minus two standard errors, it does not collapse at 0 or n successes and keeps its level
    near 0 and 1. Of no trials nothing is known: the interval is then [0, 1] and the estimate NaN.

    Parameters
    ----------
    successes
        How many of the ``n`` trials.
    n
        Number of independent trials.
    level
        Probability with which such an interval holds the true share.

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        If ``successes`` is not within 0..n, or ``level`` not within 0..1.

    References
    ----------
    Wilson (1927), JASA 22: 209-212; written as in Brown, Cai and DasGupta (2001), Statistical Science 16: 101-133,
    section 3.1.1.

    Examples
    --------
    >>> print(wilson(9, 10))
    0.900 [0.596, 0.982]
    """
    _check_level(level)
    wins, trials = operator.index(successes), operator.index(n)
    if not 0 <= wins <= trials:
        raise ValueError(f"Of {trials} trials {wins} cannot have succeeded.")
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0, 0, "Wilson")
    share = wins / trials
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # The ends that are exactly 0 and 1 are not left to rounding.
    low = 0.0 if wins == 0 else centre - half
    high = 1.0 if wins == trials else centre + half
    return Interval(share, low, high, trials, "Wilson")


def difference(one: Interval, other: Interval) -> Interval:
    """Newcombe's interval for the difference of two independent shares, from Wilson's interval of each.

    Parameters
    ----------
    one, other
        From :func:`wilson`, at the same level.

    Returns
    -------
    Interval
        Of ``one - other``; ``n`` is the smaller of the two.

    References
    ----------
    Newcombe (1998), Statistics in Medicine 17: 873-890, method 10.

    Examples
    --------
    >>> print(difference(wilson(56, 70), wilson(48, 80)))
    0.200 [0.052, 0.334]
    """
    estimate = one.estimate - other.estimate
    below = math.hypot(one.estimate - one.low, other.high - other.estimate)
    above = math.hypot(one.high - one.estimate, other.estimate - other.low)
    return Interval(estimate, estimate - below, estimate + above, min(one.n, other.n), "Newcombe")


def paired_difference(one: ArrayLike, other: ArrayLike, level: float = 0.95) -> Interval:
    """Newcombe's interval for the difference of two shares of the same episodes.

    Unlike a bootstrap it has a width where no episode changed: few episodes cannot show that none would.

    Parameters
    ----------
    one, other
        For each episode 0 or 1; equally many.
    level
        Of the interval.

    Returns
    -------
    Interval
        Of ``one - other``.

    Raises
    ------
    ValueError
        If the two are not equally many numbers, 0 or 1, or there are none.

    References
    ----------
    Newcombe (1998), Statistics in Medicine 17: 2635-2650, method 10: the intervals of the two shares as in
    :func:`difference`, and their correlation from the table of pairs, with a continuity correction.

    Examples
    --------
    >>> print(paired_difference([1] * 32 + [0] * 18, [1] * 20 + [0] * 12 + [1] * 2 + [0] * 16))
    0.200 [0.056, 0.329]
    """
    import numpy as np

    a, b = (np.asarray(values, dtype=np.float64).ravel() for values in (one, other))
    if a.shape != b.shape or not len(a) or not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("A paired difference of shares needs 0 or 1 for each episode, twice.")
    n = len(a)
    first, second = wilson(int(a.sum()), n, level), wilson(int(b.sum()), n, level)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    product = both * neither - (a.sum() - both) * (b.sum() - both)
    margins = a.sum() * (n - a.sum()) * b.sum() * (n - b.sum())
    correlation = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    estimate = first.estimate - second.estimate
    below = reach(first.estimate - first.low, second.high - second.estimate)
    above = reach(first.high - first.estimate, second.estimate - second.low)
    return Interval(estimate, estimate - below, estimate + above, n, "Newcombe, paired")


def mean_interval(values: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval for a mean over episodes.

    It follows the skewness of the values, which attention masses have. It cannot know of what did not occur: if all
    values are equal, its width is 0 (where they are successes, :func:`wilson` is the honest one).

    Parameters
    ----------
    values
        One number per episode, in any shape. NaN means that the episode has none, and is left out.
    level
        Probability with which such an interval holds the true mean; for few and skewed values the actual one is lower
        (about 0.92 instead of 0.95 for 30 values of an exponential distribution).
    seed
        Of the resampling: the same values give the same interval.
    resamples
        Number of bootstrap samples.

    Returns
    -------
    Interval
        With ``n`` the number of values that are not NaN. Below two of them, the ends are NaN.

    Raises
    ------
    ValueError
        If ``level`` is not within 0..1, or a value is infinite.

    References
    ----------
    Efron (1987), JASA 82: 171-185; computed by ``scipy.stats.bootstrap``.
    """
    import numpy as np

    _check_level(level)
    x = np.asarray(values, dtype=np.float64).ravel()
    x = x[~np.isnan(x)]
    if np.isinf(x).any():
        raise ValueError("There is no mean of infinite values.")
    n = len(x)
    estimate = float(x.mean()) if n else math.nan
    if n < 2:
        return Interval(estimate, math.nan, math.nan, n, "too few")
    if np.ptp(x) <= ROUNDING * np.abs(x).max():
        return Interval(float(x[0]), float(x[0]), float(x[0]), n, "all equal")

    from scipy import stats

    found = stats.bootstrap(
        (x,),
        np.mean,
        vectorized=True,
        method="BCa",
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // n),  # at most 32 MB at a time
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high), n, "BCa bootstrap")


def ratio_interval(
    top: ArrayLike, bottom: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval for a ratio of two means over the same episodes.

    The percentiles are of resampled episodes, each with its two values. BCa, as in :func:`mean_interval`, would need
    the ratio without each episode, which may not exist.

    Parameters
    ----------
    top, bottom
        One number per episode each.
    level, seed, resamples
        As in :func:`mean_interval`.

    Returns
    -------
    Interval
        NaN throughout if the mean of ``bottom`` is not above 0. The ends are NaN if that holds in more than half as
        many resamples as the level leaves outside: the ratio then has no interval.

    Raises
    ------
    ValueError
        If the two do not have equally many values, all finite.
    """
    import numpy as np

    _check_level(level)
    a, b = (np.asarray(values, dtype=np.float64).ravel() for values in (top, bottom))
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("A ratio of means needs two finite numbers for each episode.")
    n = len(a)
    if not n or b.mean() <= 0:
        return Interval(math.nan, math.nan, math.nan, n, "undefined")
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for start in range(0, resamples, 500):
        drawn = rng.integers(n, size=(min(500, resamples - start), n))
        below = b[drawn].mean(1)
        ratios[start : start + 500] = np.where(below > 0, a[drawn].mean(1) / np.where(below > 0, below, 1), np.nan)
    estimate = float(a.mean() / b.mean())
    if n < 2 or np.isnan(ratios).mean() > (1 - level) / 2:
        return Interval(estimate, math.nan, math.nan, n, "no interval")
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), n, "percentile bootstrap")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"A level lies between 0 and 1, {level} does not.")


def family_wise(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """How surprising the means of several numbers per episode are, corrected for looking at all of them.

    The signs of whole episodes are flipped at random, which changes nothing if the numbers are symmetric around 0. The
    largest studentised mean of all tests after each flip is what chance alone brings about (Westfall and Young, 1993).

    Parameters
    ----------
    values
        ``[test, episode]``; the same episodes in all tests. NaN is undefined: a test that is undefined in all episodes
        has no p, and an episode in which another is undefined is left out.
    seed
        Of the flips.
    resamples
        Number of flips.

    Returns
    -------
    ndarray
        ``[test]``, p: the share of flips (this one included) whose largest |t| reaches the test's. 1 where all numbers
        are 0, NaN without two episodes. With fewer than 6 episodes, none can be below 0.05.

    Raises
    ------
    ValueError
        If it is no such array, or a number is infinite.
    """
    import numpy as np

    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 2 or np.isinf(given).any():
        raise ValueError("Tests need numbers that are not infinite, [test, episode].")
    p = np.full(len(given), np.nan)
    usable = ~np.isnan(given).all(1)
    x = given[usable]
    x = x[:, ~np.isnan(x).any(0)]
    n = x.shape[1]
    if n < 2:
        return p
    squares = (x * x).mean(1)
    scale = np.sqrt(squares)

    def size(means: NDArray[np.float64]) -> NDArray[np.float64]:
        # |mean| / root mean square grows with |t|, and stays finite where all numbers are alike.
        return np.asarray(np.abs(np.divide(means, scale, out=np.zeros_like(means), where=scale > 0)))

    observed = size(x.mean(1))
    rng = np.random.default_rng(seed)
    reached = np.ones(len(x))
    for start in range(0, resamples, 500):
        signs = rng.integers(0, 2, size=(min(500, resamples - start), n)) * 2.0 - 1
        largest = size(signs @ x.T / n).max(1, initial=0)
        reached += (largest[:, None] >= observed - ROUNDING).sum(0)
    p[usable] = np.where(scale > 0, reached / (resamples + 1), 1.0)
    return p


def median_interval(values: ArrayLike) -> tuple[float, float]:
    """A 95 % interval for the median: the tightest symmetric pair of order statistics that covers it.

    Nothing is assumed about the distribution. With fewer than six values not even the smallest and the largest cover
    the median so often; they are what is returned.

    >>> median_interval([3, 1, 2, 5, 4, 6, 8, 7, 9, 10])
    (2.0, 9.0)
    """
    import numpy as np
    from scipy.stats import binom

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    lower = int(binom.ppf(0.025, n, 0.5))
    while lower > 0 and 1 - 2 * binom.cdf(lower, n, 0.5) < 0.95:  # what the pair (lower, n - 1 - lower), from 0, covers
        lower -= 1
    return float(ordered[lower]), float(ordered[n - 1 - lower])
