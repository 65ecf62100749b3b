"""From recognition and learning episode by episode to accuracies with intervals, and what is left beyond guessing.

A summary is a Dataset over ``setting`` and ``shot``. ``end`` holds ``estimate``, ``low`` and ``high`` of a 95 %
interval (Wilson) over episodes.

================== =================================================================================================
variable           share of episodes
================== =================================================================================================
``accuracy``       whose most probable label is right
``generated``      whose free answer is right
``in_labels``      whose free answer is one of the labels: the TR ratio
``in_context``     whose free answer is a demonstration's answer
``wrong_copied``   the same, of those whose free answer is wrong
``guess``          that the best guess without input gets right: by chance, the pool's or the context's commonest label
``corrected``      (accuracy − guess) / (1 − guess): 0 is guessing, 1 is always right
``by_seed``        ``accuracy`` of each seed by itself
================== =================================================================================================

``corrected`` of ``random`` is TR, of ``abstract`` it is TL. Its interval takes the guess as known.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.stats import ENDS, Interval, wilson

GUESSES = ("chance", "prior", "majority")
SHARES = {"accuracy": "chosen", "generated": "generated", "in_labels": "in_labels", "in_context": "in_context"}


def summarise_split(result: xr.Dataset) -> xr.Dataset:
    """Accuracies of every setting by shots.

    Parameters
    ----------
    result
        Of :func:`probe.task_split`.

    Returns
    -------
    xarray.Dataset
        NaN where nothing was read. ``n`` is the number of episodes, ``n_wrong`` that of wrong free answers.
    """
    cells = [[_cell(result.isel(setting=i, shot=j)) for j in range(result.sizes["shot"])] for i in _settings(result)]
    names = list(cells[0][0])
    variables = {name: np.array([[cell[name] for cell in row] for row in cells]) for name in names}
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(names, ("setting", "shot", "end"))
    dims |= {"guess": ("setting", "shot"), "n": ("setting", "shot"), "n_wrong": ("setting", "shot")}
    dims |= {"by_seed": ("setting", "shot", "seed")}
    return xr.Dataset(
        {name: (dims[name], values) for name, values in variables.items()},
        coords={
            "setting": result["setting"].values,
            "shot": result["shot"].values,
            "end": list(ENDS),
            "seed": sorted(set(result["seed"].values.tolist())),
        },
        attrs=result.attrs,
    )


def _settings(result: xr.Dataset) -> range:
    return range(result.sizes["setting"])


def _cell(cell: xr.Dataset) -> dict[str, NDArray[np.float64]]:
    """One setting at one number of shots."""
    read = ~np.isnan(cell["chosen"].values)
    found: dict[str, NDArray[np.float64]] = {name: _share(cell[column].values[read]) for name, column in SHARES.items()}
    wrong = read & (cell["generated"].values == 0)
    found["wrong_copied"] = _share(cell["in_context"].values[wrong])
    guess = max(float(cell[name].values[read].mean()) for name in GUESSES) if read.any() else np.nan
    found["guess"] = np.array(guess)
    found["corrected"] = (found["accuracy"] - guess) / (1 - guess) if guess < 1 else np.full(3, np.nan)
    found["n"], found["n_wrong"] = np.array(read.sum()), np.array(wrong.sum())
    seeds = cell["seed"].values
    found["by_seed"] = np.array(
        [_share(cell["chosen"].values[read & (seeds == seed)])[0] for seed in sorted(set(seeds.tolist()))]
    )
    return found


def _share(flags: NDArray[np.float64]) -> NDArray[np.float64]:
    interval = wilson(int(flags.sum()), len(flags)) if len(flags) else Interval(np.nan, np.nan, np.nan, 0, "nothing")
    return np.array(interval.ends)
