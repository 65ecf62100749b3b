"""From examples and encoders to the vectors in which :func:`probe.choose` compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.data.choose import Space
from probe.data.example import Example
from probe.data.images import image_identity
from probe.data.strategies import STRATEGIES, Key
from probe.errors import UsageError
from probe.models.encoders import Encoder


def embed(
    pool: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    strategies: Sequence[str],
    images: Encoder | None = None,
    texts: Encoder | None = None,
    pseudo_answers: Mapping[str, str] | None = None,
) -> dict[Key, Space]:
    """Encode what the strategies compare.

    An example with several images has the mean of their vectors, each at unit length. Question and answer are one text,
    with a space between them.

    Parameters
    ----------
    pool
        From which demonstrations will come.
    queries
        What will be asked; default: the pool itself.
    strategies
        Of :data:`probe.data.strategies.STRATEGIES`.
    images, texts
        Encoders (:mod:`probe.models.encoders`); only those that the strategies need.
    pseudo_answers
        For ``SQPA``, answers by the queries' ids, which take the place of the true ones.

    Returns
    -------
    dict
        For the argument ``spaces`` of :func:`probe.choose`.

    Raises
    ------
    UsageError
        If an encoder is missing or cannot see or read, a compared example has no image, a pseudo answer is missing, or
        ``SQPA`` comes with another strategy that compares answers.
    """
    keys = list(dict.fromkeys(key for name in strategies for key in STRATEGIES[name].keys))
    asked = pool if queries is None else queries
    said = None
    if "SQPA" in strategies:
        said = _pseudo(asked, strategies, pseudo_answers)
    spaces: dict[Key, Space] = {}
    for key in keys:
        encoder = images if key == "image" else texts
        if encoder is None:
            kind = "images" if key == "image" else "texts"
            raise UsageError(f"{_who(strategies, key)} compares by {key}; give an encoder of {kind}.")
        if key == "image":
            of_pool, of_queries = (_of_images(encoder, examples, _who(strategies, key)) for examples in (pool, asked))
            spaces[key] = Space(of_pool, of_queries, encoder.name)
            continue
        answers = said if said is not None else [example.answer for example in asked]
        of_pool = _of_texts(encoder, [_text(example, example.answer, key) for example in pool])
        of_queries = _of_texts(encoder, [_text(x, answer, key) for x, answer in zip(asked, answers, strict=True)])
        spaces[key] = Space(of_pool, of_queries, encoder.name, said if key == "question+answer" else None)
    return spaces


def _pseudo(asked: Sequence[Example], strategies: Sequence[str], pseudo_answers: Mapping[str, str] | None) -> list[str]:
    """The pseudo answers in the order of the queries."""
    others = [name for name in strategies if name != "SQPA" and "question+answer" in STRATEGIES[name].keys]
    if others:
        raise UsageError(f"SQPA compares pseudo answers and {others[0]} true ones; embed for each by itself.")
    missing = next((example.id for example in asked if example.id not in (pseudo_answers or {})), None)
    if missing is not None:
        raise UsageError(
            f"SQPA needs pseudo_answers, and there is none for the query {missing!r}; answer all queries in a first "
            "round."
        )
    return [dict(pseudo_answers or {})[example.id] for example in asked]


def _who(strategies: Sequence[str], key: Key) -> str:
    return next(name for name in strategies if key in STRATEGIES[name].keys)


def _of_images(encoder: Encoder, examples: Sequence[Example], strategy: str) -> NDArray[np.float32]:
    if encoder.images is None:
        raise UsageError(f"The encoder {encoder.name} cannot see; {strategy} needs one for images.")
    blind = next((example for example in examples if not example.images), None)
    if blind is not None:
        raise UsageError(f"Example {blind.id!r} has no image, but {strategy} compares images; choose by text.")
    # Many examples may ask about one image, which is encoded once.
    named = [(image_identity(image, where=f"example {x.id}"), image) for x in examples for image in x.images]
    given = dict(named)
    distinct = {name: place for place, name in enumerate(given)}
    flat = encoder.images(list(given.values()))
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    unit = unit[[distinct[name] for name, _ in named]]
    ends = np.cumsum([len(example.images) for example in examples])[:-1]
    return np.stack([part.mean(0) for part in np.split(unit, ends)])


def _of_texts(encoder: Encoder, texts: Sequence[str]) -> Any:
    if encoder.texts is None:
        raise UsageError(f"The encoder {encoder.name} cannot read; give one for texts.")
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return encoder.texts(list(distinct))[[distinct[text] for text in texts]]


def _text(example: Example, answer: str, key: Key) -> str:
    return example.question if key == "question" else f"{example.question} {answer}"
