"""From a knockout, episode by episode, to effects with intervals, beside those of the random controls.

An effect is the mean over episodes of a paired difference: with something taken away minus as it is. ``beyond`` is the
same minus the control's, which is averaged over its draws first. ``end`` holds ``estimate``, ``low`` and ``high`` of a
95 % interval over episodes: Newcombe's for the effect on a share, else BCa bootstrap, which has no ends where all
differences are alike. Episodes in which nothing could be hidden count for nothing.

=================== ================================================================================================
measure             of what
=================== ================================================================================================
``log_probability`` log p of the gold answer, nats
``correct``         accuracy: the greedy answer is right
``copied``          copy rate: the greedy answer is a demonstration's
=================== ================================================================================================
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.stats import ENDS, family_wise, mean_interval, paired_difference

MEASURES = ("log_probability", "correct", "copied")
CONTROLS = ("keys", "heads")

WITHOUT = "without_"
"""Begins the names of the knockouts that ``probe attention-map --knockout`` keeps within its result."""


def effects(result: xr.Dataset) -> xr.Dataset:
    """Effects of every intervention.

    Parameters
    ----------
    result
        Of :func:`probe.knockout`.

    Returns
    -------
    xarray.Dataset
        ``as_is`` (measure), means without any intervention; ``effect`` (measure, intervention, end); ``of_control`` and
        ``beyond`` (measure, control, intervention, end), NaN where an intervention has no such control; ``p``
        (measure, intervention): that an effect is 0, :func:`~probe.stats.family_wise` over the interventions;
        ``n_hidden`` (intervention), keys on average; ``n``, episodes; ``n_defined`` (intervention), those in which it
        took something away.
    """
    measures = [name for name in MEASURES if name in result]
    labels = result["intervention"].values
    cells = [_of_measure(result, name) for name in measures]
    variables = {name: np.array([cell[name] for cell in cells]) for name in cells[0]}
    return xr.Dataset(
        {
            "as_is": ("measure", variables["as_is"]),
            "effect": (("measure", "intervention", "end"), variables["effect"]),
            "of_control": (("measure", "control", "intervention", "end"), variables["of_control"]),
            "beyond": (("measure", "control", "intervention", "end"), variables["beyond"]),
            "p": (("measure", "intervention"), variables["p"]),
            "n_hidden": ("intervention", result["n_hidden"].mean("episode").values),
            "n": result.sizes["episode"],
            "n_defined": ("intervention", _defined(result)),
        },
        coords={
            "measure": measures,
            "control": list(CONTROLS),
            "intervention": labels,
            "method": ("intervention", result["method"].values),
            "end": list(ENDS),
        },
        attrs=result.attrs,
    )


def _defined(result: xr.Dataset) -> list[int]:
    own = result["log_probability"][result["control"].values == ""]
    of = own["of"].values
    return [int(own[of == number].notnull().sum()) for number in range(result.sizes["intervention"])]


def nest(result: xr.Dataset, prefix: str) -> xr.Dataset:
    """Give all names of a result a prefix, so that it can be kept within another."""
    names = {str(name): f"{prefix}{name}" for name in [*result.variables, *result.dims]}
    return result.drop_attrs().rename(names)


def unnest(result: xr.Dataset, prefix: str) -> xr.Dataset | None:
    """What was kept within a result under a prefix, with the attributes of the whole; ``None`` if nothing was."""
    names = {str(name): str(name).removeprefix(prefix) for name in result.variables if str(name).startswith(prefix)}
    if not names:
        return None
    dims = {str(dim): str(dim).removeprefix(prefix) for dim in result.dims if str(dim).startswith(prefix)}
    own = result.drop_vars([name for name in result.variables if str(name) not in names])
    return own.rename({**names, **dims}).assign_attrs(result.attrs)


def episode_effects(result: xr.Dataset, measure: str) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Paired differences of one measure.

    Returns
    -------
    ndarray
        ``[intervention, episode]``.
    dict of ndarray
        The same of each control, the mean of its draws; NaN where there is none.
    """
    values = result[measure].values
    of, control = result["of"].values, result["control"].values
    changed = values - values[of == -1]
    numbers = range(result.sizes["intervention"])

    def mean(kind: str) -> NDArray[np.float64]:
        rows = [changed[(of == number) & (control == kind)] for number in numbers]
        missing = np.full(changed.shape[1], np.nan)
        return np.array([row.mean(0) if len(row) else missing for row in rows])

    return mean(""), {kind: mean(kind) for kind in CONTROLS}


def _of_measure(result: xr.Dataset, measure: str) -> dict[str, NDArray[np.float64]]:
    own, controls = episode_effects(result, measure)
    as_is = result[measure].values[result["of"].values == -1][0]
    return {
        "as_is": as_is.mean(),
        "effect": _intervals(own)
        if measure == "log_probability"
        else np.array([_paired(as_is + row, as_is) for row in own]),
        "of_control": np.array([_intervals(controls[kind]) for kind in CONTROLS]),
        "beyond": np.array([_intervals(own - controls[kind]) for kind in CONTROLS]),
        "p": family_wise(own),
    }


def _paired(after: NDArray[np.float64], before: NDArray[np.float64]) -> list[float]:
    """The change of a share, where it is defined."""
    known = ~np.isnan(after)
    return paired_difference(np.rint(after[known]), before[known]).ends if known.any() else [np.nan] * 3


def _intervals(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[row, end]``, undefined episodes left out; no ends where all are alike, since few cannot show that all are."""
    found = [mean_interval(row) for row in rows]
    return np.array([[x.estimate, *([np.nan] * 2 if x.method == "all equal" else x.ends[1:])] for x in found])
