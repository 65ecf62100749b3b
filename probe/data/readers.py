"""A user's own data: JSON lines beside the images they name.

Each line is one example::

    {"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}
    {"id": "pair", "image": ["a.jpg", "b.jpg"], "question": "Which is newer?", "answers": ["the first", "first"]}
    {"image": null, "question": "Two and two?", "answer": "four"}

A directory is read from its ``metadata.jsonl``, where images are usually called ``file_name`` or ``file_names`` (the
convention of Hugging Face's imagefolder).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probe.data.example import Example
from probe.errors import ProbeError, did_you_mean

IMAGE_KEYS = ("image", "images", "file_name", "file_names")
ANSWER_KEYS = ("answer", "answers")
KEYS = ("id", "question", *IMAGE_KEYS, *ANSWER_KEYS)
"""What an example is made of; other words and numbers of a line are kept in its ``info``."""
SUFFIXES = (".jsonl", ".json-lines")
METADATA = "metadata.jsonl"

KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
"""What JSON calls the types that fields have."""


def read_examples(path: Path) -> list[Example]:
    """Read examples from a file of JSON lines, or from a directory with ``metadata.jsonl``.

    Of each line are read: ``question``; ``answer`` or ``answers``, a string or a list whose first entry a demonstration
    shows; ``image``, ``images``, ``file_name`` or ``file_names``, a path or a list, relative to the directory of the
    file; and ``id``, by default ``<name of the file without suffix>-<line number>``. Words and numbers
    under other keys are kept in ``info``, the rest is ignored, and so are
    blank lines. Questions and answers are stripped of white space at both ends.

    An example without an image key, or with null there, has text only. Where the key is absent and another looks as if
    it named an image (``image_path``, ``img``), that is an error: a misnamed column must not turn a data set blind.

    Images are looked for now and opened later.

    Parameters
    ----------
    path
        The file or the directory.

    Returns
    -------
    list of Example
        In the order of the lines; image paths begin with the directory of the file.

    Raises
    ------
    ProbeError
        With file and line, at the first thing that is missing, ambiguous or of the wrong type.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / METADATA).is_file():
            raise ProbeError(
                f"The directory {path} has no {METADATA}; add one, with a line "
                '{"file_name": …, "question": …, "answer": …} for each example, or name a .jsonl file.'
            )
        path = path / METADATA
    elif path.exists() and path.suffix.lower() not in SUFFIXES:
        raise ProbeError(
            f"The name {path} has the suffix {path.suffix!r}, but examples are read from JSON lines "
            f"({' or '.join(SUFFIXES)}) or from a directory with {METADATA}; write one JSON object for each example."
        )
    examples = []
    lines_of: dict[str, int] = {}
    for number, record in json_lines(path):
        example = _example(record, path, number)
        if example.id in lines_of:
            raise ProbeError(
                f"{path}, line {number}: the id {example.id!r} is already that of line {lines_of[example.id]}; "
                "give each example its own."
            )
        lines_of[example.id] = number
        examples.append(example)
    return examples


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the object of each line that is not blank.

    Raises
    ------
    ProbeError
        If there is no such file, or it is empty, or a line is not UTF-8, not JSON or not an object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ProbeError(f"There is no file {path}; {_near(path)}") from None
    except OSError as error:
        raise ProbeError(f"{path} cannot be read ({error.strerror}); name a readable .jsonl file.") from error
    empty = True
    # Only a line feed ends a line: text may hold the other characters at which str.splitlines breaks.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ProbeError(f"{where}: this is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{where}: this is not JSON ({error}); write one JSON object on each line.") from None
        if not isinstance(record, dict):
            raise ProbeError(f"{where}: this is {kind_of(record)}; write one JSON object, {{…}}, on each line.")
        empty = False
        yield number, record
    if empty:
        raise ProbeError(f"{path} is empty; write one JSON object on each line.")


def _near(path: Path) -> str:
    """Say what there is in place of a missing file."""
    if not path.parent.is_dir():
        return f"nor is there a directory {path.parent}."
    siblings = [sibling.name for sibling in sorted(path.parent.iterdir()) if sibling.suffix.lower() in SUFFIXES]
    return did_you_mean(path.name, siblings) if siblings else f"{path.parent} holds no .jsonl file at all."


def _example(record: dict[str, Any], path: Path, number: int) -> Example:
    where = f"{path}, line {number}"
    question = record.get("question")
    if question is None:
        raise ProbeError(f'{where}: there is no question; add "question".')
    name = record.get("id")
    if name is None:
        name = f"{path.stem}-{number}"
    elif type(name) not in (str, int) or not str(name).strip():
        raise ProbeError(
            f"{where}: id must be a whole number or a string with something in it; correct it or leave it out."
        )
    key, answers = _one_of(record, ANSWER_KEYS, where)
    if key is None:
        raise ProbeError(f'{where}: there is no answer; add "answer".')
    return Example(
        id=str(name),
        images=_images(record, path, where),
        question=texts(question, "question", where, several=False)[0].strip(),
        answers=tuple(answer.strip() for answer in texts(answers, key, where)),
        info={name: value for name, value in record.items() if name not in KEYS and type(value) in (str, int, float)},
    )


def _images(record: dict[str, Any], path: Path, where: str) -> tuple[Path, ...]:
    key, names = _one_of(record, IMAGE_KEYS, where)
    if key is None:
        if not any(known in record for known in IMAGE_KEYS):
            _refuse_misnamed(record, where)
        return ()
    remedy = "write null for an example of text only"
    return tuple(image_file(path.parent, name, where) for name in texts(names, key, where, remedy=remedy))


def image_file(directory: Path, name: str, where: str) -> Path:
    """The file of an image, which must be there.

    Raises
    ------
    ProbeError
        With ``where``, which names the file and the place that ask for it.
    """
    image = directory / name
    # Not Path.is_file, which raises where a cell holds something too long for a path, such as encoded pixels.
    if not os.path.isfile(image):
        kind = "is a directory" if os.path.isdir(image) else "does not exist"
        raise ProbeError(f"{where}: the image {str(image)[:300]} {kind}; paths are relative to {directory}.")
    return image


def _refuse_misnamed(record: dict[str, Any], where: str) -> None:
    """Refuse a line without an image key whose other keys look like one."""
    for key, value in record.items():
        looks_like_image = any(part in key.lower() for part in ("image", "img", "picture", "photo", "file_name"))
        if looks_like_image and isinstance(value, str | list) and value:
            raise ProbeError(
                f'{where}: no image is named, but there is {key!r}; rename it to "image", or write "image": null for '
                "an example of text only."
            )


def _one_of(record: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[str | None, Any]:
    """Find the one key among ``keys`` that is present and not null, and its value."""
    present = [key for key in keys if record.get(key) is not None]
    if len(present) > 1:
        raise ProbeError(f"{where}: both {' and '.join(map(repr, present))} are given; keep one of them.")
    return (present[0], record[present[0]]) if present else (None, None)


def texts(
    value: Any,
    key: str,
    where: str,
    *,
    several: bool = True,
    blank: bool = False,
    remedy: str = "take the example out",
) -> tuple[str, ...]:
    """One string, or a list of strings where ``several``.

    Raises
    ------
    ProbeError
        With ``where``, which names file and place, and ``key``, the field: if it is of another type, or empty (a single
        text may be ``blank`` if that is allowed), or no text that could be written to a file. ``remedy`` is what to do
        instead of filling it in.
    """
    values = value if several and isinstance(value, list) else [value]
    expected = "a string or a list of strings" if several else "a string"
    for text in values:
        if not isinstance(text, str):
            raise ProbeError(f"{where}: {key} must be {expected}, found {kind_of(text)}; correct it.")
    if not values or not (blank or all(text.strip() for text in values)):
        raise ProbeError(f"{where}: {key} is empty; fill it in or {remedy}.")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ProbeError(
            f"{where}: {key} holds half of a character (a lone surrogate such as \\ud83d); write it whole."
        ) from None
    return tuple(values)


def kind_of(value: Any) -> str:
    """Say what JSON calls a value."""
    return (KINDS | {int: "a number", bool: "true or false", type(None): "null"}).get(type(value), "a number")
