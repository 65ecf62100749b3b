"""Where an answer ends: what a model says after it is not part of it."""

from __future__ import annotations

from collections.abc import Sequence

STOPS = ("\n", "Question:", "Short answer:", "Answer:")
"""Where a model that goes on begins the next demonstration: a new line, or the words of a prompt format.

OpenFlamingo cuts at the bare words ``Question|Answer|Short``, and at a comma; that would make "red, blue" "red".
"""


def cut_answer(text: str, stops: Sequence[str] = STOPS) -> str:
    r"""The text before the first stop that anything precedes, stripped.

    >>> cut_answer("red car\nQuestion: what is it?"), cut_answer("Answer: red Answer: blue")
    ('red car', 'Answer: red')
    """
    text = text.strip()
    ends = [end for stop in stops if (end := text.find(stop, 1)) > 0]
    return text[: min(ends, default=len(text))].strip()
