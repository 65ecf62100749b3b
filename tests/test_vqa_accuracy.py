"""VQA accuracy: every oddity of the official rule, and an independent reading of it on odd texts."""

from __future__ import annotations

import doctest
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest

from probe.errors import UsageError
from probe.scoring import majority_answer, normalise_vqa, vqa, vqa_accuracy

# What is written and how it is spelled, in turn, as the official table has it.
_SPELLINGS = """
    aint ain't  arent aren't  cant can't  couldve could've  couldnt couldn't  couldn'tve couldn't've
    couldnt've couldn't've  didnt didn't  doesnt doesn't  dont don't  hadnt hadn't  hadnt've hadn't've
    hadn'tve hadn't've  hasnt hasn't  havent haven't  hed he'd  hed've he'd've  he'dve he'd've  hes he's
    howd how'd  howll how'll  hows how's  Id've I'd've  I'dve I'd've  Im I'm  Ive I've  isnt isn't  itd it'd
    itd've it'd've  it'dve it'd've  itll it'll  let's let's  maam ma'am  mightnt mightn't  mightnt've mightn't've
    mightn'tve mightn't've  mightve might've  mustnt mustn't  mustve must've  neednt needn't  notve not've
    oclock o'clock  oughtnt oughtn't  ow's'at 'ow's'at  'ows'at 'ow's'at  'ow'sat 'ow's'at  shant shan't
    shed've she'd've  she'dve she'd've  she's she's  shouldve should've  shouldnt shouldn't
    shouldnt've shouldn't've  shouldn'tve shouldn't've  somebody'd somebodyd  somebodyd've somebody'd've
    somebody'dve somebody'd've  somebodyll somebody'll  somebodys somebody's  someoned someone'd
    someoned've someone'd've  someone'dve someone'd've  someonell someone'll  someones someone's
    somethingd something'd  somethingd've something'd've  something'dve something'd've  somethingll something'll
    thats that's  thered there'd  thered've there'd've  there'dve there'd've  therere there're  theres there's
    theyd they'd  theyd've they'd've  they'dve they'd've  theyll they'll  theyre they're  theyve they've
    twas 'twas  wasnt wasn't  wed've we'd've  we'dve we'd've  weve we've  werent weren't  whatll what'll
    whatre what're  whats what's  whatve what've  whens when's  whered where'd  wheres where's  whereve where've
    whod who'd  whod've who'd've  who'dve who'd've  wholl who'll  whos who's  whove who've  whyll why'll
    whyre why're  whys why's  wont won't  wouldve would've  wouldnt wouldn't  wouldnt've wouldn't've
    wouldn'tve wouldn't've  yall y'all  yall'll y'all'll  y'allll y'all'll  yall'd've y'all'd've
    y'alld've y'all'd've  y'all'dve y'all'd've  youd you'd  youd've you'd've  you'dve you'd've  youll you'll
    youre you're  youve you've
"""
TABLE = dict(zip(_SPELLINGS.split()[::2], _SPELLINGS.split()[1::2], strict=True))
_COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # periods
        ("3.5", "3.5"),
        ("a.b", "ab"),
        ("1.", "1"),
        ("a.5", "a.5"),
        ("u.s.a.", "usa"),
        ("1...2", "1.2"),
        ("<=3.x", "3x"),
        # the first 32 of 40 go, whatever stands between them
        ("." * 40, "." * 8),
        ("b." * 40, "b" * 32 + "b." * 8),
        (".5" * 40 + "." * 33, ".5" * 40 + "."),
        # a mark becomes a space...
        ("black-white", "black white"),
        ("black,white", "black white"),
        ("what?", "what"),
        ("b&w/grey_x", "b&w grey x"),
        # ...unless it touches a space, here or elsewhere...
        ("red, white,blue", "red whiteblue"),
        ("black - white-grey", "black whitegrey"),
        ("x-y -z", "xy z"),
        ("x-y z- w/v", "xy z w v"),
        # ...or a comma stands between digits, which takes all marks away
        ("1,000", "1000"),
        ("1,000-2/x", "10002x"),
        ("1, 000", "1 000"),
        ("x-y,1", "x y 1"),
        # a new line or a tab is a space by then; other white space and the ends are not
        ("x-y-\nz", "xy z"),
        ("x-y-\tz", "xy z"),
        ("x-y-\rz", "x y z"),
        ("x-y- ", "x y"),
        # these are no marks
        ("'red' 50% $5 #1 5:30 * & ~ ^ |", "'red' 50% $5 #1 5:30 * & ~ ^ |"),
        # words
        ("Yes", "yes"),
        ("  red   bus  ", "red bus"),
        ("none one Two THREE ten eleven", "0 1 2 3 10 eleven"),
        ("twenty-one", "twenty 1"),
        ("someone", "someone"),
        ("The cat and a dog, an owl", "cat and dog owl"),
        ("theatre", "theatre"),
        ("a", ""),
        ("a.", ""),
        ("", ""),
        ("!?", ""),
        # contractions
        ("dont", "don't"),
        ("don't", "don't"),
        ("DONT", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("let's", "let's"),
        ("lets", "lets"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("ow's'at", "'ow's'at"),
        ("twas", "'twas"),
        # the table has these in capitals only
        ("Im", "im"),
        ("Ive", "ive"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


def test_the_tables_are_the_official_ones() -> None:
    assert TABLE == vqa.CONTRACTIONS
    assert DIGITS == vqa.NUMBERS
    assert frozenset(vqa.PUNCTUATION) == MARKS
    assert len(TABLE) == 120
    assert len(vqa.PUNCTUATION) == len(MARKS) == 21


def reference(text: str) -> str:
    """The rule once more, letter by letter; the pattern of the period is the official one."""
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    touching = {pair.strip(" ") for pair in map("".join, pairwise(text)) if " " in pair}
    triples = zip(text, text[1:], text[2:], strict=False)
    number = any(one.isdecimal() and comma == "," and other.isdecimal() for one, comma, other in triples)
    kept = ""
    for letter in text:
        if letter not in MARKS:
            kept += letter
        elif letter not in touching and not number:
            kept += " "
    kept = re.sub(r"(?!<=\d)(\.)(?!\d)", "", kept, count=32)
    result = []
    for word in kept.lower().split():
        word = DIGITS.get(word, word)
        if word in ("a", "an", "the"):
            continue
        result.append(TABLE.get(word, word))
    return " ".join(result)


KINDS = [
    sorted(MARKS),
    [" "],
    [",", "."],
    list("0123456789٣²"),
    [*TABLE, *DIGITS],
    ["a", "an", "the", "The", "A", "red", "bus", "É"],
    ["'", "%", ":", "$", "\n", "\t", "\r", "\u00a0"],
    ["<=1.", "1,0", "3.5", "x.y", "." * 34],
]


def test_against_an_independent_reading() -> None:
    rng = random.Random(7)
    texts = ["".join(rng.choice(rng.choice(KINDS)) for _ in range(rng.randint(1, 12))) for _ in range(800)]
    assert [normalise_vqa(text) for text in texts] == [reference(text) for text in texts]
    # The texts are odd enough: more than 32 periods, commas in numbers, words of the tables.
    assert sum(".." in reference(text) for text in texts) > 10
    assert sum(re.search(r"\d,\d", text) is not None for text in texts) > 50
    assert sum(not set(reference(text).split()).isdisjoint(TABLE.values()) for text in texts) > 50


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_of_ten(agreeing: int, expected: float) -> None:
    answers = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("red", answers) == expected
    assert vqa_accuracy("red", answers[::-1]) == expected
    assert vqa_accuracy("The red.", tuple(answers)) == (expected if agreeing < 10 else 0.0)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("\tyes ", ["yes\n"] * 5 + [" yes"] * 5) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("cat", ["a cat"] * 10) == 0
    assert vqa_accuracy("a cat", ["a cat"] * 10) == 1
    # What differs only before normalisation is not unanimous.
    assert vqa_accuracy("YES!", ["yes"] * 9 + ["Yes"]) == 1
    # OpenFlamingo always normalises.
    alternating = ["yes", "no"] * 5
    assert vqa_accuracy("Yes", ["yes"] * 10, vizwiz_compat="openflamingo", confidences=alternating) == 1


def test_who_is_left_out() -> None:
    compat, sure = "openflamingo", ["yes"] * 10
    # Ten equal annotations: by number nine others agree, by equality nobody is left.
    assert vqa_accuracy("red", ["red"] * 10) == 1
    assert vqa_accuracy("red", ["red"] * 10, vizwiz_compat=compat, confidences=sure) == 0
    # Each of the eight has none to agree with; each of the two has eight.
    answers = ["red"] * 8 + ["blue"] * 2
    assert vqa_accuracy("red", answers, vizwiz_compat=compat, confidences=sure) == 0.2
    # Another confidence is another annotation: each of the first five has the other three, and these have five.
    assert vqa_accuracy("red", answers, vizwiz_compat=compat, confidences=["yes"] * 5 + ["maybe"] * 5) == 1
    # Annotations are equal after normalisation, not before.
    spelled = ["red", "Red", "red.", "the red", "RED", "blue"]
    assert vqa_accuracy("red", spelled) == 1
    assert vqa_accuracy("red", spelled, vizwiz_compat=compat, confidences=["no"] * 6) == pytest.approx(1 / 6)


def counted(prediction: str, answers: Sequence[str], marks: Sequence[object] | None) -> Fraction:
    """Accuracy from counts alone: those who agree with somebody are all who agree, less those who drop out."""
    if marks is None and len({answer.strip() for answer in answers}) == 1:
        target, given = prediction.strip(), [answer.strip() for answer in answers]
    else:
        target, given = reference(prediction), [reference(answer) for answer in answers]
    groups = Counter(zip(given, range(len(given)) if marks is None else marks, strict=True))
    agree = given.count(target)
    scores = [
        size * min(Fraction(1), Fraction(agree - (size if answer == target else 0), 3))
        for (answer, _), size in groups.items()
    ]
    return sum(scores, Fraction(0)) / len(given)


def test_accuracy_from_counts() -> None:
    rng, seen = random.Random(11), set()
    forms = ["two", "2", "Two.", " the 2", "yes", "Yes", "yes ", "no"]
    for _ in range(600):
        some = rng.sample(forms, rng.randint(1, 4))
        answers, prediction = rng.choices(some, k=rng.randint(4, 11)), rng.choice(forms)
        marks = rng.choices(["yes", "maybe", "no"], k=len(answers))
        official = vqa_accuracy(prediction, answers)
        compat = vqa_accuracy(prediction, answers, vizwiz_compat="openflamingo", confidences=marks)
        assert official == pytest.approx(float(counted(prediction, answers, None)), abs=1e-12)
        assert compat == pytest.approx(float(counted(prediction, answers, marks)), abs=1e-12)
        seen.add((official > compat) - (official < compat))
    assert seen == {-1, 0, 1}


def test_four_answers_are_the_fewest() -> None:
    assert vqa_accuracy("red", ["red"] * 4) == 1
    for number in range(4):
        with pytest.raises(UsageError, match=f"at least 4 .* {number}, .*exact_match"):
            vqa_accuracy("red", ["red"] * number)


def test_misuse() -> None:
    answers = ["red"] * 10
    with pytest.raises(TypeError, match="list"):
        vqa_accuracy("red", "red bus")
    with pytest.raises(UsageError, match="'flamingo'"):
        vqa_accuracy("red", answers, vizwiz_compat="flamingo", confidences=answers)
    with pytest.raises(UsageError, match="go together"):
        vqa_accuracy("red", answers, vizwiz_compat="openflamingo")
    with pytest.raises(UsageError, match="go together"):
        vqa_accuracy("red", answers, confidences=answers)
    with pytest.raises(UsageError, match="9 confidences for 10 answers"):
        vqa_accuracy("red", answers, vizwiz_compat="openflamingo", confidences=["yes"] * 9)


def test_majority_answer() -> None:
    assert majority_answer(["cat", "dog", "dog"]) == "dog"
    assert majority_answer(["dog", "cat", "cat", "dog"]) == "dog"
    assert majority_answer(("b", "a")) == "b"
    assert majority_answer(["The cat", "cat", "Cat"]) == "The cat"
    with pytest.raises(UsageError, match="at least one"):
        majority_answer([])
    with pytest.raises(TypeError, match="list"):
        majority_answer("cat")


def test_the_examples_in_the_docstrings() -> None:
    results = doctest.testmod(vqa)
    assert results.failed == 0 < results.attempted
