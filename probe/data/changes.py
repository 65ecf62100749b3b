"""What each perturbation of :mod:`probe.data.perturb` changes in an episode."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from probe.data.example import Episode, Example, Picture
from probe.data.images import open_image
from probe.data.strategies import Shown
from probe.errors import UsageError
from probe.scoring import answer_key, exact_match

if TYPE_CHECKING:
    import numpy as np

BLUR = 15
"""Radius of the blur, in pixels (Li et al.)."""

SYMBOLS = tuple("@#$%*&+=~^")
"""Labels that mean nothing, for ``abstract-labels`` (as Pan et al.'s)."""

OF_ANSWERS = ("annotated", "multiple_choice_answer", "answer_confidence", "raw_answer")
"""What data sets say of an example's answers and not of the example."""

INSTRUCTION = "According to the previous question and answer pair, answer the final question. "


@dataclass(frozen=True)
class Material:
    """What a transformation may draw on.

    Attributes
    ----------
    pool
        Examples that take the place of others.
    labels
        The label set; ``None``: the episode's own (``info["label_set"]``), else the answers that it shows.
    sentences
        Declarative sentences by question.
    symbols
        What labels become when they are made abstract.
    """

    pool: Sequence[Example]
    labels: Sequence[str] | None = None
    sentences: Mapping[str, str] = field(default_factory=dict)
    symbols: Sequence[str] = SYMBOLS

    def draw(self, episode: Episode, suits: Callable[[Example], bool], rng: np.random.Generator) -> Example | None:
        """An example of the pool that suits, each as probable; never the episode's query, nor one with its image."""
        taken = self._shown.with_images_of(episode.query) | self._shown.same_as(episode.query)
        place = _draw(len(self.pool), lambda at: at not in taken and suits(self.pool[at]), rng)
        return None if place is None else self.pool[place]

    def draw_answer(
        self, episode: Episode, question: str | None, kind: str, avoid: Collection[str], rng: np.random.Generator
    ) -> str | None:
        """An answer of a type that the pool gives (to a question), each as probable; none that only the query gives."""
        own = self._shown.same_as(episode.query)
        given = self._answers.get((question, kind), {})
        answers = list(given)
        place = _draw(
            len(answers), lambda at: answer_key(answers[at]) not in avoid and not given[answers[at]] <= own, rng
        )
        return None if place is None else answers[place]

    @cached_property
    def _shown(self) -> Shown:
        return Shown(self.pool)

    @cached_property
    def _answers(self) -> dict[tuple[str | None, str], dict[str, set[int]]]:
        """Who gives each answer, by question (``None``: any) and type; in an order that the pool's does not change."""
        found: dict[tuple[str | None, str], dict[str, set[int]]] = {}
        for place in sorted(range(len(self.pool)), key=lambda at: self.pool[at].answer):
            example = self.pool[place]
            for question in (example.question, None):
                of_kind = found.setdefault((question, answer_type(example.answer)), {})
                of_kind.setdefault(example.answer, set()).add(place)
        return found


TRIES = 100
"""Draws before all places are looked through: pools are large, and nearly all of their examples suit."""


def _draw(n: int, suits: Callable[[int], bool], rng: np.random.Generator) -> int | None:
    """One of the places that suit, each as probable; ``None`` if there is none."""
    if not n:
        return None
    for place in rng.integers(n, size=TRIES).tolist():
        if suits(place):
            return int(place)
    found = [place for place in range(n) if suits(place)]
    return found[int(rng.integers(len(found)))] if found else None


# ------------------------------------------------------------------------------------------- parts of other examples


def _mismatched(
    what: str, differs: Callable[[Example, Example], bool], change: Callable[[Example, Example], Example]
) -> Change:
    def apply(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
        made = []
        for example in episode.demonstrations:
            other = material.draw(episode, lambda x, example=example: differs(x, example), rng)  # type: ignore[misc]
            if other is None:
                raise UsageError(
                    f"Episode {episode.id}, example {example.id}: no example of the pool has another {what}; give a "
                    "larger pool."
                )
            made.append(change(example, other))
        return replace(episode, demonstrations=tuple(made))

    return apply


def answer_type(answer: str) -> str:
    """``yes/no``, ``number`` or ``other``, as VQAv2 has it.

    >>> [answer_type(answer) for answer in ("Yes", "12", "two dogs")]
    ['yes/no', 'number', 'other']
    """
    text = answer.strip().lower()
    if text in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+([.,]\d+)?", text) else "other"


def wrong_answer(
    episode: Episode, example: Example, material: Material, rng: np.random.Generator, avoid: Sequence[str] = ()
) -> str:
    """A wrong answer of the type of the example's own: to the same question if the pool has one.

    For yes it is no, and the reverse, even if some annotators said that too.
    """
    kind = answer_type(example.answer)
    if kind == "yes/no":
        wrong = "no" if answer_key(example.answer) == "yes" else "yes"
        found = wrong if not exact_match(wrong, avoid) else None
    else:
        keys = {answer_key(answer) for answer in (*example.answers, *avoid)}
        found = material.draw_answer(episode, example.question, kind, keys, rng)
        found = found if found is not None else material.draw_answer(episode, None, kind, keys, rng)
    if found is None:
        raise UsageError(
            f"Episode {episode.id}, example {example.id}: no answer of the type {kind!r} is left that would be wrong; "
            "give a larger pool."
        )
    return found


def _answering(example: Example, answers: tuple[str, ...]) -> Example:
    """With other answers; what the data set says of its own no longer holds."""
    kept = {key: value for key, value in example.info.items() if key not in OF_ANSWERS}
    return replace(example, answers=answers, info=kept)


def _with_demonstration(episode: Episode, place: int, answer: str) -> Episode:
    changed = list(episode.demonstrations)
    changed[place] = _answering(changed[place], (answer,))
    return replace(episode, demonstrations=tuple(changed))


def _wrong_answers(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    for place, example in enumerate(episode.demonstrations):
        episode = _with_demonstration(episode, place, wrong_answer(episode, example, material, rng))
    return episode


def _wrong_target(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    place = episode.info.get("target")
    if place is None:
        raise UsageError(
            f"Episode {episode.id} has no demonstration that alone gives the query's answer; choose with the strategy "
            "'sole'."
        )
    example, query = episode.demonstrations[place], episode.query
    # Of yes and no one is wrong, even if some annotators of the query said it.
    avoid = (query.answer,) if answer_type(example.answer) == "yes/no" else query.answers
    return _with_demonstration(episode, place, wrong_answer(episode, example, material, rng, avoid))


def _planted_answer(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    if not episode.shots:
        raise UsageError(f"Episode {episode.id} has no demonstration in which an answer could be planted.")
    avoid = [answer for example in episode.examples for answer in example.answers]
    places = rng.permutation(episode.shots).tolist()
    for place in places:
        try:
            answer = wrong_answer(episode, episode.demonstrations[place], material, rng, avoid)
        except UsageError:
            if place == places[-1]:
                raise
            continue
        planted = {"demonstration": place, "answer": answer}
        return replace(_with_demonstration(episode, place, answer), info={**episode.info, "planted": planted})
    raise AssertionError("the last place returns or raises")


# ------------------------------------------------------------------------------------------------------------ images


def _permuted(what: str, exchange: Callable[[Example, Example], Example]) -> Change:
    """Demonstrations exchange a part of theirs, so that none keeps its own."""

    def change(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
        n = episode.shots
        if n < 2:
            raise UsageError(f"Episode {episode.id} has {n} demonstrations; exchanging {what} needs two or more.")
        order = _derangement(n, rng)
        made = [exchange(x, episode.demonstrations[of]) for x, of in zip(episode.demonstrations, order, strict=True)]
        return replace(episode, demonstrations=tuple(made))

    return change


def _derangement(n: int, rng: np.random.Generator) -> list[int]:
    """A uniformly drawn order of n things in which none stays in its place."""
    while True:
        order: list[int] = rng.permutation(n).tolist()
        if all(place != source for place, source in enumerate(order)):
            return order


def _blur(picture: Picture, where: str) -> Picture:
    from PIL import ImageFilter

    return open_image(picture, where=where).filter(ImageFilter.GaussianBlur(BLUR))


def _blank(picture: Picture, where: str) -> Picture:
    from PIL import Image, ImageStat

    image = open_image(picture, where=where)
    mean = tuple(round(value) for value in ImageStat.Stat(image).mean)
    return Image.new("RGB", image.size, mean)


def _with_images(change: Callable[[Picture, str], Picture], *, query: bool) -> Change:
    def see(episode: Episode, example: Example) -> Example:
        where = f"episode {episode.id}, example {example.id}"
        return replace(example, images=tuple(change(image, where) for image in example.images))

    def apply(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
        if query:
            return replace(episode, query=see(episode, episode.query))
        return replace(episode, demonstrations=tuple(see(episode, example) for example in episode.demonstrations))

    return apply


# ------------------------------------------------------------------------------------------------------------ labels


def _label_set(episode: Episode, material: Material, least: int = 2) -> list[str]:
    shown = [example.answer for example in episode.examples]
    given = episode.info.get("label_set", shown) if material.labels is None else material.labels
    labels = list(dict.fromkeys(given))
    missing = [label for label in shown if label not in labels]
    if missing:
        raise UsageError(f"Episode {episode.id} shows {missing[0]!r}, which is none of the labels {', '.join(labels)}.")
    if len(labels) < least:
        raise UsageError(
            f"Episode {episode.id} has one label, {labels[0]!r}: with one there is nothing to exchange. Give labels=."
        )
    return labels


def _random_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    labels = _label_set(episode, material)
    made = [_answering(x, (labels[int(rng.integers(len(labels)))],)) for x in episode.demonstrations]
    return replace(episode, demonstrations=tuple(made))


def _relabel(episode: Episode, mapping: Mapping[str, str]) -> Episode:
    """Exchange every shown answer and the query's; what was true is kept."""
    made = [_answering(example, (mapping[example.answer],)) for example in episode.demonstrations]
    info = {
        **episode.info,
        "gold": episode.info.get("gold", list(episode.query.answers)),
        "label_set": [mapping[label] for label in mapping],
    }
    query = _answering(episode.query, (mapping[episode.query.answer],))
    return replace(episode, demonstrations=tuple(made), query=query, info=info)


def _flipped_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    labels = _label_set(episode, material)
    return _relabel(
        episode, {label: labels[to] for label, to in zip(labels, _derangement(len(labels), rng), strict=True)}
    )


def _abstract_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    labels = _label_set(episode, material, least=1)
    symbols = material.symbols
    if len(labels) > len(symbols):
        raise UsageError(
            f"Episode {episode.id} has {len(labels)} labels, but there are {len(symbols)} symbols; give more, or fewer "
            "labels."
        )
    drawn = rng.permutation(len(symbols))[: len(labels)].tolist()
    mapping = {label: symbols[at] for label, at in zip(labels, drawn, strict=True)}
    changed = _relabel(episode, mapping)
    meaning = {symbol: label for label, symbol in mapping.items()}
    return replace(changed, info={**changed.info, "mapping": meaning})


def _stated_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    changed = _abstract_labels(episode, material, rng)
    meaning = ", ".join(f"{symbol} for {label}" for symbol, label in changed.info["mapping"].items())
    question = f"Answer with {meaning}. {changed.query.question}"
    return replace(changed, query=replace(changed.query, question=question))


# -------------------------------------------------------------------------------------------------------------- words


def _instruction(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    return replace(episode, query=replace(episode.query, question=INSTRUCTION + episode.query.question))


def _other_question(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    query = episode.query
    kind = answer_type(query.answer)
    other = material.draw(episode, lambda x: x.question != query.question and answer_type(x.answer) == kind, rng)
    if other is None:
        raise UsageError(
            f"Episode {episode.id}: the pool has no other question than {query.question!r} with an answer of the type "
            f"{kind!r}; give a larger pool."
        )
    return replace(episode, query=replace(query, question=other.question))


def _declarative(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    def say(example: Example) -> Example:
        if example.question not in material.sentences:
            raise UsageError(
                f"Episode {episode.id}, example {example.id}: there is no sentence for {example.question!r}; add it to "
                "sentences=."
            )
        return replace(example, question=material.sentences[example.question])

    return replace(episode, demonstrations=tuple(map(say, episode.demonstrations)), query=say(episode.query))


Change = Callable[[Episode, Material, "np.random.Generator"], Episode]

PERTURBATIONS: dict[str, Change] = {
    "mismatched-image": _mismatched(
        "image", lambda x, own: x.images != own.images, lambda x, other: replace(x, images=other.images)
    ),
    "mismatched-question": _mismatched(
        "question", lambda x, own: x.question != own.question, lambda x, other: replace(x, question=other.question)
    ),
    "mismatched-answer": _mismatched(
        "answer", lambda x, own: not exact_match(x.answer, own.answers), lambda x, other: _answering(x, other.answers)
    ),
    "mismatched-pair": _mismatched(
        "question and answer",
        lambda x, own: x.question != own.question or not exact_match(x.answer, own.answers),
        lambda x, other: _answering(replace(x, question=other.question), other.answers),
    ),
    "wrong-answers": _wrong_answers,
    "wrong-target": _wrong_target,
    "planted-answer": _planted_answer,
    "permuted-images": _permuted("images", lambda x, other: replace(x, images=other.images)),
    "permuted-answers": _permuted("answers", lambda x, other: _answering(x, other.answers)),
    "blurred-images": _with_images(_blur, query=False),
    "blurred-query": _with_images(_blur, query=True),
    "blank-images": _with_images(_blank, query=False),
    "blank-query": _with_images(_blank, query=True),
    "random-labels": _random_labels,
    "flipped-labels": _flipped_labels,
    "abstract-labels": _abstract_labels,
    "stated-labels": _stated_labels,
    "other-question": _other_question,
    "instruction": _instruction,
    "declarative": _declarative,
}
"""All transformations by name."""
