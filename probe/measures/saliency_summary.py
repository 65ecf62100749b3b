"""From the flows of saliency of each episode to means with intervals over episodes."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe.stats import ENDS, mean_interval


def summarise_saliency(result: xr.Dataset) -> xr.Dataset:
    """Means of every flow by layer.

    Parameters
    ----------
    result
        Of :func:`probe.saliency`.

    Returns
    -------
    xarray.Dataset
        ``saliency`` over (flow, layer, end), the mean over the episodes that have such pairs, with a 95 % interval over
        them (BCa); NaN where none has. ``n`` over (flow, layer), how many have.
    """
    values = result["saliency"].transpose("flow", "layer", "episode").values
    intervals = [[mean_interval(of_episodes) for of_episodes in row] for row in values]
    return xr.Dataset(
        {
            "saliency": (("flow", "layer", "end"), np.array([[each.ends for each in row] for row in intervals])),
            "n": (("flow", "layer"), np.array([[each.n for each in row] for row in intervals])),
        },
        coords={"flow": result["flow"].values, "layer": result["layer"].values, "end": list(ENDS)},
        attrs=result.attrs,
    )
