"""From scores of heads, sequence by sequence and episode by episode, to one table with its uncertainty.

Every score is compared with a null of the same unit where it has one (:data:`KINDS`); ``score`` is what was measured,
``beyond`` its mean difference from the null. Heads are ranked by ``beyond`` on the selecting half; ``score``,
``beyond`` with its 95 % interval (BCa over sequences or episodes), and ``p`` (family-wise over all heads, sign flips)
come from the reporting half. ``reliability`` is Spearman's correlation of the two halves over heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.measures.effects import unnest
from probe.stats import ENDS, family_wise, mean_interval


@dataclass(frozen=True)
class Kind:
    """One kind of head.

    Attributes
    ----------
    score, null
        Names in the result of :func:`probe.heads`; no null: 0.
    unit
        The dimension that is averaged over.
    """

    score: str
    null: str = ""
    unit: str = "episode"


KINDS: dict[str, Kind] = {
    "previous token": Kind("previous_token", "uniform", "sequence"),
    "duplicate token": Kind("duplicate_token", "duplicate_shuffled", "sequence"),
    "induction": Kind("induction", "induction_shuffled", "sequence"),
    "duplicate image token": Kind("image_duplicate_token", "image_duplicate_shuffled", "picture_sequence"),
    "image induction": Kind("image_induction", "image_induction_shuffled", "picture_sequence"),
    "copying": Kind("ov_copying", "ov_copying_null", ""),
    "label matching": Kind("label_matching"),
    "task recognition": Kind("task_recognition", "task_recognition_null"),
    "task learning": Kind("task_learning"),
    "visual": Kind("visual", "visual_null"),
    "function vector": Kind("function_vector"),
    "ablation": Kind("ablation"),
}
"""All kinds, in the order of the table."""


FOUND = "found_"
"""Begins the names of what is measured where the selected heads are ablated together."""


def of_found(result: xr.Dataset) -> xr.Dataset | None:
    """What is measured where the selected heads are ablated together, as a result of :func:`probe.knockout`."""
    found = unnest(result, FOUND)
    if found is None:
        return None
    labels = [
        f"{kind}: {label.split(', ', 1)[1]}"  # the heads alone: method and rows are the same in all
        for kind, label in zip(found["kind"].values.tolist(), found["intervention"].values.tolist(), strict=True)
    ]
    return found.assign_coords(intervention=labels)


def present(result: xr.Dataset) -> dict[str, Kind]:
    """The kinds that a result holds."""
    return {name: kind for name, kind in KINDS.items() if kind.score in result}


def uniform_attention(length: int) -> float:
    """Mean mass of one key over the rows of a sequence of one token and ``length`` others twice, if all are alike."""
    return float(np.mean(1 / np.arange(2, 2 * length + 2)))


def beyond_null(result: xr.Dataset, kind: Kind) -> NDArray[np.float64]:
    """Scores minus their null, ``[unit, layer, head]``; of weights, ``[1, layer, head]``."""
    values = result[kind.score]
    if not kind.unit:
        return (values - result[kind.null].mean("draw")).values[None]
    null: xr.DataArray | float = 0.0
    if kind.null == "uniform":
        null = uniform_attention(int(result.attrs.get("sequence_length", 50)))
    elif kind.null:
        null = result[kind.null]
    return np.asarray((values - null).transpose(kind.unit, "layer", "head").values, dtype=np.float64)


def in_half(result: xr.Dataset, kind: Kind, half: str) -> NDArray[np.bool_]:
    """Which units belong to a half, ``[unit]``; weights belong to both."""
    if not kind.unit:
        return np.ones(1, dtype=bool)
    name = "half" if kind.unit == "episode" else f"{kind.unit}_half"
    return np.asarray(result[name].values == half)


def select_heads(result: xr.Dataset, n: int) -> dict[str, list[tuple[int, int]]]:
    """The ``n`` heads of each kind that go furthest beyond their null on the selecting half.

    Returns
    -------
    dict
        By kind, (layer, head), highest first. Kinds that are undefined for a model are left out.
    """
    layers, numbers = result["layer"].values.tolist(), result["head"].values.tolist()
    chosen = {}
    for name, kind in present(result).items():
        means = _mean(beyond_null(result, kind)[in_half(result, kind, "select")])
        order = [place for place in np.argsort(-np.nan_to_num(means.ravel(), nan=-np.inf), kind="stable")]
        known = [place for place in order if not np.isnan(means.ravel()[place])]
        if known:
            chosen[name] = [(layers[place // len(numbers)], numbers[place % len(numbers)]) for place in known[:n]]
    return chosen


def summarise_heads(result: xr.Dataset) -> xr.Dataset:
    """One table of all heads.

    Parameters
    ----------
    result
        Of :func:`probe.heads`.

    Returns
    -------
    xarray.Dataset
        ``score`` (kind, layer, head), ``beyond`` (kind, layer, head, end), ``p`` (kind, layer, head), ``rank`` (kind,
        layer, head; 1 is first), ``reliability`` (kind), ``n`` (kind; units of the reporting half), and ``likeness``
        (kind, other): Spearman's correlation over heads between what two kinds go beyond their null. NaN where a kind
        is undefined.
    """
    kinds = present(result)
    cells = {name: _cell(result, kind) for name, kind in kinds.items()}
    means = [_mean(beyond_null(result, kind)).ravel() for kind in kinds.values()]
    stacked = {column: np.array([cell[column] for cell in cells.values()]) for column in next(iter(cells.values()))}
    grid = ("kind", "layer", "head")
    return xr.Dataset(
        {
            "score": (grid, stacked["score"]),
            "beyond": ((*grid, "end"), stacked["beyond"]),
            "p": (grid, stacked["p"]),
            "rank": (grid, stacked["rank"]),
            "reliability": ("kind", stacked["reliability"]),
            "n": ("kind", stacked["n"]),
            "likeness": (("kind", "other"), np.array([[_spearman(a, b) for b in means] for a in means])),
        },
        coords={
            "kind": list(kinds),
            "other": list(kinds),
            "layer": result["layer"].values,
            "head": result["head"].values,
            "end": list(ENDS),
        },
        attrs=result.attrs,
    )


def _cell(result: xr.Dataset, kind: Kind) -> dict[str, NDArray[np.float64]]:
    """All of one kind."""
    beyond = beyond_null(result, kind)
    select, report = (in_half(result, kind, half) for half in ("select", "report"))
    chosen, own = _mean(beyond[select]), beyond[report]
    shape = own.shape[1:]
    score = result[kind.score]
    shown = score.transpose(kind.unit, "layer", "head").values[report] if kind.unit else score.values[None]
    order = np.argsort(np.argsort(-np.nan_to_num(chosen.ravel(), nan=-np.inf), kind="stable")) + 1.0
    found: dict[str, NDArray[np.float64]] = {
        "score": _mean(shown),
        "rank": np.where(np.isnan(chosen.ravel()), np.nan, order).reshape(shape),
        "reliability": np.array(_spearman(chosen.ravel(), _mean(own).ravel()) if kind.unit else np.nan),
        "n": np.array(float(len(own)) if kind.unit else np.nan),
    }
    if not kind.unit:
        found["beyond"] = np.stack([own[0], np.full(shape, np.nan), np.full(shape, np.nan)], -1)
        found["p"] = _p_of_draws(score.values, result[kind.null].values)
        return found
    flat = own.reshape(len(own), -1).T
    found["beyond"] = np.array([mean_interval(row, resamples=1000).ends for row in flat]).reshape(*shape, 3)
    found["p"] = family_wise(flat).reshape(shape)
    return found


def _p_of_draws(score: NDArray[np.float64], null: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often the largest |null| of all heads reaches a head's |score|; what nobody reads is 0."""
    largest = np.nanmax(np.abs(null), axis=(1, 2))
    reached = (largest[:, None, None] >= np.abs(score)).sum(0)
    return np.asarray(np.where(np.isnan(score), np.nan, (1 + reached) / (1 + len(largest))))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over units, what is missing left out."""
    known = ~np.isnan(values)
    counts = known.sum(0)
    sums = np.where(known, values, 0).sum(0)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)
