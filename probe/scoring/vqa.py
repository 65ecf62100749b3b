"""VQA accuracy: how far several people agree with an answer, with the official normalisation to the letter.

Tables, order and oddities are those of the official evaluation, ``PythonEvaluationTools/vqaEvaluation/vqaEval.py`` of
https://github.com/GT-Vision-Lab/VQA as it stands since March 2021 (a013f00; before, number words and articles of the
annotators stayed, and the prediction was normalised in any case). The oddities are kept because published numbers
contain them. The file is written for Python 2; what counts as a digit is taken from Python 3, as its descendants do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from probe.errors import UsageError

ENOUGH = 3
"""An answer that this many others gave is fully right."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What is removed or becomes a space. Apostrophes, colons and symbols such as ``%``, ``$`` and ``&`` stay."""

PERIOD = re.compile(r"\.(?!\d)")
r"""A period that no digit follows.

The official pattern is ``(?!<=\d)(\.)(?!\d)``. Its first group was meant to look behind for a digit; as it is written,
it looks ahead for ``<=``, which a period is not, and so it excludes nothing.
"""

PERIODS_AT_MOST = int(re.UNICODE)
"""How many periods go: 32. The flag is officially passed where the number of replacements belongs."""

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

ARTICLES = ("a", "an", "the")

_SPELLED = """
    'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""

CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _SPELLED.split() for at, letter in enumerate(word) if letter == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
"""The official table: what is written without one of its apostrophes, and how it is spelled.

The last three are as odd there: two change nothing, and one takes the apostrophe away. The table is applied to lower
case, so ``Im`` is never found in it.
"""


def normalise_vqa(text: str) -> str:
    """Reduce an answer to what VQA accuracy compares.

    In this order:

    1. New lines and tabs become spaces; white space at both ends goes.
    2. Each mark of :data:`PUNCTUATION` is removed wherever it stands if it touches a space anywhere in the text, or if
       the text has a comma between two digits anywhere. Otherwise it becomes a space.
    3. The first 32 periods that no digit follows are removed.
    4. Lower case; white space collapsed; :data:`NUMBERS` to digits; :data:`ARTICLES` dropped, wherever they stand;
       :data:`CONTRACTIONS` spelled out.

    Sometimes nothing is left: the answer ``"A"`` becomes the empty one.

    Parameters
    ----------
    text
        An answer, as generated or as annotated.

    Returns
    -------
    str

    References
    ----------
    ``processPunctuation`` and ``processDigitArticle`` of the official ``vqaEval.py``.

    Examples
    --------
    >>> normalise_vqa("Two  dogs, a black-white cat. ")
    '2 dogs black white cat'
    >>> normalise_vqa("It is 3.5 a.m., isnt it?")
    "it is 3.5 am isn't it"
    """
    text = _on_one_line(text)
    comma_in_number = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in PUNCTUATION:
        # Asked of the text as it came: what other marks became does not count.
        touches_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if touches_space or comma_in_number else " ")
    bare = PERIOD.sub("", bare, count=PERIODS_AT_MOST)
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(
    prediction: str,
    answers: Sequence[str],
    *,
    vizwiz_compat: Literal["openflamingo"] | None = None,
    confidences: Sequence[str] | None = None,
) -> float:
    """Share of agreement with the annotators, each of whom is left out once.

    With the answers a_k of the annotators and the prediction y, it is the mean over j of

    ``min(1, #{k != j: a_k = y} / 3)``,

    which is 0, 0.3, 0.6, 0.9 and 1 if 0, 1, 2, 3 and at least 4 of ten annotators agree.

    Prediction and answers are compared after :func:`normalise_vqa`, *unless all annotators wrote the same*: then both
    are officially compared as they are, up to white space at the ends, and ``"Yes"`` gets 0 where ten wrote ``"yes"``.

    Parameters
    ----------
    prediction
        The answer to score.
    answers
        One for each annotator, in any order; at least four.
    vizwiz_compat
        ``"openflamingo"`` gives the numbers that OpenFlamingo 2 and its descendants report on VizWiz, which are not
        comparable with others (of the validation set, the most common answers get 67 % instead of 94 %). They differ
        in two ways. Together with an annotator, all drop out whose annotation is equal, because annotations are not
        numbered there: of ten who agree with equal confidence, none is left. And both sides are always normalised.
    confidences
        Each annotator's ``answer_confidence``, in the order of ``answers``, for ``vizwiz_compat``: it is the other half
        of the annotation.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    TypeError
        If ``answers`` is one string, whose letters would pass for answers.
    UsageError
        If there are fewer than four answers, with which no prediction could reach 1; if ``vizwiz_compat`` is unknown;
        if one of ``vizwiz_compat`` and ``confidences`` comes without the other; if there are not as many confidences
        as answers.

    References
    ----------
    Antol et al. (2015), ICCV, "VQA: Visual Question Answering", for min(n/3, 1); the mean over annotators is that of
    ``evaluate`` in the official ``vqaEval.py``. OpenFlamingo: ``open_flamingo/eval/vqa_metric.py`` of
    mlfoundations/open_flamingo, releases 2.0.0 and 2.0.1.

    Examples
    --------
    >>> answers = ["2", "Two.", "two", "three", "3", "4", "4", "4", "4", "many"]
    >>> [vqa_accuracy(prediction, answers) for prediction in ("5", "many", "3", "two", "four")]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    >>> vqa_accuracy("four", answers, vizwiz_compat="openflamingo", confidences=["yes"] * 10)
    0.6
    """
    _check(answers, vizwiz_compat, confidences)
    unanimous = len({_on_one_line(answer) for answer in answers}) == 1
    reduce = _on_one_line if unanimous and vizwiz_compat is None else normalise_vqa
    predicted = reduce(prediction)
    # What tells two annotators apart who gave the same answer: their number, or what OpenFlamingo has instead.
    marks: Sequence[object] = range(len(answers)) if confidences is None else confidences
    annotations = [(reduce(answer), mark) for answer, mark in zip(answers, marks, strict=True)]
    thirds = 0
    for left_out in annotations:
        agreeing = sum(answer == predicted for answer, mark in annotations if (answer, mark) != left_out)
        thirds += min(agreeing, ENOUGH)
    # Divided once, so that 0.3 is 0.3.
    return thirds / (ENOUGH * len(annotations))


def majority_answer(answers: Sequence[str]) -> str:
    """The answer given most often, as it is written; of several, the one given first.

    It is what VQAv2 calls ``multiple_choice_answer``, up to how ties are broken, which is not documented there.

    Raises
    ------
    TypeError
        If ``answers`` is one string, whose letters would pass for answers.
    UsageError
        If there are none.

    Examples
    --------
    >>> majority_answer(["cat", "dog", "dog", "cat", "Dog"])
    'cat'
    """
    _refuse_one_string(answers)
    if not answers:
        raise UsageError("No answers, so none is the most common; give at least one.")
    return Counter(answers).most_common(1)[0][0]


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _refuse_one_string(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise TypeError(f"The accepted answers come as a list; wrap {answers!r} in one.")


def _check(answers: Sequence[str], vizwiz_compat: str | None, confidences: Sequence[str] | None) -> None:
    _refuse_one_string(answers)
    if len(answers) <= ENOUGH:
        raise UsageError(
            f"VQA accuracy wants the answers of at least {ENOUGH + 1} annotators (the datasets have ten), and here are "
            f"{len(answers)}, with which no prediction could reach 1; use exact_match for a list of accepted answers."
        )
    if vizwiz_compat not in (None, "openflamingo"):
        raise UsageError(f'vizwiz_compat is {vizwiz_compat!r}; set it to "openflamingo" or leave it out.')
    if (vizwiz_compat is None) != (confidences is None):
        raise UsageError(
            'vizwiz_compat="openflamingo" and confidences go together, since it tells annotators apart by their '
            "confidence alone; give both, or neither for the official accuracy."
        )
    if confidences is not None and len(confidences) != len(answers):
        raise UsageError(
            f"There are {len(confidences)} confidences for {len(answers)} answers; give one for each answer."
        )
