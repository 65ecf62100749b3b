"""What the strategies of choosing compare, and in which order they then take the pool's examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal

from probe.data.example import Example
from probe.data.images import image_identity
from probe.scoring import answer_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Key = Literal["image", "question", "question+answer"]
"""What of an example is compared."""


# ------------------------------------------------------------------------------------------------ who shows which image


class Shown:
    """Which examples of the pool show an image."""

    def __init__(self, pool: Sequence[Example]) -> None:
        self.pool = pool
        self.pictures = [_pictures(example) for example in pool]
        self._showing: dict[str, set[int]] = defaultdict(set)
        self._named: dict[tuple[str, str], set[int]] = defaultdict(set)
        for place, (example, pictures) in enumerate(zip(pool, self.pictures, strict=True)):
            self._named[example.id, example.question].add(place)
            for picture in pictures:
                self._showing[picture].add(place)

    def with_images_of(self, example: Example) -> set[int]:
        """Places of those who share an image with an example from anywhere."""
        return self.showing(_pictures(example))

    def showing(self, pictures: Iterable[str]) -> set[int]:
        """Places of those who show one of these pictures."""
        return set().union(*(self._showing.get(picture, ()) for picture in pictures))

    def giving(self, key: str) -> set[int]:
        """Places of those whose shown answer has this key (:func:`probe.scoring.answer_key`)."""
        return self._giving.get(key, set())

    @cached_property
    def _giving(self) -> dict[str, set[int]]:
        places: dict[str, set[int]] = defaultdict(set)
        for place, example in enumerate(self.pool):
            places[answer_key(example.answer)].add(place)
        return places

    def same_as(self, example: Example) -> set[int]:
        """Places of the example itself: of the same id and question."""
        return self._named.get((example.id, example.question), set())


def _pictures(example: Example) -> set[str]:
    return {image_identity(image, where=f"example {example.id}") for image in example.images}


# ------------------------------------------------------------------------------------------------------------- ranking


@dataclass
class View:
    """The pool as one query sees it."""

    query: Example
    pool: Sequence[Example]
    shown: Shown
    taken: set[int]
    similarity: dict[Key, NDArray[np.float64]]
    rng: np.random.Generator
    distinct: bool
    candidates: int

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean similarity by all keys."""
        import numpy as np

        return np.asarray(np.mean(list(self.similarity.values()), axis=0))

    def ranked(self, *scores: NDArray[np.float64], among: Sequence[int] | None = None) -> Iterator[int]:
        """Places of the pool, highest first score first; equal ones by the next score, then by chance.

        Only as much is sorted as is asked for: pools have hundreds of thousands of examples.
        """
        import numpy as np

        places = np.arange(len(self.pool)) if among is None else np.asarray(among, dtype=np.int64)
        chance = self.rng.random(len(places))
        first = scores[0][places]
        given, most = 0, 256
        while given < len(places):
            most = min(most * 8, len(places))
            cut = np.partition(first, len(places) - most)[len(places) - most]
            head = np.flatnonzero(first >= cut)  # with all that are equal to the last
            # lexsort sorts by its last key first
            sorted_head = head[np.lexsort((chance[head], *(-score[places[head]] for score in reversed(scores))))]
            yield from places[sorted_head[given:]].tolist()
            given = len(head)

    def allowed(self, ranked: Iterable[int]) -> Iterator[int]:
        """Those that may stand before the query."""
        used: set[int] = set()
        for place in ranked:
            if place not in self.taken and place not in used:
                yield place
                used.add(place)
                if self.distinct:
                    used |= self.shown.showing(self.shown.pictures[place])


Rank = Callable[[View], Iterator[int]]


@dataclass(frozen=True)
class Picked:
    """Places of the pool, best first; ``target`` is the one that alone gives the query's answer, if that was asked."""

    places: list[int]
    target: int | None = None


def pick(rank: Rank, view: View, shots: int) -> Picked:
    """The best."""
    return Picked(list(islice(view.allowed(rank(view)), shots)))


def pick_alone(rank: Rank, view: View, shots: int) -> Picked | None:
    """The best that gives the query's answer, among the best that do not; ``None`` if nobody gives it."""
    wanted = {answer_key(answer) for answer in view.query.answers}
    giving = set().union(*(view.shown.giving(key) for key in wanted)) - view.taken
    if not giving:
        return None
    target: int | None = None
    picked: list[int] = []
    used: set[int] = set()
    for place in rank(view):
        if place in view.taken or place in used:
            continue
        if place in giving:
            if target is not None:
                continue
            target = place
        elif len(picked) - (target is not None) == shots - 1:
            continue
        picked.append(place)
        # What was passed over blocks no image, and what was picked is not met again.
        used |= view.shown.showing(view.shown.pictures[place]) if view.distinct else set()
        if len(picked) == shots:
            break
    return None if target is None else Picked(picked, target)


def _at_random(view: View) -> Iterator[int]:
    # One by one, and drawn again if taken: so the first demonstrations do not depend on how many follow. When nearly
    # all are gone, the rest are drawn as one order.
    seen: set[int] = set()
    while 2 * len(seen) < len(view.pool):
        place = int(view.rng.integers(len(view.pool)))
        if place not in seen:
            seen.add(place)
            yield place
    yield from (place for place in view.rng.permutation(len(view.pool)).tolist() if place not in seen)


def _nearest(*keys: Key) -> Rank:
    return lambda view: view.ranked(*(view.similarity[key] for key in keys))


def _narrowed(first: Key, then: Key) -> Rank:
    def rank(view: View) -> Iterator[int]:
        near = islice(view.allowed(view.ranked(view.similarity[first])), view.candidates)
        return view.ranked(view.similarity[then], among=list(near))

    return rank


def _nearest_images_questions(view: View) -> Iterator[int]:
    groups: list[set[int]] = []
    seen: set[int] = set()
    for place in view.ranked(view.similarity["image"]):
        if len(groups) == view.candidates:
            break
        if place not in seen and place not in view.taken:
            groups.append(view.shown.showing(view.shown.pictures[place]) | {place})
            seen |= groups[-1]
    return view.ranked(view.similarity["question"], among=sorted(seen))


def _in_turn(one: Key, other: Key) -> Rank:
    def rank(view: View) -> Iterator[int]:
        given: set[int] = set()
        rankings = [view.allowed(view.ranked(view.similarity[key])) for key in (one, other)]
        for ranking in cycle(rankings):
            place = next((place for place in ranking if place not in given), None)
            if place is None:  # both rank the same examples, so neither has any left
                return
            given.add(place)
            yield place

    return rank


@dataclass(frozen=True)
class Strategy:
    """How demonstrations are chosen.

    Attributes
    ----------
    rank
        Gives the places of the pool, best first.
    keys
        What is compared; nothing for random choice.
    alone
        Whether one demonstration alone may give the query's answer.
    distinct
        Whether no two demonstrations may share an image.
    wrong
        Whether the one that alone gives the query's answer gives a wrong one instead.
    """

    rank: Rank
    keys: tuple[Key, ...] = ()
    alone: bool = False
    distinct: bool = False
    wrong: bool = False


STRATEGIES: dict[str, Strategy] = {
    "RS": Strategy(_at_random),
    "SI": Strategy(_nearest("image"), ("image",)),
    "SQ": Strategy(_nearest("question"), ("question",)),
    "SQA": Strategy(_nearest("question+answer"), ("question+answer",)),
    "SQPA": Strategy(_nearest("question+answer"), ("question+answer",)),
    "SI-Q": Strategy(_narrowed("image", "question"), ("image", "question")),
    "SQ-I": Strategy(_narrowed("question", "image"), ("question", "image")),
    "SI-1": Strategy(_nearest_images_questions, ("image", "question")),
    "SI-2": Strategy(_nearest("image", "question"), ("image", "question"), distinct=True),
    "SI+SQ": Strategy(lambda view: view.ranked(view.mean), ("image", "question")),
    "SI/SQ": Strategy(_in_turn("image", "question"), ("image", "question")),
    "sole": Strategy(_nearest("question+answer"), ("question+answer",), alone=True),
    "sole-wrong": Strategy(_nearest("question+answer"), ("question+answer",), alone=True, wrong=True),
}
"""All strategies by name."""
