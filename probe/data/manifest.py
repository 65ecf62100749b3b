"""A manifest: the list of episodes that a run will work through, written before anything runs.

Choosing and perturbing demonstrations is over when the manifest is written. A run that is interrupted, spread over
machines or repeated with another model reads the same file, and its hashes tell whether the images are still the same.

One line is one episode, as JSON::

    {"id": …, "strategy": …, "seed": 0, "perturbations": [], "info": {}, "demonstrations": [EXAMPLE], "query": EXAMPLE}

and an example is ``{"id": …, "images": [{"path": …, "pixels": HASH}, …], "question": …, "answers": […], "info": {}}``,
where ``info`` may be left out. Paths are relative to the directory of the manifest, so that a manifest can be moved
together with its images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from probe.data.example import Episode, Example, Picture
from probe.data.images import image_places, open_image, pixel_hash
from probe.data.readers import KINDS, json_lines
from probe.errors import ProbeError, did_you_mean
from probe.store import write_bytes

SAVED_IMAGES = "images"
"""The directory beside the manifest to which images from memory are saved."""

_EPISODE = {
    "id": str,
    "strategy": str,
    "seed": int,
    "perturbations": list,
    "info": dict,
    "demonstrations": list,
    "query": dict,
}
_EXAMPLE = {"id": str, "images": list, "question": str, "answers": list, "info": dict}
_IMAGE = {"path": str, "pixels": str}


def write_manifest(episodes: Sequence[Episode], path: Path) -> None:
    """Write episodes to a manifest, and images from memory to PNG files in ``images/`` beside it.

    Every image is opened, so that a broken one is found before anything runs. The file appears under its name only when
    it is complete. Reading it back gives equal episodes, except that every image is then an absolute path, and that
    ``info`` has passed through JSON: its keys are strings and its tuples lists.

    Parameters
    ----------
    episodes
        At least one, each with an id of its own.
    path
        Where to write; a manifest that is there is replaced, missing directories are made.

    Raises
    ------
    ProbeError
        If there is no episode, an id occurs twice, an image cannot be opened, an episode holds what JSON cannot, or the
        place cannot be written to.
    """
    if not episodes:
        raise ProbeError(f"There is no episode to write to {path}; choose at least one.")
    directory = path.parent.resolve()
    hashes: dict[Path, str] = {}
    lines: list[bytes] = []
    seen: set[str] = set()
    for episode in episodes:
        if episode.id in seen:
            raise ProbeError(f"Two episodes for {path} have the id {episode.id!r}; give each its own.")
        seen.add(episode.id)
        record = _record(episode, lambda image, where: _image_record(image, directory, hashes, where))
        line = _encode(record, episode)
        # What could not be read back must not be written: it would be found only when the run begins.
        _episode(json.loads(line), directory, f"Episode {episode.id}")
        lines.append(line)
    write_bytes(path, b"".join(lines))


def episodes_key(episodes: Sequence[Episode]) -> str:
    """Identify episodes by their content: 16 hexadecimal digits.

    Everything that a manifest holds counts, images by their pixels and not by where they lie. Every image is opened, so
    that a broken one is found here.

    Raises
    ------
    ProbeError
        If an image cannot be opened or an episode holds what JSON cannot.
    """
    hashes: dict[Path, str] = {}

    def pixels(image: Picture, where: str) -> str:
        if isinstance(image, Image.Image):
            return pixel_hash(open_image(image, where=where))
        return _hash_of(_located(image), hashes, where)

    digest = hashlib.sha256()
    for episode in episodes:
        digest.update(_encode(_record(episode, pixels), episode))
    return digest.hexdigest()[:16]


def examples_key(examples: Sequence[Example]) -> str:
    """Identify a pool or queries as :func:`content_key` does episodes."""
    return content_key([Episode(f"of example {example.id}", (), example) for example in examples])


def content_key(episodes: Sequence[Episode]) -> str:
    """Identify episodes without opening an image file: 16 hexadecimal digits.

    Everything counts that a manifest holds, but an image file by its path, size and time of change: a pool may have a
    hundred thousand.

    Raises
    ------
    ProbeError
        If an image file is missing or an episode holds what JSON cannot.
    """

    def mark(image: Picture, where: str) -> object:
        if isinstance(image, Image.Image):
            return pixel_hash(open_image(image, where=where))
        try:
            found = os.stat(image)
        except OSError as error:
            raise ProbeError(f"In {where}: there is no image {image} ({error.strerror}); correct the path.") from error
        return [str(image), found.st_size, found.st_mtime_ns]

    digest = hashlib.sha256()
    for episode in episodes:
        digest.update(_encode(_record(episode, mark), episode))
    return digest.hexdigest()[:16]


def query_keys(episodes: Sequence[Episode]) -> list[str]:
    """Identify each query by what is asked, whatever it is called and whichever demonstrations stand before it."""
    return [content_key([Episode("", (), replace(episode.query, id="", info={}))]) for episode in episodes]


def _record(episode: Episode, show_image: Callable[[Picture, str], object]) -> dict[str, Any]:
    """An episode as JSON values; ``show_image`` says what stands for an image."""
    examples = [
        {
            "id": example.id,
            "images": [show_image(image, where) for image, where in image_places(episode, example, index)],
            "question": example.question,
            "answers": list(example.answers),
            "info": example.info,
        }
        for index, example in enumerate(episode.examples)
    ]
    return {
        "id": episode.id,
        "strategy": episode.strategy,
        "seed": episode.seed,
        "perturbations": list(episode.perturbations),
        "info": episode.info,
        "demonstrations": examples[:-1],
        "query": examples[-1],
    }


def read_manifest(path: Path, *, check_pixels: bool = True) -> list[Episode]:
    """Read the episodes of a manifest.

    Parameters
    ----------
    path
        What :func:`write_manifest` wrote.
    check_pixels
        Open every image, once, and compare its pixels with the hash in the manifest.

    Returns
    -------
    list of Episode
        Images are absolute paths.

    Raises
    ------
    ProbeError
        With file and line if a line is malformed; with episode and image if an image cannot be opened or has changed.
    """
    episodes: list[Episode] = []
    records: list[dict[str, Any]] = []
    lines_of: dict[str, int] = {}
    for number, record in json_lines(path):
        where = f"{path}, line {number}"
        episode = _episode(record, path.parent, where)
        if episode.id in lines_of:
            raise ProbeError(
                f"{where}: the episode {episode.id!r} is on line {lines_of[episode.id]} too; write the manifest again."
            )
        lines_of[episode.id] = number
        episodes.append(episode)
        records.append(record)
    if check_pixels:  # after all lines were read: a broken line is found faster than a changed image
        hashes: dict[Path, str] = {}
        for episode, record in zip(episodes, records, strict=True):
            _check_pixels(episode, record, hashes)
    return episodes


def _hash_of(path: Path, hashes: dict[Path, str], where: str) -> str:
    """Hash the pixels of a file, which is opened once however many episodes show it."""
    if path not in hashes:
        hashes[path] = pixel_hash(open_image(path, where=where))
    return hashes[path]


def _image_record(image: Picture, directory: Path, hashes: dict[Path, str], where: str) -> dict[str, str]:
    path = _save(image, directory, hashes, where) if isinstance(image, Image.Image) else _located(image)
    try:
        name = Path(os.path.relpath(path, directory)).as_posix()
    except ValueError:  # on another drive
        name = path.as_posix()
    return {"path": name, "pixels": _hash_of(path, hashes, where)}


def _save(image: Image.Image, directory: Path, hashes: dict[Path, str], where: str) -> Path:
    """Save an image from memory as a PNG named by its pixels, unless that is there already."""
    upright = open_image(image, where=where)
    pixels = pixel_hash(upright)
    path = directory / SAVED_IMAGES / f"{pixels}.png"
    with contextlib.suppress(ProbeError):  # not there, or damaged
        if _hash_of(path, hashes, where) == pixels:
            return path
    content = io.BytesIO()
    upright.save(content, "PNG")
    write_bytes(path, content.getvalue())
    hashes[path] = pixels
    return path


def _located(path: Path) -> Path:
    """Make a path absolute, its directories free of links and ``..``; a link to the file itself keeps its name."""
    return path.parent.resolve() / path.name


def _encode(record: dict[str, Any], episode: Episode) -> bytes:
    """One line of JSON, line feed included."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProbeError(f"Episode {episode.id} cannot be written as JSON ({error}); use plain values only.") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(record).encode() + b"\n"


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):  # 1 and "1" are two keys in Python and one in JSON
        raise ValueError(f"two of the keys {keys} are the same")


def _episode(record: dict[str, Any], directory: Path, where: str) -> Episode:
    _check_fields(record, _EPISODE, "the episode", where)
    _check_strings(record["perturbations"], "perturbations", "the episode", where)
    return Episode(
        id=record["id"],
        demonstrations=tuple(
            _example(example, directory, f"demonstration {number}", where)
            for number, example in enumerate(record["demonstrations"])
        ),
        query=_example(record["query"], directory, "the query", where),
        strategy=record["strategy"],
        seed=record["seed"],
        perturbations=tuple(record["perturbations"]),
        info=record["info"],
    )


def _example(record: Any, directory: Path, noun: str, where: str) -> Example:
    _check_fields(record, _EXAMPLE, noun, where, optional=("info",))
    _check_strings(record["answers"], "answers", noun, where)
    if not record["answers"]:
        raise ProbeError(f"{where}: {noun} has no answer; complete the line or write the manifest again.")
    for number, image in enumerate(record["images"], start=1):
        _check_fields(image, _IMAGE, f"image {number} of {noun}", where)
    return Example(
        id=record["id"],
        images=tuple(_located(directory / image["path"]) for image in record["images"]),
        question=record["question"],
        answers=tuple(record["answers"]),
        info=record.get("info", {}),
    )


def _check_fields(
    record: Any, fields: Mapping[str, type], noun: str, where: str, *, optional: tuple[str, ...] = ()
) -> None:
    """Refuse a part of a line that lacks a field, has one too many, or one of the wrong type."""
    if not isinstance(record, dict):
        raise ProbeError(f"{where}: {noun} is not an object; complete the line or write the manifest again.")
    missing = [key for key in fields if key not in record and key not in optional]
    if missing:
        raise ProbeError(f"{where}: {noun} lacks {', '.join(missing)}; complete the line or write the manifest again.")
    for key, value in record.items():
        if key not in fields:
            raise ProbeError(f"{where}: {noun} has {key!r}, which no manifest has; {did_you_mean(key, tuple(fields))}")
        if type(value) is not fields[key]:  # not isinstance, to which true is a whole number
            raise ProbeError(f"{where}: {key!r} of {noun} must be {KINDS[fields[key]]}; correct it.")


def _check_strings(values: list[Any], key: str, noun: str, where: str) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ProbeError(f"{where}: {key!r} of {noun} must be a list of strings; correct it.")


def _check_pixels(episode: Episode, record: dict[str, Any], hashes: dict[Path, str]) -> None:
    written = [*record["demonstrations"], record["query"]]
    for index, example in enumerate(episode.examples):
        for (image, where), expected in zip(
            image_places(episode, example, index), written[index]["images"], strict=True
        ):
            assert isinstance(image, Path)
            if _hash_of(_located(image), hashes, where) != expected["pixels"]:
                raise ProbeError(
                    f"In {where}: the pixels of {image} have changed since the manifest was written; put the old image "
                    "back, or write the manifest again. (Another version of a JPEG decoder can have this effect.)"
                )
