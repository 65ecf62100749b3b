"""Changing what demonstrations say: named, seeded transformations of episodes, which compose and are written down.

An episode goes in, another comes out, with the transformation's name and seed at the end of ``perturbations``. What an
episode becomes depends on its id, the name and the seed, not on the other episodes or on what else was done to it.

======================= ===============================================================================================
name                    what happens
======================= ===============================================================================================
``mismatched-image``    every demonstration shows the image(s) of another example
``mismatched-question`` every demonstration asks the question of another example
``mismatched-answer``   every demonstration gives the answer of another example, unlike its own
``mismatched-pair``     every demonstration has question and answer of another example
``wrong-answers``       every demonstration gives a wrong answer of the type of its own: no for yes, else another answer
                        to the same question, else another of the same type
``permuted-images``     the demonstrations exchange their images, none keeps its own
``blurred-images``      the demonstrations' images are blurred (Gaussian, 15 pixels)
``blurred-query``       the query's image is blurred so
``blank-images``        the demonstrations' images become one colour, their mean
``blank-query``         so does the query's
``random-labels``       every demonstration gives a label drawn from the label set (the query keeps its answer)
``flipped-labels``      all labels, the query's included, are exchanged for others: the same for the whole episode
``abstract-labels``     all labels, the query's included, become symbols: a bijection for each episode
``instruction``         the query's question begins with an instruction to follow the demonstrations
``declarative``         questions become declarative sentences with a blank, from a table that is given
======================= ===============================================================================================

The settings follow "How to Configure Good In-Context Sequence for Visual Question Answering" (Li et al., CVPR 2024)
and, for labels, Pan et al. (Findings of ACL 2023). Unlike the first one's code, a replacement always differs from what
it replaces, and nothing is changed in place.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from probe.data.example import Episode, Example, Picture
from probe.data.images import open_image
from probe.errors import UsageError, did_you_mean

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
        The label set; ``None``: the answers that the episode itself shows.
    sentences
        Declarative sentences by question.
    """

    pool: Sequence[Example]
    labels: Sequence[str] | None
    sentences: Mapping[str, str]


def perturb(
    episodes: Sequence[Episode],
    names: str | Sequence[str],
    *,
    seed: int = 0,
    pool: Sequence[Example] | None = None,
    labels: Sequence[str] | None = None,
    sentences: Mapping[str, str] | None = None,
) -> list[Episode]:
    """Transform every episode.

    Parameters
    ----------
    episodes
        They are left as they are; new ones are returned.
    names
        One or several of :data:`PERTURBATIONS`, applied in order.
    seed
        Of all draws.
    pool
        Examples from which others are taken (``mismatched-…``, ``wrong-answers``); default: all examples of the
        episodes. The episode's own query is never taken.
    labels
        The label set of ``random-labels``, ``flipped-labels`` and ``abstract-labels``; default: the answers that the
        demonstrations and the query of each episode show.
    sentences
        For ``declarative``: the sentence for each question.

    Returns
    -------
    list of Episode
        With the names and the seed added to ``perturbations``. Where the query's answers were exchanged,
        ``info["gold"]`` keeps the true ones.

    Raises
    ------
    UsageError
        If there is no such transformation, or an episode does not have what it needs.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in PERTURBATIONS:
            raise UsageError(f"There is no perturbation {name!r}; {did_you_mean(name, tuple(PERTURBATIONS))}")
    import numpy as np

    everything = {id(example): example for episode in episodes for example in episode.examples}
    material = Material(list(everything.values()) if pool is None else pool, labels, sentences or {})
    done = []
    for episode in episodes:
        for name in chosen:
            rng = np.random.default_rng((seed, *(zlib.crc32(text.encode()) for text in (name, episode.id))))
            changed = PERTURBATIONS[name](episode, material, rng)
            episode = replace(changed, perturbations=(*episode.perturbations, f"{name} (seed {seed})"))
        done.append(episode)
    return done


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


def _wrong_answers(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    made = []
    for example in episode.demonstrations:
        kind, own = answer_type(example.answer), {answer.lower() for answer in example.answers}
        if kind == "yes/no":
            made.append(replace(example, answers=("no" if example.answer.lower() == "yes" else "yes",)))
            continue
        wrong = [x for x in material.pool if x.answer.lower() not in own and answer_type(x.answer) == kind]
        found = sorted({x.answer for x in wrong if x.question == example.question}) or sorted({x.answer for x in wrong})
        if not found:
            raise UsageError(
                f"Episode {episode.id}, example {example.id}: the pool has no other answer of the type {kind!r} than "
                f"{example.answer!r}; give a larger pool."
            )
        made.append(replace(example, answers=(found[int(rng.integers(len(found)))],)))
    return replace(episode, demonstrations=tuple(made))


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
    labels = list(dict.fromkeys(shown if material.labels is None else material.labels))
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
    info = {**episode.info, "gold": episode.info.get("gold", list(episode.query.answers))}
    query = replace(episode.query, answers=(mapping[episode.query.answer],))
    return replace(episode, demonstrations=tuple(made), query=query, info=info)


def _flipped_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    labels = _label_set(episode, material)
    return _relabel(
        episode, {label: labels[to] for label, to in zip(labels, _derangement(len(labels), rng), strict=True)}
    )


def _abstract_labels(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    labels = _label_set(episode, material, least=1)
    if len(labels) > len(SYMBOLS):
        raise UsageError(f"Episode {episode.id} has {len(labels)} labels; there are {len(SYMBOLS)} symbols.")
    drawn = rng.permutation(len(SYMBOLS))[: len(labels)].tolist()
    return _relabel(episode, {label: SYMBOLS[at] for label, at in zip(labels, drawn, strict=True)})


# -------------------------------------------------------------------------------------------------------------- words


def _instruction(episode: Episode, material: Material, rng: np.random.Generator) -> Episode:
    return replace(episode, query=replace(episode.query, question=INSTRUCTION + episode.query.question))


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
    "permuted-images": _permuted_images,
    "blurred-images": _with_images(_blur, query=False),
    "blurred-query": _with_images(_blur, query=True),
    "blank-images": _with_images(_blank, query=False),
    "blank-query": _with_images(_blank, query=True),
    "random-labels": _random_labels,
    "flipped-labels": _flipped_labels,
    "abstract-labels": _abstract_labels,
    "instruction": _instruction,
    "declarative": _declarative,
}
"""All transformations by name."""
