"""Beside each mass, what happens without it: knockouts of what an attention map found to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xarray as xr

from probe.data.example import Episode
from probe.experiments.interventions import Intervention
from probe.experiments.knockout import knockout
from probe.experiments.ranking import RankedHead, rank_heads
from probe.measures.effects import WITHOUT, nest
from probe.models.model import Model
from probe.store import Keep

HIDDEN = {"visual": "demos/image", "textual": "demos/text"}
"""What is hidden from a head that reads a modality."""

GROUPS = ("demos/image", "demos/text", "demos/delimiter", "sink")


def head_knockout(head: RankedHead) -> Intervention:
    """Hide from one head what it was ranked for."""
    return Intervention(keys=HIDDEN[head.modality], heads=((head.layer, head.head),))


def knockouts_for(result: xr.Dataset, *, top: int, layers: Sequence[int] | None = None) -> list[Intervention]:
    """What is worth hiding from the row that answers: the groups of tokens, and from each ranked head its own.

    Parameters
    ----------
    result
        Of :func:`probe.attention_map`.
    top
        How many heads of each modality, ranked on the selecting half.
    layers
        In which layers groups are hidden; default all.

    Returns
    -------
    list of Intervention
        Of tokens that at least one episode has.
    """
    window = None if layers is None else tuple(sorted(set(layers)))
    found = [Intervention(keys=keys, layers=window) for keys in GROUPS if _there(result, keys)]
    return [*found, *(head_knockout(head) for head in rank_heads(result, n=top))]


def _there(result: xr.Dataset, keys: str) -> bool:
    """Whether an episode has such tokens."""
    if keys == "sink":
        return True
    role = keys.split("/")[1]
    roles = ("question", "answer") if role == "text" else (role,)
    counts = result["n_tokens"] + result.get("cross_n_tokens", 0)
    chosen = result["role"].isin(roles) & (result["demonstration"] >= 0)
    return bool((counts.where(chosen, 0) > 0).any())


def without(
    model: Model,
    episodes: Sequence[Episode],
    result: xr.Dataset,
    *,
    top: int = 5,
    layers: Sequence[int] | None = None,
    controls: int = 3,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Add to an attention map what happens without what is read.

    Parameters
    ----------
    model, episodes
        Those of the result.
    result
        Of :func:`probe.attention_map`.
    top, layers, controls, seed, batch_size, keep, progress
        As in :func:`knockouts_for` and :func:`probe.knockout`.

    Returns
    -------
    xarray.Dataset
        The result with the knockouts, whose names begin with ``without_``
        (:func:`probe.measures.effects.unnest` takes them out again).
    """
    found = knockout(
        model,
        episodes,
        knockouts_for(result, top=top, layers=layers),
        controls=controls,
        seed=seed,
        batch_size=batch_size,
        keep=keep,
        progress=progress,
    )
    return result.merge(nest(found, WITHOUT)).assign_attrs(result.attrs, controls=controls)
