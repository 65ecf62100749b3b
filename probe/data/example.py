"""The two nouns of the data room: an example, and an episode made of examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from probe.errors import UsageError

Picture = Path | Image.Image
"""Where an image is, or the image itself."""


@dataclass(frozen=True)
class Example:
    """A question about one or more images (or none), with its accepted answers.

    Attributes
    ----------
    id
        Names the example in results and messages.
    images
        In the order in which the model is shown them, before the question.
    question
        Shown as it is.
    answers
        All that count as right; the first is the one a demonstration shows.
    info
        What the data set says about it (``answer_type``, ``question_type``, …); JSON values only.
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    # Left out of the hash, which a dictionary does not have; equal examples have equal hashes all the same.
    info: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def answer(self) -> str:
        """The answer that a demonstration shows."""
        return self.answers[0]


@dataclass(frozen=True)
class Episode:
    """Ordered demonstrations and one query, with how they were chosen.

    Attributes
    ----------
    id
        Names the episode in results and messages.
    demonstrations
        First to last as the model reads them.
    query
        The example to answer.
    strategy
        How the demonstrations were chosen: a name of :data:`probe.data.strategies.STRATEGIES`, ``balanced``,
        ``synthetic:<task>``, …
    seed
        The seed of that choice.
    perturbations
        What was done to the demonstrations afterwards, in order.
    info
        What the maker of the episode knows about it (the hidden rule of a synthetic task); JSON values only.
    """

    id: str
    demonstrations: tuple[Example, ...]
    query: Example
    strategy: str = "given"
    seed: int = 0
    perturbations: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def shots(self) -> int:
        """The number of demonstrations."""
        return len(self.demonstrations)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The demonstrations, then the query."""
        return (*self.demonstrations, self.query)


def check_request(shots: int, n: int, seed: int) -> None:
    """Refuse a request for episodes that no data could fulfil.

    Raises
    ------
    UsageError
        If a number is out of range.
    """
    if shots < 0 or n < 1 or seed < 0:
        raise UsageError(
            "An episode needs 0 or more shots, a run 1 or more episodes, and a seed is 0 or more; asked for "
            f"{shots}, {n} and {seed}."
        )
