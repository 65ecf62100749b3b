"""Vectors of the residual stream at a few named positions: what linear probes are fitted on.

Only these vectors leave the trace. Layer l is the stream that *enters* the attention of layer l: layer 0 holds
embeddings, and what the last layer writes is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import ProbeError, UsageError, did_you_mean
from probe.experiments.answering import units, within_memory
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.segments import QUERY
from probe.store import Keep, key
from probe.trace.read import LayerValues, read

POSITIONS = {
    "demo_answer": "the last token of the last demonstration’s answer",
    "image": "the mean over the image tokens of the query",
    "question": "the last token of the query’s question",
    "answer": "the row that predicts the answer’s first token",
}
"""Where vectors are taken, in the order of reading."""


def choose_positions(model: Model, episodes: Sequence[Episode], positions: Sequence[str] | None) -> list[str]:
    """The positions that were asked for, in the order of reading, or all that every episode has.

    Raises
    ------
    UsageError
        If one does not exist, or an episode does not have it.
    """
    for name in positions or ():
        if name not in POSITIONS:
            raise UsageError(f"There is no position {name!r}; {did_you_mean(name, tuple(POSITIONS))}")
    if positions is not None and not positions:
        raise UsageError(f"Name at least one position: {', '.join(POSITIONS)}.")
    lacking: dict[str, str] = {}
    for episode in episodes:
        if not episode.shots:
            lacking.setdefault("demo_answer", f"episode {episode.id} has no demonstration")
        if not episode.query.images:
            lacking.setdefault("image", f"the query of episode {episode.id} has no image")
        if not episode.query.question.strip():
            lacking.setdefault("question", f"the query of episode {episode.id} has no question")
    if not model.reads_images_in_text:
        lacking["image"] = f"in {model.family.name} no image is a token of the text"
    for name in positions or ():
        if name in lacking:
            raise UsageError(f"There is no position {name!r} to probe: {lacking[name]}. Leave it out.")
    wanted = set(positions) if positions is not None else POSITIONS.keys() - lacking.keys()
    return [name for name in POSITIONS if name in wanted]


def places_of(encoding: Encoding, position: str) -> NDArray[np.intp]:
    """The positions of an encoding (before padding) whose vectors are averaged."""
    token_map = encoding.token_map
    if position == "answer":
        return np.array([encoding.n_prompt - 1])
    if position == "image":
        found = token_map.where("image", QUERY)
    elif position == "question":
        found = token_map.where("question", QUERY)[-1:]
    else:
        found = token_map.where("answer", token_map.shots - 1)[-1:]
    if not len(found):
        raise ProbeError(f"Episode {encoding.episode}: the position {position} has no token of its own; leave it out.")
    return found


def read_vectors(
    model: Model, episodes: Sequence[Episode], positions: Sequence[str], layers: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """The residual stream of a few episodes at named positions, read in one forward.

    Parameters
    ----------
    model
        The model.
    episodes
        They share a batch.
    positions
        Of :data:`POSITIONS`; every episode has them.
    layers
        Default all with self-attention.

    Returns
    -------
    ndarray
        ``[episode, layer, position, width]``, in float32.

    Raises
    ------
    ProbeError
        If a position has no token, or a vector is not finite.
    """
    encodings = [model.encode(episode, open_images(episode)) for episode in episodes]
    batch = model.batch(encodings, with_answer=False)
    places = [
        [torch.from_numpy(places_of(encoding, name) + pad).to(model.device) for name in positions]
        for encoding, pad in zip(encodings, batch.pads, strict=True)
    ]

    def pick(values: LayerValues) -> Mapping[str, Tensor]:
        stream = values.residual
        if stream is None or values.axis != "text":
            return {}
        rows = [torch.stack([stream[i, at].float().mean(0) for at in own]) for i, own in enumerate(places)]
        return {"vectors": torch.stack(rows)}

    numbers = model.choose_layers(layers)
    reading = read(model, batch, ("residual",), pick, layers=numbers)
    found = torch.stack([reading.layers[layer]["vectors"] for layer in numbers], 1).numpy()
    if not np.isfinite(found).all():
        place, layer = (int(at) for at in np.argwhere(~np.isfinite(found))[0][:2])
        raise ProbeError(
            f"Episode {episodes[place].id}, layer {numbers[layer]}: the residual stream is not finite in "
            f"{model.dtype}. Use bfloat16 or float32 (--dtype)."
        )
    return found


def read_all(
    model: Model,
    episodes: Sequence[Episode],
    positions: Sequence[str],
    layers: Sequence[int],
    batch_size: int,
    keep: Keep | None,
    progress: Callable[[int], None] | None,
) -> NDArray[np.float32]:
    """:func:`read_vectors` of any number of episodes, in batches that are kept and counted."""
    done: list[NDArray[np.float32]] = []
    n = 0
    for unit in units(model, episodes, batch_size):

        def compute(unit: Sequence[Episode] = unit) -> xr.Dataset:
            with within_memory(model, len(unit)):
                found = read_vectors(model, unit, positions, layers)
            return xr.Dataset({"vector": (("episode", "layer", "position", "width"), found)})

        # By content: a part of other episodes, or read otherwise, is never taken for this one.
        what = key({"episodes": content_key(unit), "positions": list(positions), "layers": list(layers)})
        done.append((keep(f"vectors-{n:06d}-{what}", compute) if keep else compute())["vector"].values)
        n += len(unit)
        if progress:
            progress(n)
    return np.concatenate(done)
