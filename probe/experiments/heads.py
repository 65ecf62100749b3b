"""Which heads do what: one table of scores for every head of a model, and whether those that stand out matter.

================ =================== ======================================================== ==================
kind             read on             score                                                    compared with
================ =================== ======================================================== ==================
previous token   repeated tokens     attention to the position before                         uniform attention
duplicate token  repeated tokens     attention to the same token before                       shuffled repeats
induction        repeated tokens     attention to what followed the same token before         shuffled repeats
… of images      repeated pictures   the last two, from image tokens to image tokens          shuffled repeats
copying          the weights         eigenvalues of the path from token to logits             permuted tokens
label matching   the episodes        attention to right answers beyond their share            0
task recognition the episodes        what it writes within the span of the labels             random labels
task learning    the episodes        … of that, towards the right one                         0
visual           the episodes        share of images in attention without sinks               uniform attention
function vector  the episodes        p(answer) gained where its mean output is put into       0
                                     episodes with exchanged answers
ablation         the episodes        log p(answer) lost where it writes its mean              0
================ =================== ======================================================== ==================

Rows that stand for text and rows that stand for images are never mixed. Half of the sequences and episodes *select*
the heads of each kind, the other half *reports* their scores. The heads selected for a kind are then ablated together
in the reporting episodes, beside as many random heads of the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from probe.data.example import Episode
from probe.errors import UsageError
from probe.experiments.answering import check_words, facts
from probe.experiments.head_effects import head_effects, n_readings
from probe.experiments.head_scores import head_scores
from probe.experiments.interventions import HALVES, Intervention, halves
from probe.experiments.knockout import knockout, n_conditions
from probe.experiments.ov_copying import ov_copying
from probe.experiments.repeats import plain_tokens, repeated_images, repeated_tokens
from probe.measures.effects import nest
from probe.measures.head_summary import FOUND, KINDS, select_heads
from probe.models.model import Model
from probe.store import Keep


def heads(
    model: Model,
    episodes: Sequence[Episode],
    *,
    causal: bool = True,
    top: int = 3,
    controls: int = 5,
    sequences: int = 32,
    length: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Score every head, and ablate those that stand out.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Demonstrations and queries of one task; four or more, with two demonstrations or more.
    causal
        Whether to replace heads at all: function vectors, ablation, and the heads found against random ones. Without,
        minutes instead of hours on a large model.
    top
        How many heads of each kind are ablated together.
    controls
        How many draws of random heads of the same layers.
    sequences
        How many sequences of repeated tokens, and half as many of repeated pictures.
    length
        Tokens that are repeated; default 50, or fewer where the model knows fewer plain words.
    seed
        Of all that is drawn.
    batch_size
        Sequences or episodes in one forward.
    keep
        Keeps finished batches.
    progress
        Called with the number of readings done, of :func:`n_readings_of_all`.

    Returns
    -------
    xarray.Dataset
        The scores of :func:`~probe.experiments.repeats.repeated_tokens` (over sequence),
        :func:`~probe.experiments.repeats.repeated_images` (over picture_sequence, names begin with ``image_``),
        :func:`~probe.experiments.ov_copying.ov_copying`, :func:`~probe.experiments.head_scores.head_scores` and
        :func:`~probe.experiments.head_effects.head_effects` (over episode), each with a coordinate ``half``; and of
        :func:`probe.knockout` for the heads found, names begin with ``found_``, ``found_kind`` names the kinds that
        selected them. ``no_images`` in the attributes says why image rows are missing.

    Raises
    ------
    UsageError
        If numbers do not fit.
    """
    if len(episodes) < 4 or len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError(
            f"A table of heads needs four episodes or more, each with an id of its own; got {len(episodes)}."
        )
    if top < 1 or controls < 0 or sequences < 4 or batch_size < 1:
        raise UsageError(
            "Needed are one head of a kind, 0 controls, 4 sequences and 1 in a batch at least; got "
            f"{top}, {controls}, {sequences} and {batch_size}."
        )
    check_words(model, episodes)
    if causal and min(episode.shots for episode in episodes) < 2:
        raise UsageError("Function vectors exchange answers between demonstrations: give two shots or more.")
    done = 0

    def onward(now: int) -> None:
        if progress:
            progress(done + now)

    shown = min(50, len(plain_tokens(model))) if length is None else length
    tokens = repeated_tokens(model, length=shown, n=sequences, seed=seed, batch_size=batch_size, progress=onward)
    done += sequences
    parts = [_named(tokens, "sequence", ""), ov_copying(model, draws=20, seed=seed)]
    attrs: dict[str, object] = {"sequence_length": shown}
    if model.reads_images_in_text:
        n_pictures = max(4, sequences // 2)
        pictures = repeated_images(model, n=n_pictures, seed=seed, batch_size=min(batch_size, 4), progress=onward)
        parts.append(_named(pictures, "picture_sequence", "image_"))
    else:
        attrs["no_images"] = f"in {model.family.name} no image is a token of the text"
    done += max(4, sequences // 2)
    scores = head_scores(model, episodes, seed=seed, batch_size=batch_size, progress=onward)
    parts.append(scores.assign_coords(half=("episode", halves(len(episodes)))))
    done += len(episodes)
    if causal:
        parts.append(head_effects(model, episodes, seed=seed, batch_size=batch_size, keep=keep, progress=onward))
        done += n_readings(model, len(episodes))
    result = xr.merge([part.drop_attrs() for part in parts], compat="equals", join="outer")
    if causal:
        chosen = select_heads(result, top)
        result = result.merge(_found(model, episodes, chosen, controls, seed, batch_size, keep, onward))
    result.attrs = {
        **facts(model),
        "experiment": "heads",
        **attrs,
        "top": top,
        "controls": controls,
        "heads_seed": seed,
        "n_attempted": len(episodes),
        "n_done": len(episodes),
    }
    return result


def n_readings_of_all(
    model: Model, n_episodes: int, *, causal: bool = True, controls: int = 5, sequences: int = 32
) -> int:
    """How many sequences and episodes :func:`heads` reads, at most."""
    once = sequences + max(4, sequences // 2) + n_episodes
    if not causal:
        return once
    found = n_conditions([Intervention("mean", heads=((0, 0),))], controls) * len(KINDS) * (n_episodes // 2)
    return once + n_readings(model, n_episodes) + found


def _named(scores: xr.Dataset, unit: str, prefix: str) -> xr.Dataset:
    """Scores of sequences under names of their own, with their halves."""
    own = [name for name in scores.data_vars if "sequence" in scores[name].dims]
    renamed = scores[own].drop_vars("sequence", errors="ignore").rename({name: f"{prefix}{name}" for name in own})
    if unit != "sequence":
        renamed = renamed.rename(sequence=unit)
    return renamed.assign_coords({f"{unit}_half": (unit, halves(renamed.sizes[unit]))})


def _found(
    model: Model,
    episodes: Sequence[Episode],
    chosen: dict[str, list[tuple[int, int]]],
    controls: int,
    seed: int,
    batch_size: int,
    keep: Keep | None,
    onward: Callable[[int], None],
) -> xr.Dataset:
    """The heads that each kind selected, ablated together in the reporting episodes."""
    report = [e for e, half in zip(episodes, halves(len(episodes)), strict=True) if half == HALVES[1]]
    by_heads: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for kind, own in chosen.items():
        by_heads.setdefault(tuple(sorted(own)), []).append(kind)
    interventions = [Intervention("mean", heads=own) for own in by_heads]
    result = knockout(
        model,
        report,
        interventions,
        controls=controls,
        seed=seed,
        batch_size=batch_size,
        keep=keep,
        progress=onward,
    )
    result = result.assign_coords(kind=("intervention", np.array([", ".join(kinds) for kinds in by_heads.values()])))
    return nest(result, FOUND)
