"""Where the attention goes: mass and contribution of every segment, for every head, and what of it lies on sinks.

The result is described in ``docs/results.md``. Episodes are read in batches; each batch becomes a labelled part, which
a run directory can keep, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import ProbeError, UsageError, did_you_mean
from probe.experiments.answering import answer_limit, check_words, facts, within_memory
from probe.experiments.attention_dataset import (
    Plan,
    Rows,
    join,
    label,
    label_cross,
    label_images,
    label_tokens,
)
from probe.experiments.attention_reducer import BatchRows, Keys, make_reducer
from probe.measures.mass import RESIDUAL_BOUND
from probe.measures.sinks import THRESHOLD
from probe.models.model import Model
from probe.models.token_map import segments_for
from probe.scoring import cut_answer
from probe.store import Keep, key
from probe.trace.generate import generate
from probe.trace.read import read


def attention_map(
    model: Model,
    episodes: Sequence[Episode],
    *,
    rows: Rows = "answer",
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    overlay_episodes: int = 2,
    max_new_tokens: int | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure, head by head, how much attention goes to each part of the demonstrations and what it carries.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Demonstrations and queries; numbers of shots may differ.
    rows
        ``answer``: the positions that predict the answer. ``demo-answers``: also the demonstrations' own answer tokens.
        ``all``: also every position (mass only).
    layers
        Which layers to record; default all.
    batch_size
        Episodes in one forward.
    overlay_episodes
        For how many of the first episodes to keep the attention on every image token, and the images.
    max_new_tokens
        Length at which the model's own answer is cut; default :func:`~probe.experiments.answering.answer_limit`.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    progress
        Called with the number of episodes done after every batch.

    Returns
    -------
    xarray.Dataset
        As in ``docs/results.md``. Mass is in [0, 1]; contribution is a norm in the residual stream.

    Raises
    ------
    UsageError
        If there are no episodes, ids repeat, a layer does not exist, or too many words are unknown to the tokenizer.
    ProbeError
        If an image cannot be read, or the heads' outputs cannot be rebuilt from what was recorded.
    """
    if rows not in get_args(Rows):
        raise UsageError(f"There are no rows {rows!r}; {did_you_mean(rows, get_args(Rows))}")
    if not episodes:
        raise UsageError("There are no episodes to read.")
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise UsageError(f"A batch and an answer hold at least one; asked for {batch_size} and {max_new_tokens}.")
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    plan = Plan(
        rows,
        model.choose_layers(layers),
        segments_for(max(e.shots for e in episodes)),
        cross_layers=model.choose_layers(layers, "vision"),
    )
    if not plan.layers:
        raise UsageError(
            f"The layers {', '.join(map(str, layers or ()))} of {model.name} have cross-attention alone; name at least "
            f"one with self-attention ({', '.join(map(str, model.choose_layers(None)))})."
        )
    unknown, words = check_words(model, episodes)
    limit = answer_limit(model, episodes) if max_new_tokens is None else max_new_tokens
    done: list[xr.Dataset] = []
    for start in range(0, len(episodes), batch_size):
        unit = episodes[start : start + batch_size]
        n_overlay = max(0, min(overlay_episodes - start, len(unit)))

        def compute(unit: Sequence[Episode] = unit, n_overlay: int = n_overlay) -> xr.Dataset:
            with within_memory(model, len(unit)):
                return _measure(model, unit, plan, n_overlay, limit)

        # By content: a part of other episodes, or read otherwise, is never taken for this one.
        what = key({"rows": rows, "layers": plan.layers, "shots": plan.shots, "overlay": n_overlay, "limit": limit})
        done.append(keep(f"{start:06d}-{what[:8]}-{content_key(unit)}", compute) if keep else compute())
        if progress:
            progress(start + len(unit))
    result = join(done)
    _check_residual(model, result)  # parts of an interrupted run included
    result.attrs = _attributes(model, plan, result, n_attempted=len(episodes), unknown_share=unknown / max(words, 1))
    result.attrs["max_new_tokens"] = limit
    return result


def _measure(model: Model, episodes: Sequence[Episode], plan: Plan, n_overlay: int, max_new_tokens: int) -> xr.Dataset:
    """Read one batch of episodes."""
    pictures, encodings = [], []
    for number, episode in enumerate(episodes):
        images = open_images(episode)
        encodings.append(model.encode(episode, images))
        if number < n_overlay:  # the rest need not stay in memory
            pictures.append(images)
    batch = model.batch(encodings)
    all_rows = plan.rows == "all"
    keys, vision = Keys.of_text(batch, plan), Keys.of_vision(batch, plan)
    reduce = make_reducer(model, BatchRows.of(batch, plan), keys, vision, all_rows=all_rows, n_overlay=n_overlay)
    reading = read(model, batch, ("residual", "attention", "heads"), reduce, layers=[*plan.layers, *plan.cross_layers])
    values = _stack(reading.layers, plan.layers)
    answers = generate(model, model.batch(encodings, with_answer=False), max_new_tokens=max_new_tokens)
    dataset = label(episodes, encodings, plan, values, [cut_answer(answer) for answer in answers])
    if plan.cross_layers:
        gates = [float(model.gate(layer).abs().mean()) for layer in plan.cross_layers]
        cross = _stack(reading.cross, plan.cross_layers) if reading.cross else None
        dataset = dataset.merge(label_cross(encodings, plan, cross, gates, model.n_heads))
    _check_residual(model, dataset)
    if all_rows:
        tokens = label_tokens(encodings, batch.pads, plan, values["token_mass"])
        _check_sums(model, tokens)
        dataset = dataset.merge(tokens)
    if n_overlay and model.reads_images_in_text:
        dataset = dataset.merge(
            label_images(pictures, encodings, batch.pads, values["first_row"], values["first_sinks"])
        )
    return dataset


def _stack(by_layer: dict[int, dict[str, Tensor]], layers: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The layers' values as arrays with a layer axis after the episode's."""
    names = by_layer[layers[0]]
    return {name: torch.stack([by_layer[layer][name] for layer in layers], 1).numpy() for name in names}


def _check_residual(model: Model, dataset: xr.Dataset) -> None:
    """Rule: what was recorded must give back what the model computed."""
    bound = RESIDUAL_BOUND[model.dtype]
    for name, layers in (("residual", "layer"), ("cross_residual", "cross_layer")):
        if name not in dataset or bool((dataset[name] <= bound).all()):
            continue
        off = dataset[name]
        place = off.isel(off.fillna(float("inf")).argmax(("episode", layers)))
        if not np.isfinite(place.item()):
            raise ProbeError(
                f"Episode {place['episode'].item()}, {layers.replace('_', ' ')} {place[layers].item()}: what the model "
                f"computes there is not finite in {model.dtype}. Use bfloat16 or float32 (--dtype)."
            )
        raise ProbeError(
            f"The heads' outputs cannot be rebuilt from the recorded attention: episode {place['episode'].item()}, "
            f"{layers.replace('_', ' ')} {place[layers].item()} is off by {place.item():.2g} of its size, more than "
            f"{bound:g} for {model.dtype}. The numbers would not describe what the model computed; please report the "
            "model and the versions in use."
        )


def _check_sums(model: Model, tokens: xr.Dataset) -> None:
    """The mass of every position on all segments is 1, as far as the kernel's precision goes."""
    off = float(abs(tokens["token_mass"].sum("segment") - 1).max())
    if not off <= 2 * RESIDUAL_BOUND[model.dtype]:
        raise ProbeError(
            f"The mass of some position sums to 1 ± {off:.2g}, more than {2 * RESIDUAL_BOUND[model.dtype]:g}: the "
            f"attention kernel did not keep the precision of {model.dtype}. Record selected rows (--rows answer), "
            "or use float32."
        )


def _attributes(
    model: Model, plan: Plan, result: xr.Dataset, *, n_attempted: int, unknown_share: float
) -> dict[str, object]:
    """What the numbers are and where they come from."""
    n_images, n_resized = int(result["n_images"].sum()), int(result["n_resized"].sum())
    dtype = str(model.dtype).removeprefix("torch.")
    attributes: dict[str, object] = {
        "experiment": "attention_map",
        **facts(model),
        "rows": plan.rows,
        "answers": "gold",
        "mass_precision": f"mass, contribution, patch_mass: float32; token_mass: {dtype} kernel",
        "residual_bound": RESIDUAL_BOUND[model.dtype],
        "sink_threshold": THRESHOLD,
        "n_attempted": n_attempted,
        "n_done": result.sizes["episode"],
        "n_failed": n_attempted - result.sizes["episode"],
        "unknown_word_share": unknown_share,
        "images_resized": f"{n_resized} of {n_images}",
    }
    if not model.reads_images_in_text:
        attributes["no_overlay"] = f"in {model.family.name} no image is a token of the text"
        attributes["image_mass"] = (
            "undefined: in this family no image is a token of the text; cross_mass is the attention of its "
            "cross-attention on images"
        )
    elif "image_rows" in result and not bool((result["image_rows"] > 0).all()):
        attributes["no_overlay"] = f"the image tokens of {model.family.name} have no place in a grid"
    if n_images:
        attributes["image_scale"] = float(result["image_scale"].mean())
    return attributes
