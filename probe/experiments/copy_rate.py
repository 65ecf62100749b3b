"""How often a model answers what a demonstration answers, and whether it does so because the demonstration says it.

The measures are those of :mod:`probe.measures.copying`. Two of them can be trusted where demonstrations are retrieved:
*harmful* copying, which being right cannot explain, and *counterfactual* copying, which is causal. For the latter every
episode is read twice: as it is, and with a wrong answer planted in one demonstration. How much more often the model
says the planted answer when it is there is how often it copied it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from probe.data.changes import answer_type
from probe.data.example import Episode, Example
from probe.data.perturb import perturb
from probe.errors import UsageError
from probe.experiments.answering import answering, score
from probe.measures.copying import NOWHERE, copying
from probe.models.model import Model
from probe.scoring import exact_match
from probe.store import Keep


def copy_rate(
    model: Model,
    episodes: Sequence[Episode],
    *,
    pool: Sequence[Example] | None = None,
    counterfactual: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure copying, query by query.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Of one or several strategies and numbers of shots; each pair of these is measured by itself.
    pool
        From which planted answers are taken; default all examples of the episodes.
    counterfactual
        Whether to plant an answer, which takes a second reading.
    seed
        Of what is planted.
    batch_size
        Episodes in one forward.
    max_new_tokens
        Length at which an answer is cut; default :func:`~probe.experiments.answering.answer_limit`.
    keep
        Keeps finished batches.
    progress
        Called with the number of episodes read after every batch, of :func:`n_readings`.

    Returns
    -------
    xarray.Dataset
        What :func:`~probe.experiments.answering.answering` gives, and over ``episode``: ``copied``, ``gold_shown``,
        ``harmful``, ``right``, ``place`` (-1: nowhere, or in several), ``null`` (NaN unless the strategy is ``RS``),
        ``majority`` and ``majority_score``, ``answer_type``, and for the planted answer ``planted`` (its text),
        ``planted_place``, ``planted_before`` and ``planted_after`` (whether the model said it without and with it; NaN
        where none could be planted). ``after`` is what it said then.

    Raises
    ------
    UsageError
        If there is no demonstration anywhere, or two episodes have the same id.
    """
    if not any(episode.shots for episode in episodes):
        raise UsageError("There are no demonstrations to copy from; ask for one shot or more.")
    if len({episode.id for episode in episodes}) < len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "keep": keep}
    result = answering(model, episodes, name="as-is-", progress=progress, **options)  # type: ignore[arg-type]
    result = result.merge(_measured(result, episodes))
    if counterfactual:
        material = pool or list({id(x): x for episode in episodes for x in episode.examples}.values())
        changed = perturb(episodes, "planted-answer", seed=seed, pool=material, leave_out=True)

        def onward(done: int) -> None:
            if progress:
                progress(len(episodes) + done)

        said: list[str] = []
        if changed:
            after = answering(model, changed, name="planted-", progress=onward, **options)  # type: ignore[arg-type]
            said = after["prediction"].values.tolist()
        result = result.merge(_compared(result, changed, said))
    result.attrs |= {"experiment": "copy_rate", "counterfactual": int(counterfactual), "planting_seed": seed}
    return result


def n_readings(episodes: Sequence[Episode], *, counterfactual: bool) -> int:
    """How many episodes :func:`copy_rate` reads at most."""
    return len(episodes) * (1 + counterfactual)


def _measured(result: xr.Dataset, episodes: Sequence[Episode]) -> xr.Dataset:
    """Copying of each episode, among those of its strategy and shots."""
    n = len(episodes)
    values: dict[str, np.ndarray] = {
        name: np.zeros(n, dtype=bool) for name in ("copied", "gold_shown", "harmful", "right")
    }
    values |= {"place": np.full(n, NOWHERE), "null": np.full(n, np.nan)}
    majority = [""] * n
    groups: dict[tuple[str, int], list[int]] = {}
    for place, episode in enumerate(episodes):
        groups.setdefault((episode.strategy, episode.shots), []).append(place)
    for (strategy, _), places in groups.items():
        measured = copying(
            [str(result["prediction"].values[place]) for place in places],
            [[example.answer for example in episodes[place].demonstrations] for place in places],
            [episodes[place].query.answers for place in places],
            _shown_queries([episodes[place] for place in places]),
        )
        for name, array in values.items():
            if name != "null" or strategy == "RS":
                array[places] = getattr(measured, name)
        for place, vote in zip(places, measured.majority, strict=True):
            majority[place] = vote
    return xr.Dataset(
        {
            **{name: ("episode", array) for name, array in values.items()},
            "majority": ("episode", np.array(majority, dtype=str)),
            "majority_score": ("episode", [score(vote, e.query) for vote, e in zip(majority, episodes, strict=True)]),
            "answer_type": ("episode", np.array([_type_of(episode.query) for episode in episodes], dtype=str)),
        },
        coords={"episode": result["episode"]},
    )


def _shown_queries(episodes: Sequence[Episode]) -> list[set[int]]:
    """For each episode, the places of those whose query it shows as a demonstration."""
    queries = {(e.query.id, e.query.question): place for place, e in enumerate(episodes)}
    return [{queries[key] for x in e.demonstrations if (key := (x.id, x.question)) in queries} for e in episodes]


def _type_of(example: Example) -> str:
    """As the data set says, else as the answer looks."""
    return str(example.info.get("answer_type") or answer_type(example.answer))


def _compared(result: xr.Dataset, changed: Sequence[Episode], after: Sequence[str]) -> xr.Dataset:
    """What was said before planting and, for the episodes that were changed, ``after``."""
    n = result.sizes["episode"]
    said = {name: np.full(n, np.nan) for name in ("planted_before", "planted_after")}
    texts = {name: [""] * n for name in ("planted", "after")}
    where = np.full(n, NOWHERE)
    places = {name: place for place, name in enumerate(result["episode"].values.tolist())}
    for episode, then in zip(changed, after, strict=True):
        place, answer = places[episode.id], episode.info["planted"]["answer"]
        where[place] = episode.info["planted"]["demonstration"]
        texts["planted"][place], texts["after"][place] = answer, then
        said["planted_before"][place] = exact_match(str(result["prediction"].values[place]), [answer])
        said["planted_after"][place] = exact_match(then, [answer])
    return xr.Dataset(
        {
            **{name: ("episode", array) for name, array in said.items()},
            **{name: ("episode", np.array(words, dtype=str)) for name, words in texts.items()},
            "planted_place": ("episode", where),
        },
        coords={"episode": result["episode"]},
    )
