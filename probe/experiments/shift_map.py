"""How the demonstrations shift every head: by how much, in which direction, and how much alike from query to query.

The measures are those of :mod:`probe.measures.shift`. Episodes are read in batches, as by
:mod:`probe.experiments.attention_map`; of each head, a vector a row is kept, so that what is said about directions
(:mod:`probe.measures.shift_summary`) follows from a saved run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import ProbeError, UsageError
from probe.experiments.answering import check_words, facts, units, within_memory
from probe.experiments.attention_dataset import Plan
from probe.experiments.attention_reducer import BatchRows, Keys
from probe.experiments.shift_reducer import Readout, answer_logits, average_known, last_stream, make_reducer
from probe.measures.mass import RESIDUAL_BOUND
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.models.token_map import segments_for
from probe.store import Keep, key
from probe.trace.read import read

UNITS = {
    "mass": "probability",
    "mu": "probability",
    "difference": "norm of a head's output",
    "difference_vector": "a head's output",
    "shift": "norm in the residual stream",
    "logit_effect": "logits above the mean",
    "answer_logit": "logits above the mean",
    "residual": "relative",
    "logit_residual": "relative",
}


def shift_map(
    model: Model,
    episodes: Sequence[Episode],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure, head by head, how the demonstrations shift what the row that answers gets.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Demonstrations, one at least, and queries; numbers of shots may differ.
    layers
        Which layers; default all that have self-attention.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        As in ``docs/shift_map.md``. Over (episode, row, layer, head): ``mu``, ``difference``, ``shift``,
        ``logit_effect``; with ``segment`` ``mass``, with ``width`` ``difference_vector``. Summaries over episodes are
        those of :func:`probe.measures.shift_summary.summarise_shift`.

    Raises
    ------
    UsageError
        If there are no episodes, one has no demonstrations, ids repeat, a layer does not exist or has no
        self-attention, or too many words are unknown to the tokenizer.
    ProbeError
        If an image cannot be read, memory runs out, or heads' outputs or logits cannot be rebuilt from what was
        recorded.
    """
    check_shots(episodes)
    if batch_size < 1:
        raise UsageError(f"A batch holds at least one episode; asked for {batch_size}.")
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    chosen = model.choose_layers(layers)
    if not chosen:
        raise UsageError(
            f"The layers {', '.join(map(str, layers or ()))} of {model.name} have cross-attention alone; name at least "
            f"one with self-attention ({', '.join(map(str, model.choose_layers(None)))})."
        )
    plan = Plan("answer", chosen, segments_for(max(episode.shots for episode in episodes)))
    unknown, words = check_words(model, episodes)
    readout = Readout.of(model)
    done: list[xr.Dataset] = []
    n = 0
    for unit in units(model, episodes, batch_size):

        def compute(unit: Sequence[Episode] = unit) -> xr.Dataset:
            with within_memory(model, len(unit)):
                return _measure(model, unit, plan, readout)

        # By content: a part of other episodes, or read otherwise, is never taken for this one.
        part = f"{n:06d}-{key({'layers': chosen, 'shots': plan.shots})[:8]}-{content_key(unit)}"
        done.append(keep(part, compute) if keep else compute())
        n += len(unit)
        if progress:
            progress(n)
    result = xr.concat(done, "episode", data_vars="all", coords="different", compat="equals", join="exact")
    halves = np.where(np.arange(len(episodes)) % 2 == 0, "select", "report")
    result = result.assign_coords(half=("episode", halves))
    for name, unit_of in UNITS.items():
        result[name].attrs["units"] = unit_of
    result.attrs = {
        "experiment": "shift_map",
        **facts(model),
        "answers": "gold",
        "demonstrations": "all positions of their turns, delimiters included",
        "precision": "attention and what follows from it: float32, from the model's own q, k, v",
        "residual_bound": RESIDUAL_BOUND[model.dtype],
        "n_attempted": len(episodes),
        "n_done": len(episodes),
        "n_failed": 0,
        "unknown_word_share": unknown / max(words, 1),
    }
    if not model.reads_images_in_text:
        result.attrs["image_mass"] = (
            "undefined: in this family no image is a token of the text; mu and all that follows from it are of "
            "attention to the demonstrations' text"
        )
    return result


def check_shots(episodes: Sequence[Episode]) -> None:
    """Refuse episodes whose shift is undefined.

    Raises
    ------
    UsageError
        If there are none, or one has no demonstrations.
    """
    if not episodes:
        raise UsageError("There are no episodes to read.")
    without = next((episode for episode in episodes if episode.shots == 0), None)
    if without is not None:
        raise UsageError(
            f"Episode {without.id} has no demonstrations, so nothing shifts its heads; give one shot or more (--shots)."
        )


def _measure(model: Model, episodes: Sequence[Episode], plan: Plan, readout: Readout) -> xr.Dataset:
    """Read one batch of episodes."""
    encodings = [model.encode(episode, open_images(episode)) for episode in episodes]
    batch = model.batch(encodings)
    rows = BatchRows.of(batch, plan)
    answers = readout.of_answers(batch, rows)
    reading = read(
        model,
        batch,
        ("attention", "heads", "layer_output"),
        make_reducer(model, plan, rows, Keys.of_text(batch, plan), answers),
        # The last is where the final norm's scale comes from.
        layers=sorted({*plan.layers, model.sites[-1].layer, model.choose_layers(None)[-1]}),
        logits_to_keep=1 + max(len(encoding) - encoding.n_prompt for encoding in encodings),
    )
    own, off, scale = answer_logits(reading.logits, last_stream(model, reading), readout, answers, rows, batch.length)
    values = {
        name: torch.stack([reading.layers[layer][name] for layer in plan.layers], 1)
        for name in reading.layers[plan.layers[0]]
        if name != "stream"
    }
    effect = values.pop("effect") * scale[:, None, None]
    values["logit_effect"] = torch.stack([average_known(one, rows) for one in effect.unbind(1)], 1)
    dataset = label(episodes, encodings, plan, {name: value.numpy() for name, value in values.items()}, own.numpy())
    dataset["logit_residual"] = ("episode", off.numpy())
    _check(model, dataset)
    return dataset


def label(
    episodes: Sequence[Episode],
    encodings: Sequence[Encoding],
    plan: Plan,
    values: dict[str, NDArray[Any]],
    answer_logit: NDArray[Any],
) -> xr.Dataset:
    """Name the numbers of one batch.

    Parameters
    ----------
    episodes, encodings
        Of the batch, in its order.
    plan
        What was recorded.
    values
        As :func:`~probe.experiments.shift_reducer.make_reducer` says, with a layer axis after the episode's.
    answer_logit
        ``[episode, row]``.

    Returns
    -------
    xarray.Dataset
        What an episode lacks (a segment, a row) is NaN.
    """
    n_tokens = np.stack([plan.count(encoding.token_map) for encoding in encodings])
    n_positions = np.array([[len(group) for group in plan.positions(encoding)] for encoding in encodings])
    given = xr.DataArray(n_positions > 0, dims=("episode", "row"))
    there = xr.DataArray(n_tokens > 0, dims=("episode", "segment"))
    dims: dict[str, tuple[str, ...]] = {name: ("head",) for name in ("mu", "difference", "shift", "logit_effect")}
    dims |= {"difference_vector": ("head", "width"), "mass": ("head", "segment")}
    dims |= {"n_visible": ("segment",), "visible_share": ("segment",)}

    def named(name: str) -> xr.DataArray:
        array = xr.DataArray(values[name], dims=("episode", "layer", "row", *dims[name])).where(given)
        array = array.where(there) if name == "mass" else array
        return array.transpose("episode", "row", "layer", *dims[name])

    return xr.Dataset(
        {
            **{name: named(name) for name in dims},
            "answer_logit": xr.DataArray(answer_logit, dims=("episode", "row")).where(given),
            "n_tokens": (("episode", "segment"), n_tokens),
            "n_positions": (("episode", "row"), n_positions),
            "residual": (("episode", "layer"), values["residual"]),
        },
        coords={
            "episode": [episode.id for episode in episodes],
            "query": ("episode", [episode.query.id for episode in episodes]),
            "shots": ("episode", [episode.shots for episode in episodes]),
            "row": plan.row_labels,
            "layer": plan.layers,
            "head": range(values["mu"].shape[3]),
            "segment": [segment.label for segment in plan.segments],
            "role": ("segment", [segment.role for segment in plan.segments]),
            "modality": ("segment", [segment.modality for segment in plan.segments]),
            "demonstration": ("segment", [segment.demonstration for segment in plan.segments]),
        },
    )


def _check(model: Model, dataset: xr.Dataset) -> None:
    """Rule: what was recorded must give back what the model computed."""
    bound = RESIDUAL_BOUND[model.dtype]
    for name, what in (("residual", "heads' outputs"), ("logit_residual", "answer's logits")):
        if bool((dataset[name] <= bound).all()):
            continue
        off = dataset[name]
        place = off.isel(off.fillna(float("inf")).argmax(off.dims))
        where = ", ".join(f"{dim} {place[dim].item()}" for dim in off.dims)
        if not np.isfinite(place.item()):
            raise ProbeError(
                f"At {where}, what the model computes is not finite in {model.dtype}. Use bfloat16 or float32 "
                "(--dtype)."
            )
        raise ProbeError(
            f"The {what} cannot be rebuilt from what was recorded: at {where} they are off by {place.item():.2g} of "
            f"their size, more than {bound:g} for {model.dtype}. The numbers would not describe what the model "
            "computed; please report the model and the versions in use."
        )
