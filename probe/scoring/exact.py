"""Exact match: the answer is one of the accepted ones, up to how it is written."""

from __future__ import annotations

from collections.abc import Sequence

PUNCTUATION = ".,;:!?\"'"
ARTICLES = ("a", "an", "the")


def normalise(text: str) -> str:
    """Reduce an answer to what is compared.

    Lower case; white space inside collapsed to single spaces; punctuation (``.,;:!?"'``) and white space around it
    removed; one leading article removed. No step leaves nothing of something: ``"A."`` becomes ``"a"`` and ``"?"``
    stays.

    Examples
    --------
    >>> normalise('  "The  red  Bus." ')
    'red bus'
    """
    words = _bare(" ".join(text.lower().split()))
    first, _, rest = words.partition(" ")
    return _bare(rest) if first in ARTICLES and rest else words


def _bare(text: str) -> str:
    return text.strip(PUNCTUATION + " ") or text


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the accepted answers after :func:`normalise`.

    Raises
    ------
    TypeError
        If ``answers`` is one string, whose letters would pass for answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"The accepted answers come as a list; wrap {answers!r} in one.")
    return normalise(prediction) in {normalise(answer) for answer in answers}
