"""Which heads attend most to the demonstrations: chosen on one half of the episodes, reported on the other.

The largest of many noisy numbers is too large: a head's mass on the episodes that chose it would flatter it. So no
episode is in both halves. (Episodes from a user's data draw their demonstrations from one pool, so an example may be
read in both.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probe.segments import CONTENT, group_lift, group_mass
from probe.stats import Interval, mean_interval


@dataclass(frozen=True)
class RankedHead:
    """One head with its attention to one modality of the demonstrations, on the report half.

    Attributes
    ----------
    modality
        ``visual`` or ``textual``.
    rank
        1 is the largest mass on the select half.
    layer, head
        Which head.
    mass
        Mean attention mass with its 95 % interval over episodes.
    per_token
        Mean mass per token.
    lift
        Mean mass relative to uniform attention over visible keys.
    """

    modality: str
    rank: int
    layer: int
    head: int
    mass: Interval
    per_token: float
    lift: float


def rank_heads(result: xr.Dataset, *, n: int = 5, row: str = "answer") -> list[RankedHead]:
    """The ``n`` heads with the most mass on the demonstrations' images, and the ``n`` with the most on their text.

    Parameters
    ----------
    result
        From :func:`probe.attention_map`.
    n
        How many of each.
    row
        Whose attention counts.

    Returns
    -------
    list of RankedHead
        Visual first, each by rank. Empty for a modality that the demonstrations lack.
    """
    mass = group_mass(result, row=row)
    per_token = group_mass(result, row=row, per_token=True)
    lift = group_lift(result, row=row)
    ranked = []
    for modality in CONTENT:
        here = mass.sel(group=modality).transpose("episode", "layer", "head")
        select = here.sel(episode=here["half"] == "select").values
        if not np.isfinite(select).any():
            continue
        score = np.nanmean(select[np.isfinite(select).all((1, 2))], 0)
        for rank, flat in enumerate(np.argsort(-score, axis=None, kind="stable")[:n], 1):
            layer, head = np.unravel_index(flat, score.shape)
            place = {"group": modality, "layer": result["layer"][layer], "head": result["head"][head]}

            def on_report(values: xr.DataArray, place: Mapping[str, object] = place) -> np.ndarray:
                return values.sel(place).sel(episode=values["half"] == "report").values

            ranked.append(
                RankedHead(
                    modality=modality,
                    rank=rank,
                    layer=int(result["layer"][layer]),
                    head=int(result["head"][head]),
                    mass=mean_interval(on_report(mass)),
                    per_token=_mean(on_report(per_token)),
                    lift=_mean(on_report(lift)),
                )
            )
    return ranked


def _mean(values: np.ndarray) -> float:
    """Mean of what is there; NaN if nothing is."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")
