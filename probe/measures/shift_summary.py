"""From what the demonstrations shift in each episode to how large, how constant and how useful each head's shift is.

MimIC puts ``mu(q) v`` in the place of what the demonstrations do to a head: a size that depends on the query, and a
vector v that does not. How constant it can be is asked here in three ways, of the difference ``d = SA_D - SA_Q`` and of
the shift ``s = mu d`` of episodes, in the head's own space (before W_O):

* *agreement*: the mean cosine of the differences of two episodes, 1 if the direction never changes;
* *explained*: the share of ``sum ‖s‖²`` that is explained by ``mu v*``, with the best constant vector
  ``v* = sum mu s / sum mu²`` (least squares) of one half of the episodes, on the other half. A vector that says nothing
  of other episodes explains less than 0;
* *effective rank*: how many directions the shifts take up, ``exp H(p)`` with ``p = σ / sum σ`` of their singular values
  (not centred, so that a constant shift has rank 1).

Beside agreement and rank stands what directions without any order would give.

References
----------
Roy and Vetterli (2007), "The effective rank: A measure of effective dimensionality", EUSIPCO: 606-610; Arvesen (1969),
"Jackknifing U-Statistics", Annals of Mathematical Statistics 40: 2076-2100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.errors import UsageError
from probe.segments import MODALITIES, select_row
from probe.stats import ENDS, ROUNDING, Interval, family_wise, mean_interval

Vectors = NDArray[np.float64]
"""``[episode, width]``."""

RESAMPLES = 1000
GROUPS = 10
DRAWS = 5
SIZES = ("mu", "difference", "shift", "logit_effect")
"""What is averaged over episodes."""

HALVES = ("select", "report")
PARTS = tuple(name for name in MODALITIES if name != "sink")
"""The modalities of demonstrations."""


def summarise_shift(result: xr.Dataset, *, row: str = "answer") -> xr.Dataset:
    """One table of all heads, and where the mass lies by layer.

    Heads are ranked on the selecting half of the episodes, by the mean size of their shift; all numbers are those of
    the reporting half.

    Parameters
    ----------
    result
        Of :func:`probe.shift_map`.
    row
        One label of the coordinate ``row``.

    Returns
    -------
    xarray.Dataset
        Over (layer, head, end): ``mu``, ``difference``, ``shift``, ``logit_effect`` (means over episodes, BCa),
        ``agreement``, ``explained``, ``effective_rank``. Over (layer, head): ``agreement_chance``, which the agreement
        of directions without order exceeds once in twenty times; ``effective_rank_chance``, the rank of shifts of the
        same lengths in random directions; ``p`` of ``logit_effect``, family-wise over all heads (sign flips); ``rank``,
        1 is first; ``n``, the episodes with a difference. Over (layer, modality, end) and (layer, demonstration, end),
        means over heads: ``mu_by_modality``, ``mu_by_demonstration``; over (layer, end) ``sink_mass``, that of the
        first position, which is in no demonstration. Scalar: ``reliability``, Spearman's correlation over heads between
        the two halves' shifts. NaN where there is nothing to say it of.

    Raises
    ------
    UsageError
        If the result has no such row, or no episode has positions for it.
    """
    chosen = select_row(result, row)
    chosen = chosen.isel(episode=np.flatnonzero(chosen["n_positions"].values > 0))
    if not chosen.sizes["episode"]:
        raise UsageError(f"No episode has the row {row}: every answer is a single token. Choose the row answer.")
    select, report = (chosen.isel(episode=np.flatnonzero(chosen["half"].values == half)) for half in HALVES)
    grid = ("layer", "head")
    sizes = {name: report[name].transpose(*grid, "episode").values.astype(float) for name in SIZES}
    heads = [(layer, head) for layer in range(result.sizes["layer"]) for head in range(result.sizes["head"])]
    cells = [_directions(select.isel(layer=at, head=head), report.isel(layer=at, head=head)) for at, head in heads]
    shape = (result.sizes["layer"], result.sizes["head"])
    flat = {name: values.reshape(len(heads), -1) for name, values in sizes.items()}
    ranked = [half["shift"].mean("episode").transpose(*grid).values.ravel() for half in (select, report)]
    numbers = {name: np.array([_mean(of_head) for of_head in values]) for name, values in flat.items()}
    numbers |= {name: np.array([cell[name] for cell in cells]) for name in cells[0]}
    numbers |= {"p": family_wise(flat["logit_effect"]), "rank": _ranks(ranked[0])}
    mass = report["mass"].mean("head")  # every head has the same segments
    places = range(int(result["demonstration"].max()) + 1)
    return xr.Dataset(
        {
            **{
                name: ((*grid, "end") if values.ndim == 2 else grid, values.reshape(*shape, *values.shape[1:]))
                for name, values in numbers.items()
            },
            "mu_by_modality": _by_layer(mass, "modality", PARTS),
            "mu_by_demonstration": _by_layer(mass, "demonstration", places),
            "sink_mass": (("layer", "end"), _means(mass.sel(segment="sink", drop=True))),
            "reliability": ((), _spearman(*ranked)),
        },
        coords={
            "layer": result["layer"].values,
            "head": result["head"].values,
            "end": list(ENDS),
            "modality": list(PARTS),
            "demonstration": list(places),
        },
        attrs={**result.attrs, "row": row, "n_reported": report.sizes["episode"]},
    )


def _directions(select: xr.Dataset, report: xr.Dataset) -> dict[str, object]:
    """What is said of the directions of one head."""
    (mu_select, shifts_select, _), (_, shifts, differences) = _of_head(select), _of_head(report)
    mu = report["mu"].values.astype(float)
    known = ~np.isnan(shifts).any(1)
    vector = best_constant(mu_select, shifts_select)
    agreed = agreement(differences)
    return {
        "agreement": agreed.ends,
        "agreement_chance": isotropic_agreement(agreed.n, shifts.shape[1]),
        "explained": explained(mu[known], shifts[known], vector).ends,
        "effective_rank": rank_interval(shifts[known]).ends,
        "effective_rank_chance": isotropic_rank(shifts[known]),
        "n": agreed.n,
    }


def _of_head(half: xr.Dataset) -> tuple[NDArray[np.float64], Vectors, Vectors]:
    """Mass, shifts and differences of a head's episodes; without mass there is no direction, and nothing to explain."""
    mu = half["mu"].values.astype(float)
    differences = half["difference_vector"].transpose("episode", "width").values.astype(float)
    return mu, mu[:, None] * differences, differences


def agreement(vectors: Vectors) -> Interval:
    """Mean cosine of all pairs of vectors, with an interval over vectors.

    A pair shares its vectors with other pairs, so the number of pairs says nothing about the uncertainty. The interval
    (BCa) is of the jackknife's pseudo-values (Arvesen, 1969), one a vector, whose mean is the estimate.

    Parameters
    ----------
    vectors
        ``[episode, width]``. Vectors that are NaN or 0 have no direction and are left out.

    Returns
    -------
    Interval
        In [-1, 1]; NaN below two vectors, its ends below three.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    unit = vectors[lengths > 0] / lengths[lengths > 0, None]  # NaN is not above 0
    n = len(unit)
    if n < 2:
        return Interval(math.nan, math.nan, math.nan, n, "too few")
    to_others = (unit @ unit.sum(0) - 1) / (n - 1)
    estimate = float(to_others.mean())
    if n < 3:
        return Interval(estimate, math.nan, math.nan, n, "too few")
    without = (n * estimate - 2 * to_others) / (n - 2)  # the mean over pairs that leave this vector out
    found = mean_interval(n * estimate - (n - 1) * without, resamples=RESAMPLES)
    return Interval(estimate, max(-1.0, found.low), min(1.0, found.high), n, "jackknife, BCa bootstrap")


def isotropic_agreement(n: int, width: int) -> float:
    """What the agreement of n random directions exceeds once in twenty times.

    For unit vectors u, ``‖sum u‖² = n + n (n - 1) agreement``, and for random ones of this width ``width ‖sum u‖² / n``
    is nearly chi-squared.
    """
    from scipy.stats import chi2

    return float(chi2.ppf(0.95, width) / width - 1) / (n - 1) if n > 1 else math.nan


def best_constant(mu: NDArray[np.float64], shifts: Vectors) -> NDArray[np.float64]:
    """The v for which ``mu v`` comes closest to the shifts: ``sum mu s / sum mu²``; NaN where all masses are 0."""
    known = ~np.isnan(shifts).any(1)
    mu, shifts = mu[known], shifts[known]
    total = float(mu @ mu)
    return mu @ shifts / total if total > 0 else np.full(shifts.shape[1], np.nan)


def explained(mu: NDArray[np.float64], shifts: Vectors, vector: NDArray[np.float64]) -> Interval:
    """Share of ``sum ‖s‖²`` that ``mu v`` explains.

    Parameters
    ----------
    mu, shifts
        ``[episode]`` and ``[episode, width]``, of other episodes than those that the vector is from.
    vector
        ``[width]``, such as from :func:`best_constant`.

    Returns
    -------
    Interval
        1 at most; below 0 where ``mu v`` is further from the shifts than no shift is. Over episodes, the vector held as
        it is: Student's t of the jackknife of the logarithm of what is left. (A percentile bootstrap of this ratio is
        too narrow where few episodes are shifted far.)
    """
    from scipy.stats import t

    left, whole = np.square(shifts - mu[:, None] * vector).sum(1), np.square(shifts).sum(1)
    n, total = len(left), float(whole.sum())
    if total == 0 or np.isnan(vector).any():
        return Interval(math.nan, math.nan, math.nan, n, "undefined")
    ratio = float(left.sum()) / total
    without = whole.sum() - whole
    if ratio < ROUNDING:
        return Interval(1 - ratio, 1 - ratio, 1 - ratio, n, "all explained")
    if n < 3 or (without <= 0).any():
        return Interval(1 - ratio, math.nan, math.nan, n, "too few")
    logs = np.log(np.maximum(left.sum() - left, ROUNDING * total) / without)
    reach = float(t.ppf(0.975, n - 1)) * math.sqrt((n - 1) / n * np.square(logs - logs.mean()).sum())
    return Interval(1 - ratio, 1 - ratio * math.exp(reach), 1 - ratio * math.exp(-reach), n, "jackknife, log")


def effective_rank(vectors: Vectors) -> float:
    """``exp H(p)``, ``p = σ / sum σ`` of the singular values of the vectors, not centred (Roy and Vetterli, 2007).

    From 1, if all lie on a line through 0, to the smaller of their number and their width; NaN if all are 0.
    """
    values = np.linalg.svd(vectors, compute_uv=False) if vectors.size else np.zeros(0)
    if values.sum() == 0:
        return math.nan
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def rank_interval(vectors: Vectors) -> Interval:
    """The effective rank with an interval over episodes: Student's t of a jackknife that leaves out a tenth at a time.

    It speaks of other samples of as many episodes: the rank grows with their number. (A bootstrap would repeat
    episodes, which lowers it.)
    """
    from scipy.stats import t

    n = len(vectors)
    estimate = effective_rank(vectors)
    if math.isnan(estimate) or n < GROUPS:
        return Interval(estimate, math.nan, math.nan, n, "too few")
    order = np.random.default_rng(0).permutation(n) % GROUPS
    without = np.array([effective_rank(vectors[order != group]) for group in range(GROUPS)])
    error = math.sqrt((GROUPS - 1) / GROUPS * np.square(without - without.mean()).sum())
    reach = float(t.ppf(0.975, GROUPS - 1)) * error
    low, high = max(1.0, estimate - reach), min(float(min(vectors.shape)), estimate + reach)
    return Interval(estimate, low, high, n, "jackknife by tenths")


def isotropic_rank(vectors: Vectors) -> float:
    """The effective rank of vectors of the same lengths in random directions, mean of a few draws."""
    drawn = np.random.default_rng(0).normal(size=(DRAWS, *vectors.shape))
    lengths = np.linalg.norm(vectors, axis=1)[:, None]
    return float(np.mean([effective_rank(lengths * one / np.linalg.norm(one, axis=1, keepdims=True)) for one in drawn]))


def _by_layer(mass: xr.DataArray, name: str, labels: Sequence[object]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Mass of the demonstrations' segments, those with one value of a coordinate together, with intervals."""
    inside = mass["demonstration"].values >= 0
    ends = []
    for value in labels:
        part = mass.isel(segment=np.flatnonzero(inside & (mass[name].values == value)))
        ends.append(_means(part.sum("segment", min_count=1)))
    return ("layer", name, "end"), np.array(ends).swapaxes(0, 1)


def _means(values: xr.DataArray) -> NDArray[np.float64]:
    return np.array([_mean(of_layer) for of_layer in values.transpose("layer", "episode").values])


def _mean(values: NDArray[np.float64]) -> list[float]:
    return mean_interval(values, resamples=RESAMPLES).ends


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for the largest; NaN for what is unknown."""
    order = np.argsort(np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")) + 1.0
    return np.where(np.isnan(values), np.nan, order)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)
