"""From seconds, round by round, to how much longer an answer takes with a vector or with demonstrations."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe.stats import ENDS, median_interval

TIMES = ("first", "per_token")


def time_ratios(result: xr.Dataset) -> xr.Dataset:
    """Times as ratios to zero-shot.

    A ratio is taken within each round, in which all ways were timed in turn: what disturbs the machine disturbs all.

    Parameters
    ----------
    result
        Of ``probe vector compare --cost``, or of :func:`probe.experiments.vector_cost.vector_cost` with the coordinate
        ``kind``.

    Returns
    -------
    xarray.Dataset
        ``ratio`` (way, time, end): the median over rounds and a 95 % interval from the order statistics; of the ways
        that were timed. ``seconds`` (way, time), the median.
    """
    timed = result.isel(way=np.flatnonzero(result["first"].notnull().all("round").values))
    zero = timed.isel(way=int(np.flatnonzero(timed["kind"].values == "zero-shot")[0]))
    ratios = np.empty((timed.sizes["way"], len(TIMES), len(ENDS)))
    for t, name in enumerate(TIMES):
        each = (timed[name] / zero[name]).transpose("way", "round").values
        for w, values in enumerate(each):
            ratios[w, t] = np.median(values), *median_interval(values)
    seconds = np.stack([timed[name].median("round").values for name in TIMES], 1)
    return xr.Dataset(
        {"ratio": (("way", "time", "end"), ratios), "seconds": (("way", "time"), seconds)},
        coords={"way": timed["way"], "kind": timed["kind"], "time": list(TIMES), "end": list(ENDS)},
        attrs=result.attrs,
    )
