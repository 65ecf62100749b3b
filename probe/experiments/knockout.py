"""Does it matter? The same episodes answered as they are, with something taken away, and with as much at random.

Every episode is read under every condition, so all comparisons are paired. What is measured: the log-probability of the
gold answer, whether the greedy answer is right, and whether it is a demonstration's. An effect is what an intervention
changes; it counts beyond chance where it differs from that of its control. Both are lower bounds of what the model
makes of the tokens or heads: others may stand in for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from torch import Tensor

from probe.data.example import Episode
from probe.data.images import open_images
from probe.data.manifest import content_key
from probe.errors import UsageError
from probe.experiments.answering import answer_limit, check_words, facts, units, within_memory
from probe.experiments.interventions import (
    Intervention,
    check_places,
    count_hidden_keys,
    edits_of,
    halves,
    means_of_other_half,
    n_hidden,
    random_heads,
    random_keys,
)
from probe.models.encoding import Encoding
from probe.models.model import Model
from probe.scoring import cut_answer, exact_match
from probe.store import Keep, key
from probe.trace.edit import Edit
from probe.trace.generate import generate
from probe.trace.likelihood import answer_log_probability

NOTHING = "nothing"
"""The condition in which nothing is taken away."""


@dataclass(frozen=True)
class Condition:
    """One way to read the episodes: which intervention (-1: none), as itself or as which control, and its edits."""

    number: int
    control: str
    draw: int
    edits: list[Edit]


def knockout(
    model: Model,
    episodes: Sequence[Episode],
    interventions: Sequence[Intervention],
    *,
    controls: int = 3,
    answers: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Take things away from a model while it answers.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Demonstrations and queries.
    interventions
        One or more.
    controls
        How many random controls of each kind (:mod:`probe.experiments.interventions`); 0 for none.
    answers
        Whether to let the model answer too; without, only the log-probability of the gold answer is measured.
    seed
        Of the controls.
    batch_size
        Episodes in one forward.
    max_new_tokens
        Length at which an answer is cut; default :func:`~probe.experiments.answering.answer_limit`.
    keep
        Keeps finished batches, such as the ``part`` of a run directory.
    progress
        Called with the number of readings done, of :func:`n_conditions` x episodes.

    Returns
    -------
    xarray.Dataset
        Over (condition, episode): ``log_probability`` (nats, of the gold answer's tokens together), ``correct``,
        ``copied`` (the answer is a demonstration's) and ``prediction``; over (intervention, episode): ``n_hidden``, the
        keys that are taken from a row that can see them. Coordinates on ``condition``: ``of`` (index of the
        intervention, -1: nothing was taken away), ``control`` (empty, ``keys`` or ``heads``), ``draw``; on
        ``intervention``: its label, ``method``. Where a knockout hides nothing that its rows can see, it and its
        controls are NaN.

    Raises
    ------
    UsageError
        If there is nothing to do, two interventions are the same, a layer, head or token does not exist, or numbers do
        not fit.
    """
    _check(episodes, interventions, controls, batch_size, max_new_tokens)
    for intervention in interventions:
        check_places(model, intervention)
    check_words(model, episodes)
    limit = answer_limit(model, episodes) if max_new_tokens is None else max_new_tokens
    if any(intervention.keys for intervention in interventions):
        _check_keys(model, episodes, interventions)
    parts = _parts(model, episodes, interventions, controls, seed, batch_size)
    # Means come from other episodes, so all are part of what a batch's numbers rest on.
    whole = content_key(episodes) if len(parts) > 1 else ""
    plan = key({"plan": [controls, seed, limit if answers else 0, whole], "of": [repr(i) for i in interventions]})
    done: list[xr.Dataset] = []
    n = 0
    for some, conditions in parts:
        for unit in units(model, some, batch_size):

            def compute(
                unit: Sequence[Episode] = unit, conditions: Sequence[Condition] = conditions, before: int = n
            ) -> xr.Dataset:
                def onward(finished: int) -> None:
                    if progress:
                        progress((before * len(conditions)) + finished * len(unit))

                with within_memory(model, len(unit)):
                    return _measure(model, unit, interventions, conditions, limit if answers else 0, onward)

            part = f"{n:06d}-{plan}-{content_key(unit)}"
            done.append(keep(part, compute) if keep else compute())
            n += len(unit)
            if progress:
                progress(n * len(conditions))
    result = xr.concat(done, "episode", data_vars="minimal", coords="minimal", compat="equals", join="exact")
    result = result.sel(episode=[episode.id for episode in episodes])
    result["log_probability"].attrs["units"] = "nats"
    result.attrs = {
        **facts(model),
        "experiment": "knockout",
        "controls": controls,
        "controls_seed": seed,
        "max_new_tokens": limit if answers else 0,
        "n_attempted": len(episodes),
        "n_done": result.sizes["episode"],
    }
    return result


def n_conditions(interventions: Sequence[Intervention], controls: int) -> int:
    """How often :func:`knockout` reads each episode, at most."""
    return 1 + sum(1 + controls * len(intervention.controls) for intervention in interventions)


def _check(
    episodes: Sequence[Episode],
    interventions: Sequence[Intervention],
    controls: int,
    batch_size: int,
    max_new_tokens: int | None,
) -> None:
    if not episodes or not interventions:
        raise UsageError("Knocking out needs at least one episode and one thing to take away.")
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    labels = [intervention.label for intervention in interventions]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UsageError(f"Given twice: {', '.join(sorted(repeated))}.")
    if controls < 0 or batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise UsageError(
            f"There are 0 controls or more, and a batch and an answer hold at least one; asked for {controls}, "
            f"{batch_size} and {max_new_tokens}."
        )


def _check_keys(model: Model, episodes: Sequence[Episode], interventions: Sequence[Intervention]) -> None:
    """Refuse keys that no episode has, before anything is read; one of each layout tells."""
    kinds = {tuple(len(example.images) for example in episode.examples): episode for episode in reversed(episodes)}
    encodings = _encode(model, list(kinds.values()))
    for intervention in interventions:
        if intervention.keys and not any(n_hidden(intervention, encoding) for encoding in encodings):
            raise UsageError(
                f"No episode has tokens {intervention.keys!r} before its answer: hiding them would change nothing, so "
                f"leave them out (shots: {', '.join(map(str, sorted({len(layout) - 1 for layout in kinds})))})."
            )


def _parts(
    model: Model,
    episodes: Sequence[Episode],
    interventions: Sequence[Intervention],
    controls: int,
    seed: int,
    batch_size: int,
) -> list[tuple[Sequence[Episode], list[Condition]]]:
    """Episodes with their conditions: all alike, or by halves where heads write the mean of the other half."""
    if not any(intervention.method == "mean" for intervention in interventions):
        return [(episodes, _conditions(model, interventions, controls, seed, None))]
    means, half = means_of_other_half(model, episodes, batch_size), halves(len(episodes))
    return [
        (
            [episode for episode, own in zip(episodes, half, strict=True) if own == name],
            _conditions(model, interventions, controls, seed, mean),
        )
        for name, mean in means.items()
    ]


def _encode(model: Model, episodes: Sequence[Episode]) -> list[Encoding]:
    return [model.encode(episode, open_images(episode)) for episode in episodes]


def _conditions(
    model: Model,
    interventions: Sequence[Intervention],
    controls: int,
    seed: int,
    means: Tensor | None,
) -> list[Condition]:
    """The episodes as they are, then each intervention with its controls."""
    found = [Condition(-1, "", 0, [])]
    for number, intervention in enumerate(interventions):
        found.append(Condition(number, "", 0, edits_of(model, intervention, means)))
        for draw in range(controls):
            if "keys" in intervention.controls:
                keys = random_keys(intervention, draw, seed)
                found.append(Condition(number, "keys", draw, edits_of(model, intervention, means, keys=keys)))
            if "heads" in intervention.controls:
                other = random_heads(model, intervention, draw, seed)
                if other is not None:
                    found.append(Condition(number, "heads", draw, edits_of(model, other, means)))
    return found


def _measure(
    model: Model,
    episodes: Sequence[Episode],
    interventions: Sequence[Intervention],
    conditions: Sequence[Condition],
    max_new_tokens: int,
    onward: Callable[[int], None],
) -> xr.Dataset:
    """All conditions of one batch; its images are processed once."""
    encodings = _encode(model, episodes)
    batch = model.batch(encodings)
    prompts = model.batch(encodings, with_answer=False) if max_new_tokens else None
    log_probability, predictions = [], []
    for number, condition in enumerate(conditions):
        log_probability.append(answer_log_probability(model, batch, condition.edits))
        if prompts is not None:
            said = generate(model, prompts, max_new_tokens=max_new_tokens, edits=condition.edits)
            predictions.append([cut_answer(text) for text in said])
        onward(number + 1)
    hidden = count_hidden_keys(model, batch, interventions)
    # What hides nothing that can be seen has no effect to measure, not one of 0.
    idle = np.array([c.number >= 0 and bool(interventions[c.number].keys) for c in conditions])
    undefined = idle[:, None] & (hidden[[max(0, c.number) for c in conditions]] == 0)
    dims = ("condition", "episode")
    values: dict[str, tuple[tuple[str, ...], object]] = {
        "log_probability": (dims, np.where(undefined, np.nan, np.stack(log_probability))),
        "n_hidden": (("intervention", "episode"), hidden),
    }
    if prompts is not None:
        shown = [[example.answer for example in episode.demonstrations] for episode in episodes]

        def judge(accepted: Sequence[Sequence[str]]) -> np.ndarray:
            rows = [[exact_match(y, a) for y, a in zip(row, accepted, strict=True)] for row in predictions]
            return np.where(undefined, np.nan, np.array(rows, dtype=np.float64))

        values |= {
            "correct": (dims, judge([episode.query.answers for episode in episodes])),
            "copied": (dims, judge(shown)),
            "prediction": (dims, np.array(predictions, dtype=str)),
        }
    return xr.Dataset(
        values,
        coords={
            "episode": [episode.id for episode in episodes],
            "shots": ("episode", [episode.shots for episode in episodes]),
            "of": ("condition", [condition.number for condition in conditions]),
            "control": ("condition", [condition.control for condition in conditions]),
            "draw": ("condition", [condition.draw for condition in conditions]),
            "intervention": [intervention.label for intervention in interventions],
            "method": ("intervention", [intervention.method for intervention in interventions]),
        },
    )
