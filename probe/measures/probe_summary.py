"""From right and wrong of linear probes to accuracies with intervals, selectivity, and the layer that tells most.

A summary is a Dataset over ``target``, ``position`` and ``layer``; ``end`` holds ``estimate``, ``low`` and ``high`` of
a 95 % interval over episodes, each of which was judged once, out of fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.stats import ENDS, Interval, mean_interval, wilson

RESAMPLES = 1000
"""Of each bootstrap of a selectivity: there is one for every layer, position and target."""

LEVEL = 0.05
"""A site tells something of a target if its family-wise p is at most this."""


def summarise_probes(result: xr.Dataset) -> xr.Dataset:
    """Accuracies of all probes.

    Parameters
    ----------
    result
        Of :func:`probe.linear_probe`.

    Returns
    -------
    xarray.Dataset
        Over (target, position, layer, end): ``accuracy`` and ``control``, with Wilson's interval; NaN where there is no
        control task. Over (target, position, layer): ``told``, whether the family-wise p is at most :data:`LEVEL`.
        Over target: ``guess``, the best guess that needs no vector, and ``n``.
    """
    site = ("target", "position", "layer")
    variables = {
        name: ((*site, "end"), np.apply_along_axis(_share, -1, result[column].transpose(*site, "episode").values))
        for name, column in {"accuracy": "right", "control": "control_right"}.items()
    }
    return xr.Dataset(
        {
            **variables,
            "told": (site, (result["p_family"].transpose(*site) <= LEVEL).values),
            "guess": ("target", result["guess_accuracy"].max("guess").values),
            "n": ("target", result["right"].isel(position=0, layer=0).notnull().sum("episode").values),
        },
        coords={**{name: result[name].values for name in site}, "end": list(ENDS)},
        attrs=result.attrs,
    )


def selectivity(result: xr.Dataset) -> xr.DataArray:
    """Accuracy minus accuracy on the control task, with a bootstrap interval over episodes, which are paired.

    Returns
    -------
    xarray.DataArray
        Over (target, position, layer, end); NaN where there is no control task.
    """
    site = ("target", "position", "layer")
    differences = (result["right"] - result["control_right"]).transpose(*site, "episode")
    ends = np.apply_along_axis(_mean, -1, differences.values)
    coords = {**{name: result[name].values for name in site}, "end": list(ENDS)}
    return xr.DataArray(ends, dims=(*site, "end"), coords=coords, name="selectivity")


@dataclass(frozen=True)
class Peak:
    """The layer that tells most of a target at a position: chosen on every other episode, judged on the rest.

    Attributes
    ----------
    target, position, layer
        Where.
    accuracy, control, selectivity
        On the episodes that had no part in the choice; NaN where there is no control task.
    told
        The layers whose family-wise p is at most :data:`LEVEL`.
    """

    target: str
    position: str
    layer: int
    accuracy: Interval
    control: Interval
    selectivity: Interval
    told: list[int]


def peaks(result: xr.Dataset) -> list[Peak]:
    """One for each target and position, in their order."""
    layers = result["layer"].values.tolist()
    found = []
    for target in result["target"].values.tolist():
        for position in result["position"].values.tolist():
            cell = result.sel(target=target, position=position)
            right, control = (cell[name].transpose("layer", "episode").values for name in ("right", "control_right"))
            there = ~np.isnan(right[0])
            right, control = right[:, there], control[:, there]
            # Halves by group and at random: no picture is in both, and no order of labels decides.
            group = result["group"].sel(target=target).values[there]
            mixed = np.random.default_rng(0).permutation(np.unique(group))
            chooses = np.isin(group, mixed[: (len(mixed) + 1) // 2])
            best = int(right[:, chooses].mean(1).argmax())
            right, control = right[best, ~chooses], control[best, ~chooses]
            found.append(
                Peak(
                    target,
                    position,
                    layers[best],
                    _wilson(right),
                    _wilson(control),
                    mean_interval(right - control),
                    [layer for layer, p in zip(layers, cell["p_family"].values, strict=True) if p <= LEVEL],
                )
            )
    return found


def _wilson(flags: NDArray[np.float32]) -> Interval:
    known = flags[~np.isnan(flags)]
    return wilson(int(known.sum()), len(known)) if len(known) else Interval(np.nan, np.nan, np.nan, 0, "nothing")


def _share(flags: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.array(_wilson(flags).ends)


def _mean(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.array(mean_interval(values, resamples=RESAMPLES).ends)
