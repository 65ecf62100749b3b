"""Episodes with a closed set of labels: a question and a few of its answers, each demonstrated equally often.

What a label means can only be changed (:mod:`probe.data.perturb`: random, flipped, abstract) where it is clear which
labels there are. So examples are grouped by what they ask, of each group the commonest answers are its labels, and an
episode stays within its group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from probe.data.example import Episode, Example, check_request
from probe.data.strategies import Shown
from probe.errors import UsageError

LABELS = 4
"""Of each group, unless asked otherwise."""


@dataclass(frozen=True)
class Group:
    """Examples that ask the same.

    Attributes
    ----------
    name
        ``info["group"]`` of its examples, else their question.
    members
        Places in the pool by label, the commonest label first.
    """

    name: str
    members: dict[str, list[int]]

    @property
    def labels(self) -> list[str]:
        """Commonest first."""
        return list(self.members)


def label_groups(pool: Sequence[Example], *, labels: int = LABELS, shots: int = 0) -> dict[str, Group]:
    """The groups of a pool, by name.

    Parameters
    ----------
    pool
        The examples.
    labels
        Of each group, the so many commonest answers are its labels; their examples are its members.
    shots
        Demonstrations that are to show each label equally often, besides a query of any label. A group has fewer labels
        if some are too rare for that, and with fewer than two it is none.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, example in enumerate(pool):
        places[group_name(example)].append(place)
    groups = {}
    for name, members in places.items():
        counts = Counter(pool[place].answer for place in members).most_common(labels)
        # From the most labels down: the fewer there are, the oftener each is shown.
        enough = (k for k in range(len(counts), 1, -1) if counts[k - 1][1] > -(-shots // k))
        k = next(enough, 0)
        if k:
            chosen = [label for label, _ in counts[:k]]
            groups[name] = Group(name, {label: [p for p in members if pool[p].answer == label] for label in chosen})
    return groups


def group_name(example: Example) -> str:
    """What an example shares with those that ask the same."""
    return str(example.info.get("group", example.question))


def labelled_episodes(
    pool: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    shots: int,
    n: int,
    seed: int = 0,
    labels: int = LABELS,
) -> list[Episode]:
    """Make episodes whose demonstrations show each label of the query's group equally often.

    Of k labels, any k demonstrations in a row from the first on show each once, in an order drawn afresh. So more shots
    begin with the same demonstrations, and what is common among the labels is the same at every number of shots.

    Parameters
    ----------
    pool
        From which demonstrations come.
    queries
        What is asked, as far as it belongs to a group of the pool and has one of its labels; default: the pool itself.
    shots
        Demonstrations in each episode.
    n
        Number of episodes at most. Each query is taken at most once, in an order drawn from ``seed``.
    seed
        Of queries and demonstrations.
    labels
        At most so many to a group.

    Returns
    -------
    list of Episode
        ``info`` has the ``label_set``, commonest label first, and the ``group``.

    Raises
    ------
    UsageError
        If a number is out of range, no query belongs to a group with two labels, or a label has too few examples.
    """
    check_request(shots, n, seed)
    if labels < 2:
        raise UsageError(f"A set of labels has two or more; asked for {labels}.")
    own = queries is None
    asked = pool if queries is None else queries
    groups = label_groups(pool, labels=labels, shots=shots)
    nothing = Group("", {})
    eligible = [place for place, x in enumerate(asked) if x.answer in groups.get(group_name(x), nothing).members]
    if not eligible:
        raise UsageError(
            f"No query belongs to a question of the pool that has two answers with enough examples for {shots} shots; "
            "give a larger pool, or ask for fewer shots."
        )
    import numpy as np

    shown = Shown(pool)
    episodes = []
    for number, place in enumerate(np.random.default_rng((seed, 2)).permutation(eligible)[:n].tolist()):
        query, group = asked[place], groups[group_name(asked[place])]
        rng = np.random.default_rng((seed, 3, number))
        taken = shown.with_images_of(query) | ({place} if own else shown.same_as(query))
        waiting = {
            label: [p for p in rng.permutation(members).tolist() if p not in taken]
            for label, members in group.members.items()
        }
        order = [label for _ in range(-(-shots // len(waiting))) for label in rng.permutation(group.labels).tolist()]
        demonstrations = []
        for label in order[:shots]:
            if not waiting[label]:
                raise UsageError(
                    f"The query {query.id!r} needs more examples of {group.name!r} with the answer {label!r} than the "
                    "pool has; give a larger pool, or ask for fewer shots or labels."
                )
            demonstrations.append(pool[waiting[label].pop()])
        info = {"label_set": group.labels, "group": group.name}
        episodes.append(Episode(f"balanced-{seed}-{number}", tuple(demonstrations), query, "balanced", seed, info=info))
    return episodes
