"""From the same queries, answered in several ways, to accuracies, what a vector recovers, and spreads over seeds.

What is said of a way has an interval of 95 % over episodes, in the dimension ``end``: Wilson's of a share, Newcombe's
of the paired difference of two shares, BCa of other means. What is said of seeds is their mean, least and most, and
has none: few seeds are never resampled (:mod:`probe.measures.vector_groups`).

**Recovered** is the share of what demonstrations gain that a way gets without them,

    (way - zero) / (few - zero) = 1 + (way - few) / (few - zero)

of accuracies: 0 is zero-shot, 1 is few-shot, and nothing keeps it between them. Its interval is not a bootstrap's,
which has no width where way and few-shot answer alike, although few episodes cannot show that they always would. Both
forms hold for any way, so all values are left out that either excludes: those that no difference within its
Newcombe interval and no gain within its own give. In simulations that holds the truth as often as the intervals that it
is made of near 0 and 1, and more often between. Where the gain's interval includes 0 there may be nothing to recover,
and it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.errors import UsageError
from probe.measures.vector_groups import group_names
from probe.stats import ENDS, Interval, mean_interval, paired_difference, ratio_interval, wilson

MEASURES = ("accuracy", "recovered", "forced", "log_probability", "copied")
"""Of which the spread over seeds is given."""

SEEDS = ("mean", "least", "most")
RESAMPLES = 1000
"""Of distances, which are many: one for each way and layer."""

Values = NDArray[np.float64]
"""``[episode]``."""


def summarise_vectors(result: xr.Dataset, *, distances: bool = True) -> xr.Dataset:
    """What each way is worth, and how far seeds are apart.

    Parameters
    ----------
    result
        Of ``probe.experiments.compare.compare``.
    distances
        Whether to summarise distances too, which takes longest.

    Returns
    -------
    xarray.Dataset
        Over (way, end): ``accuracy``, ``forced`` and ``copied``, shares; ``to_zero_shot``, ``to_few_shot`` and
        ``to_random``, paired differences of accuracy to these (of several random draws, the mean of theirs; NaN where
        there is none); ``recovered``; ``log_probability``, nats, and its paired differences
        ``log_probability_to_zero_shot`` and ``log_probability_to_few_shot``, without ends where all are alike. Over
        (way): ``prompt_tokens``, the mean. Over (way, layer, end): ``distance``, and ``distance_ratio``, to that of
        zero-shot (percentile bootstrap). Over (group, measure, seeds): ``spread``, over the ways of a group; over
        (group): ``n_ways``, ``n_seeds``. Scalars: ``n`` and ``n_distances``, episodes. ``group_of`` on ``way`` names
        its group.

    Raises
    ------
    UsageError
        If zero-shot or few-shot is missing.
    """
    zero, few = (_place(result, kind) for kind in ("zero-shot", "few-shot"))
    correct, likely = (_rows(result, name) for name in ("correct", "log_probability"))
    like = result["like"].values
    whole = [_rows(result, name) for name in ("forced", "copied")]
    ways = [
        {
            "accuracy": _share(correct[i]),
            "to_zero_shot": paired_difference(correct[i], correct[zero]).ends,
            "to_few_shot": paired_difference(correct[i], correct[few]).ends,
            "to_random": _to_draws(correct[i], correct[like == label]),
            "recovered": recovered(correct[i], correct[zero], correct[few]).ends,
            "forced": _share(whole[0][i]),
            "copied": _share(whole[1][i]),
            "log_probability": mean_interval(likely[i]).ends,
            "log_probability_to_zero_shot": _difference(likely[i], likely[zero]),
            "log_probability_to_few_shot": _difference(likely[i], likely[few]),
        }
        for i, label in enumerate(result["way"].values)
    ]
    ends = {name: np.array([way[name] for way in ways]) for name in ways[0]}
    summary = xr.Dataset(
        {
            **{name: (("way", "end"), values) for name, values in ends.items()},
            "prompt_tokens": ("way", _rows(result, "prompt_tokens").mean(1)),
            "n": result.sizes["episode"],
        },
        coords={
            **{name: value for name, value in result.coords.items() if value.dims == ("way",)},
            "layer": result["layer"].values,
            "end": list(ENDS),
        },
        attrs=result.attrs,
    )
    summary = summary.assign(_spread(result, ends)).set_coords("group_of")
    return summary.assign(_distances(result, zero)) if distances else summary


def recovered(way: Values, zero: Values, few: Values) -> Interval:
    """The share of the gain from ``zero`` to ``few`` that ``way`` recovers, with a conservative interval.

    Parameters
    ----------
    way, zero, few
        Whether each episode is answered right, ``[episode]``, 0 or 1.

    Returns
    -------
    Interval
        NaN where the gain's interval includes 0.

    References
    ----------
    Newcombe (1998), Statistics in Medicine 17: 2635-2650, for the differences.
    """
    gain, lost, won = (paired_difference(*pair) for pair in ((few, zero), (way, few), (way, zero)))
    if not gain.low > 0:
        return Interval(math.nan, math.nan, math.nan, len(way), "no gain")

    def ends(change: Interval) -> tuple[float, float]:
        # Divided by the end of the gain that makes it larger outwards.
        low = change.low / (gain.low if change.low < 0 else gain.high)
        return low, change.high / (gain.low if change.high > 0 else gain.high)

    from_few, from_zero = ends(lost), ends(won)
    low, high = max(1 + from_few[0], from_zero[0]), min(1 + from_few[1], from_zero[1])
    return Interval(1 + lost.estimate / gain.estimate, low, high, len(way), "Newcombe, paired; the ratio's extremes")


def _place(result: xr.Dataset, kind: str) -> int:
    places = np.flatnonzero(result["kind"].values == kind)
    if not len(places):
        raise UsageError(
            f"This comparison has no way {kind}, which all others are held against; compare again with it."
        )
    return int(places[0])


def _rows(result: xr.Dataset, name: str) -> NDArray[np.float64]:
    """``[way, episode]``."""
    return result[name].transpose("way", "episode").values.astype(np.float64)


def _share(values: Values) -> list[float]:
    """NaN throughout where nothing was answered: an oracle says nothing of its own."""
    known = values[~np.isnan(values)]
    return wilson(int(known.sum()), len(known)).ends if len(known) else [math.nan] * 3


def _to_draws(way: Values, draws: NDArray[np.float64]) -> list[float]:
    """The mean of the differences to random draws, and of their ends: more draws are not more queries."""
    if not len(draws):
        return [math.nan] * 3
    found: list[float] = np.mean([paired_difference(way, draw).ends for draw in draws], axis=0).tolist()
    return found


def _difference(one: Values, other: Values) -> list[float]:
    """Of numbers, paired; no ends where all are alike, since few cannot show that all are."""
    found = mean_interval(one - other)
    return [found.estimate, *([math.nan] * 2 if found.method == "all equal" else found.ends[1:])]


def _spread(result: xr.Dataset, ends: dict[str, NDArray[np.float64]]) -> dict[str, object]:
    """Over the ways of each group; whoever has seeds, has them by themselves."""
    names = np.array(group_names(result))
    groups = list(dict.fromkeys(names.tolist()))
    seeds = [result["training_seed"].values[names == group] for group in groups]
    estimates = np.array([ends[measure][:, 0] for measure in MEASURES])
    spread = [
        [[of.mean(), of.min(), of.max()] for of in estimates[:, names == group]]  # NaN, where there is one, stays
        for group in groups
    ]
    return {
        "spread": (("group", "measure", "seeds"), np.array(spread)),
        "n_ways": ("group", [len(of) for of in seeds]),
        "n_seeds": ("group", [len(set(of.tolist())) for of in seeds]),
        "group": groups,
        "measure": list(MEASURES),
        "seeds": list(SEEDS),
        "group_of": ("way", names),
    }


def _distances(result: xr.Dataset, zero: int) -> dict[str, object]:
    """How far each way's states are from those with demonstrations, layer by layer."""
    far = result["distance"].transpose("way", "layer", "episode").values.astype(np.float64)
    far = far[..., ~np.isnan(far).any((0, 1))]

    def by_layer(found: Sequence[Sequence[Interval]]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        return ("way", "layer", "end"), np.array([[one.ends for one in row] for row in found])

    means = [[mean_interval(of, resamples=RESAMPLES) for of in row] for row in far]
    ratios = [[ratio_interval(*pair, resamples=RESAMPLES) for pair in zip(row, far[zero], strict=True)] for row in far]
    return {"distance": by_layer(means), "distance_ratio": by_layer(ratios), "n_distances": far.shape[-1]}
