"""Exact match: what is forgiven, and what is not."""

from __future__ import annotations

import pytest

from probe.scoring import answer_key, exact_match


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"),
        ("  red \n bus\t", "red bus"),
        ('"Red!?"', "red"),
        ("The red bus.", "red bus"),
        ("an apple", "apple"),
        ("A\u00a0bus", "bus"),
        ("ÉTÉ", "été"),
        ("it's 3.5", "it's 3.5"),
        ("theatre", "theatre"),
        ("another", "another"),
        # never to nothing
        ("A", "a"),
        ("the ?", "the"),
        ("@.", "@"),
        ("(A)", "a"),
        ("+.", "+"),
        ("?", "?"),
        ("@", "@"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_what_answers_are_compared_by(text: str, expected: str) -> None:
    assert answer_key(text) == expected


def test_exact_match_takes_any_accepted_answer() -> None:
    assert exact_match("The bus.", ["coach", "bus"])
    assert exact_match("bus", ("A Bus",))
    assert exact_match("2 dogs", ["two dogs"])


def test_exact_match_refuses_the_rest() -> None:
    assert not exact_match("bus stop", ["bus"])
    assert not exact_match("", ["bus"])
    assert not exact_match("", ["?", "the"])
    assert not exact_match("!", ["?"])
    assert not exact_match("bus", [])


def test_a_single_string_is_not_a_list_of_answers() -> None:
    with pytest.raises(TypeError, match="list"):
        exact_match("b", "bus")
