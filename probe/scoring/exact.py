"""Exact match: the answer is one of the accepted ones, up to how it is written.

Everything that asks whether two answers say the same (was it right, was it copied, who else gave it) compares them by
:func:`answer_key`.
"""

from __future__ import annotations

from collections.abc import Iterable

from probe.scoring.vqa import normalise_vqa

AROUND = ".,;:!?\"'()[] "


def answer_key(text: str) -> str:
    """What answers are compared by: the VQA normalisation; of what it would erase, the text in lower case, bare.

    Bare of marks and brackets around it, unless nothing else is left: a model that writes ``@.`` said ``@``.

    Examples
    --------
    >>> answer_key('  "Two  red Buses." '), answer_key("A)"), answer_key("@."), answer_key("?")
    ('2 red buses', 'a', '@', '?')
    """
    whole = text.strip().lower()
    return normalise_vqa(text) or whole.strip(AROUND) or whole


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether the prediction is one of the accepted answers, compared by :func:`answer_key`.

    Raises
    ------
    TypeError
        If ``answers`` is one string, whose letters would pass for answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"The accepted answers come as a list; wrap {answers!r} in one.")
    return answer_key(prediction) in {answer_key(answer) for answer in answers}
