"""How copying depends on the likeness of the demonstrations, and on how often they repeat a wrong answer.

For each query the pool is ranked by likeness to it. At each *level*, the demonstrations are neighbours in this ranking:
at level 0 the nearest, at level 1 the farthest, in between those around that part of it. The same wrong answer, which
is neither the query's nor anybody's own, is then planted in 0, 1, … of them. What is measured is how often the model
says it. Of a query and a level, all repetitions show the same demonstrations, and whoever has the wrong answer keeps
it when one more gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from probe.data.changes import Material, wrong_answer
from probe.data.choose import Space, unit_space
from probe.data.example import Episode, Example, check_request
from probe.data.groups import group_name
from probe.data.strategies import Shown
from probe.errors import UsageError
from probe.experiments.answering import answering
from probe.models.model import Model
from probe.scoring import exact_match
from probe.store import Keep

LEVELS = (0.0, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Planted:
    """An episode at one level: which answer is planted, in which order of places, and how like they are."""

    episode: Episode
    answer: str
    order: tuple[int, ...]
    similarity: float

    def repeated(self, times: int) -> Episode:
        """The episode with the answer in so many demonstrations."""
        changed = list(self.episode.demonstrations)
        for place in self.order[:times]:
            changed[place] = replace(changed[place], answers=(self.answer,))
        name = f"planted {self.answer} in {times}"
        return replace(self.episode, demonstrations=tuple(changed), perturbations=(name,))


def copy_sweep(
    model: Model,
    pool: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    space: Space,
    shots: int = 4,
    n: int = 60,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure how often a planted wrong answer is given, by likeness and repetition.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    pool
        From which demonstrations and planted answers come: of the query's own question, if enough ask that. Queries
        that leave no wrong answer to plant, as yes and no do, are left out.
    queries
        What is asked; default: the pool itself.
    space
        Vectors that say what is alike (:func:`probe.models.spaces.embed`).
    shots
        Demonstrations in each episode.
    n
        Number of queries at most.
    levels
        Parts of the ranking, 0 (nearest) to 1 (farthest).
    seed
        Of queries, planted answers and their places.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches.
    progress
        Called with the number of episodes read, ``n * len(levels) * (shots + 1)`` in the end.

    Returns
    -------
    xarray.Dataset
        Over (level, repetition, episode): ``said_planted`` and ``correct``; over (level, episode): ``similarity``, the
        mean cosine of the demonstrations. ``n_attempted`` counts the queries that were left out too.

    Raises
    ------
    UsageError
        If a number is out of range, or the pool is too small.
    """
    check_request(shots, n, seed)
    if shots < 1 or not levels or any(not 0 <= level <= 1 for level in levels):
        raise UsageError(f"Planting needs one shot or more, and levels are 0 to 1; got {shots} and {list(levels)}.")
    planted = plant(pool, queries, space=space, shots=shots, n=n, levels=levels, seed=seed)
    said = np.zeros((len(levels), shots + 1, len(planted[0])))
    correct = np.zeros_like(said)
    done = 0
    for i, level in enumerate(levels):
        for times in range(shots + 1):

            def onward(now: int, before: int = done) -> None:
                if progress:
                    progress(before + now)

            answers = answering(
                model,
                [one.repeated(times) for one in planted[i]],
                batch_size=batch_size,
                keep=keep,
                name=f"level-{level:g}-{times}-",
                progress=onward,
            )
            predictions = answers["prediction"].values.tolist()
            said[i, times] = [exact_match(y, [one.answer]) for y, one in zip(predictions, planted[i], strict=True)]
            correct[i, times] = answers["correct"].values
            done += len(planted[i])
    return xr.Dataset(
        {
            "said_planted": (("level", "repetition", "episode"), said),
            "correct": (("level", "repetition", "episode"), correct),
            "similarity": (("level", "episode"), [[one.similarity for one in row] for row in planted]),
        },
        coords={
            "level": list(levels),
            "repetition": range(shots + 1),
            "query": ("episode", [one.episode.query.id for one in planted[0]]),
        },
        attrs={
            **answers.attrs,
            "experiment": "copy_sweep",
            "encoder": space.encoder,
            "n_attempted": min(n, len(pool if queries is None else queries)),
        },
    )


def plant(
    pool: Sequence[Example],
    queries: Sequence[Example] | None,
    *,
    space: Space,
    shots: int,
    n: int,
    levels: Sequence[float],
    seed: int,
) -> list[list[Planted]]:
    """The episodes, by level and query."""
    own, asked = queries is None, pool if queries is None else queries
    unit, shown, material = unit_space(space), Shown(pool), Material(pool)
    members: dict[str, list[int]] = {}
    for place, example in enumerate(pool):
        members.setdefault(group_name(example), []).append(place)
    planted: list[list[Planted]] = [[] for _ in levels]
    for number, index in enumerate(np.random.default_rng((seed, 4)).permutation(len(asked))[:n].tolist()):
        query, rng = asked[index], np.random.default_rng((seed, 5, number))
        taken = shown.with_images_of(query) | ({index} if own else shown.same_as(query))
        near = unit.cosine(index)
        group = [place for place in members.get(group_name(query), []) if place not in taken]
        if len(group) < shots * (len(levels) + 1):
            group = [place for place in range(len(pool)) if place not in taken]
        if len(group) < shots:
            raise UsageError(
                f"The query {query.id!r} needs {shots} demonstrations, but only {len(group)} other examples do not "
                "show its image; give a larger pool."
            )
        places = np.array(group)
        ranked = places[np.lexsort((rng.random(len(places)), -near[places]))]
        starts = [round(level * (len(ranked) - shots)) for level in levels]
        chosen = [ranked[start : start + shots][::-1].tolist() for start in starts]  # the nearest last
        everyone = [pool[place].answer for row in chosen for place in row] + list(query.answers)
        alone = Episode(f"sweep-{seed}-{number}", (), query, "sweep", seed)
        try:
            answer = wrong_answer(alone, query, material, rng, avoid=everyone)
        except UsageError:  # yes or no, and somebody says the other
            continue
        order = tuple(rng.permutation(shots).tolist())
        for row, places_of_level in zip(planted, chosen, strict=True):
            demonstrations = tuple(pool[place] for place in places_of_level)
            episode = replace(alone, demonstrations=demonstrations)
            row.append(Planted(episode, answer, order, float(near[places_of_level].mean())))
    if not planted[0]:
        raise UsageError(
            "No query has a wrong answer of its type that none of its demonstrations gives; give a larger pool, or "
            "questions that ask for more than yes or no."
        )
    return planted
