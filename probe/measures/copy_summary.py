"""From copying query by query to rates with intervals: by strategy and shots, by answer type, by place.

A summary is a Dataset over ``group`` (a pair of strategy and shots) and ``measure``, whose dimension ``end`` holds
``estimate``, ``low`` and ``high`` of a 95 % interval over queries, and whose ``n`` says how many queries it rests on.

======================= ==============================================================================================
measure                 of
======================= ==============================================================================================
``accuracy``            score of the model's answers
``majority``            score of the commonest answer among the demonstrations
``gold_shown``          queries whose right answer some demonstration gives
``copy_rate``           queries answered as some demonstration is: CR
``null``                the same, against the demonstrations of the other queries (``RS`` only)
``excess``              copy rate minus null (``RS`` only)
``harmful``             queries answered wrongly as some demonstration is
``copied_if_wrong``     the same, of the queries that are answered wrongly
``counterfactual``      how much more often a planted wrong answer is given when it is there
======================= ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from probe.measures.copying import NOWHERE
from probe.stats import ENDS, Interval, mean_interval, wilson

PUBLISHED: dict[str, tuple[float, float]] = {
    "RS": (43.64, 37.34),
    "SI": (50.44, 54.38),
    "SQ": (77.26, 79.84),
    "SQA": (87.74, 89.47),
    "sole": (47.39, 45.82),
    "sole-wrong": (37.07, 45.71),
}
"""Copy rates in percent of OpenFlamingo v1 and v2, by strategy, to hold one's own against.

From the slides for "How to Configure Good In-Context Sequence for Visual Question Answering" (arXiv 2312.01571), where
the last two are called SQA(sole) and SQA(sole wrong). The number of shots and the data set are not stated there.
"""


def _share(flags: np.ndarray) -> Interval:
    return wilson(int(np.sum(flags)), len(flags))


def _counterfactual(group: xr.Dataset) -> Interval:
    if "planted_after" not in group:
        return mean_interval([])
    before, after = group["planted_before"].values, group["planted_after"].values
    there = ~np.isnan(after)
    # Never said unprompted: what is left is a share, and a share of 0 or 1 has an interval too.
    return _share(after[there]) if not before[there].any() else mean_interval(after[there] - before[there])


MEASURES: dict[str, Callable[[xr.Dataset], Interval]] = {
    "accuracy": lambda group: _score(group["score"].values),
    "majority": lambda group: _score(group["majority_score"].values),
    "gold_shown": lambda group: _share(group["gold_shown"].values),
    "copy_rate": lambda group: _share(group["copied"].values),
    "null": lambda group: mean_interval(group["null"].values),
    "excess": lambda group: mean_interval(group["copied"].values - group["null"].values),
    "harmful": lambda group: _share(group["harmful"].values),
    "copied_if_wrong": lambda group: _share(group["copied"].values[~group["right"].values]),
    "counterfactual": _counterfactual,
}
"""All measures by name, in the order of the table."""


def _score(values: np.ndarray) -> Interval:
    whole = np.isin(values, (0, 1)).all()
    return _share(values) if whole else mean_interval(values)


def summarise_copying(result: xr.Dataset) -> xr.Dataset:
    """Rates of copying with their intervals.

    Parameters
    ----------
    result
        Of :func:`probe.copy_rate`.

    Returns
    -------
    xarray.Dataset
        ``rate`` over (group, measure, end) and ``n`` over (group, measure); ``strategy`` and ``shots`` of each group;
        ``rate_by_type`` and ``n_by_type`` with ``answer_type`` besides; ``profile`` over (group, place, end): of the
        copied answers that one demonstration alone gives, the share that each place gives, and ``n_profile`` over
        (group).
    """
    groups = _groups(result)
    types = sorted(set(result["answer_type"].values.tolist()))
    whole = [{name: take(part) for name, take in MEASURES.items()} for part in groups]
    by_type = [
        [
            {name: take(part.isel(episode=(part["answer_type"] == kind).values)) for name, take in MEASURES.items()}
            for kind in types
        ]
        for part in groups
    ]
    profiles = [_profile(part, int(result["shots"].max())) for part in groups]
    return xr.Dataset(
        {
            "rate": (("group", "measure", "end"), [[row[name].ends for name in MEASURES] for row in whole]),
            "n": (("group", "measure"), [[row[name].n for name in MEASURES] for row in whole]),
            "rate_by_type": (
                ("group", "answer_type", "measure", "end"),
                [[[row[name].ends for name in MEASURES] for row in rows] for rows in by_type],
            ),
            "n_by_type": (
                ("group", "answer_type", "measure"),
                [[[row[name].n for name in MEASURES] for row in rows] for rows in by_type],
            ),
            "profile": (("group", "place", "end"), [[point.ends for point in points] for points in profiles]),
            "n_profile": ("group", [points[0].n for points in profiles]),
        },
        coords={
            "group": [_name(part) for part in groups],
            "strategy": ("group", [str(part["strategy"].values[0]) for part in groups]),
            "shots": ("group", [int(part["shots"].values[0]) for part in groups]),
            "measure": list(MEASURES),
            "answer_type": types,
            "end": list(ENDS),
        },
        attrs=result.attrs,
    )


def _groups(result: xr.Dataset) -> list[xr.Dataset]:
    """One part for each strategy and number of shots, in the order of the result."""
    pairs = list(zip(result["strategy"].values.tolist(), result["shots"].values.tolist(), strict=True))
    return [result.isel(episode=[p == pair for p in pairs]) for pair in dict.fromkeys(pairs)]


def _name(part: xr.Dataset) -> str:
    shots = int(part["shots"].values[0])
    return f"{part['strategy'].values[0]}, {shots} shot{'s' if shots != 1 else ''}"


def _profile(part: xr.Dataset, most: int) -> list[Interval]:
    """The share of each place; NaN where an episode has no such demonstration."""
    places = part["place"].values[part["place"].values != NOWHERE]
    shots = int(part["shots"].values[0])
    nothing = Interval(np.nan, np.nan, np.nan, len(places), "no such place")
    return [_share(places == place) if place < shots else nothing for place in range(most)]
