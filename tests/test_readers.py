"""Users' files: what is read, and that what cannot be read is said with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from probe.data import Example
from probe.data.readers import read_examples
from probe.errors import ProbeError

LINE: dict[str, Any] = {"image": "a.png", "question": "What colour?", "answer": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with two images, one of them in a directory below."""
    (tmp_path / "below").mkdir()
    for name in ("a.png", "below/b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def write(path: Path, *lines: object) -> Path:
    """Write each line as JSON, or as it is if it is a string."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LINE.items() if name != key}


def refusal(path: Path, line: int | None = None) -> str:
    with pytest.raises(ProbeError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert (f"{path}, line {line}" if line else str(path)) in message
    return message


def test_a_file_of_examples(folder: Path) -> None:
    path = write(
        folder / "photos.jsonl",
        LINE,
        "",
        {"image": ["a.png", "below/b.png"], "question": " Which? \n", "answers": ["the first", " first"], "id": "pair"},
        "   \t",
        {"question": "Two and two?", "answer": ["four"], "id": 17},
        {"image": None, "image_path": "x", "question": "Où\u2028?", "answers": "là", "score": 0.5, "annotated": True},
    )
    assert read_examples(path) == [
        Example("photos-1", (folder / "a.png",), "What colour?", ("red",)),
        Example("pair", (folder / "a.png", folder / "below/b.png"), "Which?", ("the first", "first")),
        Example("17", (), "Two and two?", ("four",)),
        # Words and numbers are kept; what scoring goes by cannot be said by a line.
        Example("photos-6", (), "Où\u2028?", ("là",), info={"image_path": "x", "score": 0.5}),
    ]


@pytest.mark.parametrize("key", ["image", "images", "file_name", "file_names"])
@pytest.mark.parametrize("value", ["below/b.png", ["below/b.png"], ["a.png", "below/b.png"]])
def test_a_directory_with_metadata(folder: Path, key: str, value: str | list[str]) -> None:
    write(folder / "metadata.jsonl", without("image") | {key: value})
    names = [value] if isinstance(value, str) else value
    expected = [Example("metadata-1", tuple(folder / name for name in names), "What colour?", ("red",))]
    assert read_examples(folder) == expected
    assert read_examples(folder / "metadata.jsonl") == expected


def test_null_is_the_same_as_absent(folder: Path) -> None:
    """Tables exported as JSON lines hold every column in every line."""
    path = write(folder / "table.jsonl", LINE | {"images": None, "answers": None, "id": None, "file_name": None})
    assert read_examples(path) == [Example("table-1", (folder / "a.png",), "What colour?", ("red",))]


def test_answers_may_repeat(folder: Path) -> None:
    """Ten annotators often agree, and VQA accuracy counts them."""
    path = write(folder / "vqa.jsonl", without("answer") | {"answers": ["yes"] * 9 + ["no"]})
    assert read_examples(path)[0].answers == ("yes",) * 9 + ("no",)


@pytest.mark.parametrize("name", ["data.jsonl", "DATA.JSONL", "data.json-lines"])
def test_suffixes(folder: Path, name: str) -> None:
    assert len(read_examples(write(folder / name, LINE))) == 1


def test_a_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    path = folder / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r\n\r\n" + json.dumps(LINE).encode() + b"\r\n")
    assert [example.id for example in read_examples(path)] == ["windows-1", "windows-3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.png", "question": "What', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a.png", "What colour?", "red"]', "a list"),
        ("null", "null"),
        ("3", "a number"),
        (without("question"), "no question"),
        (LINE | {"question": None}, "no question"),
        (LINE | {"question": " \n"}, "question is empty"),
        (LINE | {"question": 3}, "question must be a string, found a number"),
        (LINE | {"question": ["What?"]}, "question must be a string, found a list"),
        (without("answer"), "no answer"),
        (LINE | {"answer": None}, "no answer"),
        (LINE | {"answer": ""}, "answer is empty"),
        (LINE | {"answer": []}, "answer is empty"),
        (LINE | {"answer": ["red", " "]}, "answer is empty"),
        (LINE | {"answer": 4}, "answer must be a string or a list of strings, found a number"),
        (LINE | {"answer": True}, "found true or false"),
        (without("answer") | {"answers": [{"answer": "red"}]}, "answers must be .* found an object"),
        (LINE | {"answers": ["red"]}, "both 'answer' and 'answers'"),
        (LINE | {"images": ["a.png"]}, "both 'image' and 'images'"),
        (LINE | {"file_name": "a.png"}, "both 'image' and 'file_name'"),
        (LINE | {"image": "c.png"}, "c.png does not exist"),
        (LINE | {"image": ["a.png", "c.png"]}, "c.png does not exist"),
        (LINE | {"image": "below"}, "below is a directory"),
        (LINE | {"image": "iVBORw0KGgo" * 9999}, "does not exist"),
        (LINE | {"image": ""}, "image is empty.*null"),
        (LINE | {"image": []}, "image is empty.*null"),
        (LINE | {"image": {"path": "a.png"}}, "image must be .* found an object"),
        (LINE | {"image": [None]}, "image must be .* found null"),
        (without("image") | {"image_path": "a.png"}, "there is 'image_path'; rename"),
        (without("image") | {"Img": ["a.png"]}, "there is 'Img'; rename"),
        (LINE | {"id": ""}, "id must be"),
        (LINE | {"id": True}, "id must be"),
        (LINE | {"id": 1.5}, "id must be"),
        (LINE | {"id": "broken-2"}, "'broken-2' is already that of line 2"),
    ],
)
def test_a_broken_line(folder: Path, line: object, words: str) -> None:
    path = write(folder / "broken.jsonl", "", LINE, line)
    message = refusal(path, 3)
    assert re.search(words, message), message
    assert len(message) < 1000


def test_ids_that_are_equal_as_text(folder: Path) -> None:
    path = write(folder / "ids.jsonl", LINE | {"id": 3}, LINE | {"id": "3"})
    assert "'3' is already that of line 1" in refusal(path, 2)


def test_the_line_that_is_not_utf8(folder: Path) -> None:
    path = folder / "latin.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b'\n{"question": "caf\xe9"}\n')
    assert "UTF-8" in refusal(path, 2)


@pytest.mark.parametrize("content", ["", "\n  \n", "\ufeff"])
def test_an_empty_file(folder: Path, content: str) -> None:
    (folder / "empty.jsonl").write_text(content, "utf-8")
    assert "is empty" in refusal(folder / "empty.jsonl")


def test_no_such_file(folder: Path) -> None:
    assert "no .jsonl file at all" in refusal(folder / "photos.jsonl")
    write(folder / "photos.jsonl", LINE)
    assert "did you mean photos.jsonl?" in refusal(folder / "photo.jsonl")
    assert "did you mean photos.jsonl?" in refusal(folder / "photos.json")
    assert "nor is there a directory" in refusal(folder / "elsewhere" / "photos.jsonl")


def test_a_directory_without_metadata(folder: Path) -> None:
    assert "no metadata.jsonl" in refusal(folder)


@pytest.mark.parametrize("name", ["data.json", "data.csv", "data", "data.jsonl.gz"])
def test_another_kind_of_file(folder: Path, name: str) -> None:
    message = refusal(write(folder / name, LINE))
    assert ".jsonl" in message
    assert "metadata.jsonl" in message
