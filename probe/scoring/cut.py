"""Where an answer ends: what a model says after it is not part of it."""

from __future__ import annotations

from collections.abc import Sequence

STOPS = ("\n", "Question", "Answer", "Short")
"""Where a model that goes on begins the next demonstration: a new line, or a word of the prompt formats.

As OpenFlamingo cuts (``Question|Answer|Short``), which also cuts at a comma; that would make "red, blue" "red".
"""


def cut_answer(text: str, stops: Sequence[str] = STOPS) -> str:
    r"""The text before the first stop that anything precedes, stripped.

    >>> cut_answer("red car\nQuestion: what is it?"), cut_answer("Answer: red")
    ('red car', 'Answer: red')
    """
    text = text.strip()
    ends = [end for stop in stops if (end := text.find(stop)) > 0]
    return text[: min(ends, default=len(text))].strip()
