"""What each perturbation of :mod:`probe.data.perturb` changes in an episode."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from probe.data.example import Episode, Example, Picture
from probe.data.images import open_image
from probe.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

BLUR = 15
"""Radius of the blur, in pixels (Li et al.)."""

SYMBOLS = tuple("@#$%*&+=~^")
"""Labels that mean nothing, for ``abstract-labels`` (as Pan et al.'s)."""

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
    labels: Sequence[str] | None
    sentences: Mapping[str, str]
    symbols: Sequence[str] = SYMBOLS


# ------------------------------------------------------------------------------------------- parts of other examples


def _others(
    episode: Episode, example: Example, material: Material, part: Callable[[Example], object], what: str
) -> list[Example]:
    """Examples of the pool that differ from ``example`` in a part, the episode's query left out."""
    found = [other for other in material.pool if other.id != episode.query.id and part(other) != part(example)]
    if not found:
        raise UsageError(
            f"Episode {episode.id}, example {example.id}: no example of the pool has another {what}; give a larger "
            "pool."
        )
    return found


def _mismatched(what: str, part: Callable[[Example], object], change: Callable[[Example, Example], Example]) -> Change:
    def apply(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
        made = []
        for example in episode.demonstrations:
            others = _others(episode, example, material, part, what)
            made.append(change(example, others[int(rng.integers(len(others)))]))
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
    """A wrong answer of the type of the example's own: to the same question if the pool has one."""
    kind = answer_type(example.answer)
    accepted = {answer.lower() for answer in (*example.answers, *avoid)}
    if kind == "yes/no":
        found = [answer for answer in ("no", "yes") if answer not in accepted]
    else:
        wrong = [x for x in material.pool if x.answer.lower() not in accepted and answer_type(x.answer) == kind]
        found = sorted({x.answer for x in wrong if x.question == example.question}) or sorted({x.answer for x in wrong})
    if not found:
        raise UsageError(
            f"Episode {episode.id}, example {example.id}: the pool has no answer of the type {kind!r} other than "
            f"{', '.join(sorted(accepted))}; give a larger pool."
        )
    return found[int(rng.integers(len(found)))]


def _with_demonstration(episode: Episode, place: int, answer: str) -> Episode:
    changed = list(episode.demonstrations)
    changed[place] = replace(changed[place], answers=(answer,))
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
    example = episode.demonstrations[place]
    answer = wrong_answer(episode, example, material, rng, avoid=episode.query.answers)
    return _with_demonstration(episode, place, answer)


def _planted_answer(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    if not episode.shots:
        raise UsageError(f"Episode {episode.id} has no demonstration in which an answer could be planted.")
    place = int(rng.integers(episode.shots))
    avoid = [answer for example in episode.examples for answer in example.answers]
    answer = wrong_answer(episode, episode.demonstrations[place], material, rng, avoid)
    planted = {"demonstration": place, "answer": answer}
    return replace(_with_demonstration(episode, place, answer), info={**episode.info, "planted": planted})


# ------------------------------------------------------------------------------------------------------------ images


def _permuted_images(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    n = episode.shots
    if n < 2:
        raise UsageError(f"Episode {episode.id} has {n} demonstrations; exchanging images needs two or more.")
    order = _derangement(n, rng)
    made = [
        replace(example, images=episode.demonstrations[source].images)
        for example, source in zip(episode.demonstrations, order, strict=True)
    ]
    return replace(episode, demonstrations=tuple(made))


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
    made = [replace(x, answers=(labels[int(rng.integers(len(labels)))],)) for x in episode.demonstrations]
    return replace(episode, demonstrations=tuple(made))


def _relabel(episode: Episode, mapping: Mapping[str, str]) -> Episode:
    """Exchange every shown answer and the query's; what was true is kept."""
    made = [replace(example, answers=(mapping[example.answer],)) for example in episode.demonstrations]
    info = {
        **episode.info,
        "gold": episode.info.get("gold", list(episode.query.answers)),
        "label_set": [mapping[label] for label in mapping],
    }
    query = replace(episode.query, answers=(mapping[episode.query.answer],))
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
    found = sorted({x.question for x in material.pool if answer_type(x.answer) == kind} - {query.question})
    if not found:
        raise UsageError(
            f"Episode {episode.id}: the pool has no other question than {query.question!r} with an answer of the type "
            f"{kind!r}; give a larger pool."
        )
    return replace(episode, query=replace(query, question=found[int(rng.integers(len(found)))]))


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
    "mismatched-image": _mismatched("image", lambda x: x.images, lambda x, other: replace(x, images=other.images)),
    "mismatched-question": _mismatched(
        "question", lambda x: x.question, lambda x, other: replace(x, question=other.question)
    ),
    "mismatched-answer": _mismatched("answer", lambda x: x.answer, lambda x, other: replace(x, answers=other.answers)),
    "mismatched-pair": _mismatched(
        "question and answer",
        lambda x: (x.question, x.answer),
        lambda x, other: replace(x, question=other.question, answers=other.answers),
    ),
    "wrong-answers": _wrong_answers,
    "wrong-target": _wrong_target,
    "planted-answer": _planted_answer,
    "permuted-images": _permuted_images,
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
