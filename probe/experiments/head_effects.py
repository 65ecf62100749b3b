"""What changes when one head at a time is replaced: by its mean, or by its mean in another kind of episodes.

- *ablation*: log p of the answer as it is, minus that when the head writes its mean at every position; large is
  important;
- *function vector* (causal indirect effect; Todd et al., ICLR 2024, arXiv 2310.15213): in episodes whose demonstrations
  have exchanged their answers, the head writes at the rows that answer what it writes there on average where they are
  right; how much that raises p of the answer.

Means never come from the episodes that they are used on: those of each half are used on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.data.perturb import perturb
from probe.errors import UsageError
from probe.experiments.answering import facts, units, within_memory
from probe.experiments.interventions import HALVES, halves, means_of_other_half
from probe.models.encoding import Batch
from probe.models.model import Model
from probe.store import Keep
from probe.trace.ablate import mean_heads
from probe.trace.likelihood import answer_log_probability
from probe.trace.rows import ANSWER


def head_effects(
    model: Model,
    episodes: Sequence[Episode],
    *,
    function_vectors: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Replace every head by its mean, one at a time.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Two or more; for function vectors, with two demonstrations or more.
    function_vectors
        Whether to measure these too, which takes as long again.
    seed
        Of the exchange of answers.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches.
    progress
        Called with the number of readings done, of :func:`n_readings`.

    Returns
    -------
    xarray.Dataset
        Over (episode, layer, head): ``ablation`` (nats), ``function_vector`` (probability); over (episode):
        ``log_probability`` of the answer as it is, ``log_probability_permuted`` where answers are exchanged, and
        ``half``.

    Raises
    ------
    UsageError
        If there are too few episodes or demonstrations.
    """
    if len(episodes) < 2:
        raise UsageError("Means come from the other half of the episodes: two episodes or more are needed.")
    permuted = perturb(episodes, "permuted-answers", seed=seed) if function_vectors else []
    heads = [(layer, head) for layer in model.choose_layers(None) for head in range(model.n_heads)]
    half = halves(len(episodes))
    means = means_of_other_half(model, episodes, batch_size)
    columns: dict[str, NDArray[np.float64]] = {}
    done = 0
    readings = [("ablation", episodes, "all")]
    readings += [("function_vector", permuted, ANSWER)] if function_vectors else []
    for name, shown, rows in readings:
        whole = np.full(len(shown), np.nan)
        replaced = np.full((len(shown), len(heads)), np.nan)
        for own in HALVES:
            places = np.flatnonzero(half == own)
            start = 0
            for unit in units(model, [shown[int(place)] for place in places], batch_size):

                def compute(
                    unit: Sequence[Episode] = unit, rows: str = rows, own: str = own, before: int = done
                ) -> xr.Dataset:
                    def onward(finished: int) -> None:
                        if progress:
                            progress(before + finished * len(unit))

                    with within_memory(model, len(unit)):
                        values = _replace_each(model, unit, heads, means[own], rows, onward)
                    return xr.Dataset({"log_probability": (("condition", "episode"), values)})

                # The means are part of what is measured: they come from the episodes of the other half.
                part = f"{name}-{own}-{start:06d}-{content_key([*unit, *(e for e in episodes)])}"
                values = (keep(part, compute) if keep else compute())["log_probability"].values
                at = places[start : start + len(unit)]
                whole[at], replaced[at] = values[0], values[1:].T
                start += len(unit)
                done += len(unit) * (1 + len(heads))
                if progress:
                    progress(done)
        if name == "ablation":
            columns["log_probability"], columns["ablation"] = whole, whole[:, None] - replaced
        else:
            columns["log_probability_permuted"] = whole
            columns["function_vector"] = np.exp(replaced) - np.exp(whole)[:, None]
    layers = model.choose_layers(None)
    shape = (len(episodes), len(layers), model.n_heads)
    return xr.Dataset(
        {
            name: (("episode", "layer", "head"), column.reshape(shape)) if column.ndim > 1 else ("episode", column)
            for name, column in columns.items()
        },
        coords={
            "episode": [episode.id for episode in episodes],
            "half": ("episode", half),
            "layer": layers,
            "head": range(model.n_heads),
        },
        attrs={**facts(model), "seed": seed},
    )


def n_readings(model: Model, n_episodes: int, *, function_vectors: bool = True) -> int:
    """How many episodes :func:`head_effects` reads, those for the means left out."""
    return n_episodes * (1 + len(model.choose_layers(None)) * model.n_heads) * (1 + function_vectors)


def _batch(model: Model, episodes: Sequence[Episode]) -> Batch:
    return model.batch([model.encode(episode, open_images(episode)) for episode in episodes])


def _replace_each(
    model: Model,
    episodes: Sequence[Episode],
    heads: Sequence[tuple[int, int]],
    means: Tensor,
    rows: str,
    onward: Callable[[int], None],
) -> NDArray[np.float64]:
    """Log p of the answer as it is, and with each head replaced by its mean, ``[1 + head, episode]``."""
    batch = _batch(model, episodes)
    found = [answer_log_probability(model, batch)]
    for layer, head in heads:
        own: Mapping[tuple[int, int], Tensor] = {(layer, head): means[layer, head]}
        found.append(answer_log_probability(model, batch, mean_heads(own, rows)))
        onward(len(found))
    return np.stack(found)
