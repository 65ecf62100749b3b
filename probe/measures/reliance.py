"""The modality reliance: how much of what answers rest on is the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.stats import Interval, mean_interval, ratio_interval


@dataclass(frozen=True)
class Reliance:
    """What the changes of :mod:`probe.experiments.reliance` cost.

    Attributes
    ----------
    visual, linguistic
        The loss of score by blurring the image, and by asking another question.
    index
        ``linguistic / (linguistic + visual)``; NaN where the changes together cost nothing.
    """

    visual: Interval
    linguistic: Interval
    index: Interval


def reliance(result: xr.Dataset) -> Reliance:
    """Losses and index, with 95 % intervals over episodes.

    Parameters
    ----------
    result
        Of :func:`probe.modality_reliance`.
    """
    score = result["score"]
    visual, linguistic = (_loss(score, name) for name in ("blurred-image", "other-question"))
    return Reliance(mean_interval(visual), mean_interval(linguistic), ratio_interval(linguistic, linguistic + visual))


def _loss(score: xr.DataArray, reading: str) -> NDArray[np.float64]:
    return np.asarray(score.sel(reading="as-is").values - score.sel(reading=reading).values, dtype=np.float64)
