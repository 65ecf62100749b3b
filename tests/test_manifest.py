"""Manifests: what is read is what was written, and an image that has changed since is noticed."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probe.data import Episode, Example
from probe.data.images import open_image, pixel_hash
from probe.data.manifest import episodes_key, read_manifest, write_manifest
from probe.data.tasks import synthetic_episodes
from probe.errors import ProbeError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A directory with ``red.png`` and ``blue.png``."""
    directory = tmp_path / "photos"
    directory.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (3, 2), colour).save(directory / f"{colour}.png")
    return directory


def pair(photos: Path) -> list[Episode]:
    """Two episodes with all that an episode may hold."""
    red = Example("a", (photos / "red.png",), "Which “colour”?\u2028", ("rosso", "rouge 🟥"))
    both = Example("b", (photos / "red.png", photos / "blue.png"), 'A\nB "?"\\', ("x",))
    text = Example("c", (), "", ("x", "x"))
    first = Episode(
        "one", (red, both), text, "retrieval", 7, ("shuffle", "swap:0"), {"k": [1, 2.5e-300, None, {"é": 0.1}]}
    )
    return [first, Episode("two", (), both)]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def edit(path: Path, change: Callable[[dict[str, Any]], object], line: int = 0) -> None:
    """Change one line of a manifest in place."""
    changed = records(path)
    change(changed[line])
    path.write_text("".join(json.dumps(record) + "\n" for record in changed), "utf-8")


def test_the_round_trip_is_exact(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "run" / "episodes.jsonl"
    write_manifest(pair(photos), path)
    assert read_manifest(path) == pair(photos)
    again = path.with_name("again.jsonl")
    write_manifest(read_manifest(path), again)
    assert again.read_bytes() == path.read_bytes()


def test_the_format(tmp_path: Path, photos: Path) -> None:
    """What other programs may rely on."""
    path = tmp_path / "run" / "episodes.jsonl"
    write_manifest(pair(photos), path)
    red = {"path": "../photos/red.png", "pixels": pixel_hash(Image.new("RGB", (3, 2), "red"))}
    blue = {"path": "../photos/blue.png", "pixels": pixel_hash(Image.new("RGB", (3, 2), "blue"))}
    both = {"id": "b", "images": [red, blue], "question": 'A\nB "?"\\', "answers": ["x"], "info": {}}
    assert records(path)[1] == {
        "id": "two",
        "strategy": "given",
        "seed": 0,
        "perturbations": [],
        "info": {},
        "demonstrations": [],
        "query": both,
    }
    assert "rouge 🟥" in path.read_text("utf-8")  # for people to read


@pytest.mark.parametrize("task", ["binding-uncued", "operator-text"])
def test_images_from_memory_are_saved(tmp_path: Path, task: str) -> None:
    path = tmp_path / "episodes.jsonl"
    given = synthetic_episodes(task, shots=2, n=3)
    write_manifest(given, path)
    assert given == synthetic_episodes(task, shots=2, n=3)  # untouched
    back = read_manifest(path)
    saved: set[Path] = set()
    for old, new in zip(given, back, strict=True):
        # the one difference: info as JSON has it
        assert new.info == json.loads(json.dumps(old.info))
        for before, after in zip(old.examples, new.examples, strict=True):
            assert replace(after, images=before.images) == before
            for image, file in zip(before.images, after.images, strict=True):
                assert isinstance(image, Image.Image)
                assert isinstance(file, Path)
                assert np.array_equal(np.asarray(image), np.asarray(open_image(file, where="")))
                assert file == tmp_path / "images" / f"{pixel_hash(image)}.png"
                saved.add(file)
    assert set(tmp_path.rglob("*.png")) == saved
    assert len(saved) == sum(len(example.images) for episode in given for example in episode.examples)


def test_an_image_from_memory_is_saved_once_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn it by a quarter
    photo = io.BytesIO()
    Image.new("RGBA", (3, 2), "red").save(photo, "PNG", exif=exif)
    image, copy = Image.open(photo), Image.open(photo)
    query, demonstration = (Example("a", images, "?", ("x",)) for images in ((copy,), (image, copy)))
    write_manifest([Episode("e", (demonstration,), query)], tmp_path / "m.jsonl")
    (file,) = (tmp_path / "images").iterdir()
    with Image.open(file) as saved:
        assert saved.size == (2, 3)
    (episode,) = read_manifest(tmp_path / "m.jsonl")
    assert episode.query.images == (file,)
    assert episode.demonstrations[0].images == (file, file)


def test_a_saved_image_that_is_whole_is_left_alone(tmp_path: Path) -> None:
    episodes = synthetic_episodes("vqa", shots=1, n=1)
    write_manifest(episodes, tmp_path / "m.jsonl")
    before = {file: file.stat().st_ino for file in (tmp_path / "images").iterdir()}
    write_manifest(episodes, tmp_path / "n.jsonl")
    assert {file: file.stat().st_ino for file in (tmp_path / "images").iterdir()} == before


def test_a_damaged_saved_image_is_written_anew(tmp_path: Path) -> None:
    episodes = synthetic_episodes("vqa", shots=1, n=1)
    write_manifest(episodes, tmp_path / "m.jsonl")
    damaged, changed = sorted((tmp_path / "images").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    Image.new("RGB", (84, 56)).save(changed)
    write_manifest(episodes, tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl")


def test_a_manifest_moves_with_its_images(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "deeper"
    write_manifest(synthetic_episodes("vqa", shots=1, n=2), old / "m.jsonl")
    new.parent.mkdir()
    shutil.move(old, new)
    (image,) = read_manifest(new / "m.jsonl")[0].query.images
    assert isinstance(image, Path)
    assert image.parent == new / "images"


def test_relative_paths_do_not_depend_on_where_the_program_runs(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    example = Example("a", (Path("../photos/red.png"),), "?", ("x",))
    write_manifest([Episode("e", (), example)], Path("m.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert read_manifest(Path("photos/m.jsonl"))[0].query.images == (photos / "red.png",)


def test_directories_behind_links(tmp_path: Path, photos: Path) -> None:
    """``link/../photos`` is not ``photos`` beside the link."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    path = tmp_path / "link" / "m.jsonl"
    write_manifest(pair(photos), path)
    assert read_manifest(path) == pair(photos)


def test_a_link_to_an_image_keeps_its_name(tmp_path: Path, photos: Path) -> None:
    """In a cache of Hugging Face files are links to blobs without suffix."""
    (photos / "link.png").symlink_to("red.png")
    write_manifest([Episode("e", (), Example("a", (photos / "link.png",), "?", ("x",)))], tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl")[0].query.images == (photos / "link.png",)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_not_text(tmp_path: Path, photos: Path) -> None:
    odd = photos / os.fsdecode(b"caf\xe9.png")
    try:
        (photos / "red.png").rename(odd)
    except OSError:
        pytest.skip("the file system has no such names")
    write_manifest([Episode("e", (), Example("a", (odd,), "?", ("x",)))], tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl")[0].query.images == (odd,)


def test_each_file_is_opened_once(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    pillow_open = Image.open

    def counting(file: Path) -> Image.Image:
        opened.append(str(file))
        return pillow_open(file)

    monkeypatch.setattr(Image, "open", counting)
    episodes = [replace(episode, id=f"{episode.id}{copy}") for copy in range(5) for episode in pair(photos)]
    write_manifest(episodes, tmp_path / "m.jsonl")
    assert sorted(opened) == [str(photos / "blue.png"), str(photos / "red.png")]
    opened.clear()
    read_manifest(tmp_path / "m.jsonl")
    assert sorted(opened) == [str(photos / "blue.png"), str(photos / "red.png")]
    opened.clear()
    read_manifest(tmp_path / "m.jsonl", check_pixels=False)
    assert not opened


def test_a_changed_image_is_named(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(pair(photos), path)
    changed = Image.new("RGB", (3, 2), "blue")
    changed.putpixel((2, 1), (0, 0, 254))
    changed.save(photos / "blue.png")
    with pytest.raises(
        ProbeError, match=r"episode one, demonstration 1, image 2: the pixels of .*blue.png have changed"
    ):
        read_manifest(path)
    assert read_manifest(path, check_pixels=False) == pair(photos)
    (photos / "red.png").unlink()
    with pytest.raises(ProbeError, match=r"episode one, demonstration 0: there is no image .*red\.png"):
        read_manifest(path)


def test_the_same_pixels_in_another_file_are_no_change(tmp_path: Path, photos: Path) -> None:
    write_manifest(pair(photos), tmp_path / "m.jsonl")
    Image.new("RGBA", (3, 2), "blue").save(photos / "blue.png", compress_level=0)
    assert read_manifest(tmp_path / "m.jsonl") == pair(photos)


def test_a_missing_image_is_found_when_writing(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(pair(photos), path)
    before = path.read_bytes()
    (photos / "blue.png").unlink()
    with pytest.raises(ProbeError, match="episode one, demonstration 1, image 2: there is no image"):
        write_manifest(pair(photos), path)
    with pytest.raises(ProbeError, match="episode two, query, image 2: there is no image"):
        write_manifest(pair(photos)[1:], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "info",
    [
        {"k": np.float32(1)},
        {"k": float("nan")},
        {"k": {1, 2}},
        {"k": {(1, 2): 3}},
        {"k": {1: "a", "1": "b"}},  # one key in JSON: the first would be lost
        {"k": [{"deep": {True: 1, "true": 2}}]},
    ],
)
def test_what_json_does_not_have_is_refused(tmp_path: Path, info: dict[Any, Any]) -> None:
    path = tmp_path / "m.jsonl"
    episode = Episode("odd", (), Example("a", (), "?", ("x",)), info=info)
    with pytest.raises(ProbeError, match="Episode odd cannot be written as JSON"):
        write_manifest([episode], path)
    assert not path.exists()


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    episode = Episode("odd", (), Example("a", (), "?", ()))
    with pytest.raises(ProbeError, match="Episode odd: the query has no answer"):
        write_manifest([episode], tmp_path / "m.jsonl")
    assert not list(tmp_path.iterdir())


def test_info_comes_back_as_json_has_it(tmp_path: Path) -> None:
    episode = Episode("e", (), Example("a", (), "?", ("x",)), info={"labels": {3: "dax"}, "classes": (3,)})
    write_manifest([episode], tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl")[0].info == {"labels": {"3": "dax"}, "classes": [3]}


def test_what_is_known_about_an_example_comes_back(tmp_path: Path) -> None:
    query = Example("a", (), "?", ("x", "y"), {"answer_type": "other", "answer_confidence": ["yes", "maybe"]})
    episodes = [Episode("e", (replace(query, info={}),), query)]
    write_manifest(episodes, tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl") == episodes
    assert episodes_key(episodes) != episodes_key([replace(episodes[0], query=replace(query, info={}))])


def test_a_line_by_hand_need_not_say_what_is_known(tmp_path: Path) -> None:
    write_manifest([Episode("e", (), Example("a", (), "?", ("x",), {"answer_type": "other"}))], tmp_path / "m.jsonl")
    edit(tmp_path / "m.jsonl", lambda record: record["query"].pop("info"))
    assert read_manifest(tmp_path / "m.jsonl")[0].query.info == {}


def test_ids_are_unique(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(ProbeError, match="'one'"):
        write_manifest([pair(photos)[0]] * 2, path)
    write_manifest(pair(photos), path)
    edit(path, lambda record: record.update(id="one"), line=1)
    with pytest.raises(ProbeError, match=r"m\.jsonl, line 2: the episode 'one' is on line 1 too"):
        read_manifest(path)


def test_nothing_to_write_or_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(ProbeError, match="no episode"):
        write_manifest([], path)
    path.write_text("\n")
    with pytest.raises(ProbeError, match="is empty"):
        read_manifest(path)
    with pytest.raises(ProbeError, match=r"no file .*did you mean m.jsonl"):
        read_manifest(tmp_path / "n.jsonl")


def test_a_place_that_cannot_be_written(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProbeError, match="Cannot write"):
        write_manifest(pair(photos), tmp_path / "file" / "m.jsonl")
    with pytest.raises(ProbeError, match="Cannot write"):
        write_manifest(pair(photos), photos)


BREAKAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda r: r.pop("query"), "the episode lacks query"),
    (lambda r: (r.pop("seed"), r.pop("info")), "the episode lacks seed, info"),
    (lambda r: r.update(seed=True), "'seed' of the episode must be a whole number"),
    (lambda r: r.update(seed="7"), "'seed' of the episode must be a whole number"),
    (lambda r: r.update(id=3), "'id' of the episode must be a string"),
    (lambda r: r.update(perturbations=[1]), "'perturbations' of the episode must be a list of strings"),
    (lambda r: r.update(perturbation=[]), "the episode has 'perturbation'.*did you mean perturbations"),
    (lambda r: r.update(demonstrations={}), "'demonstrations' of the episode must be a list"),
    (lambda r: r.update(query=None), "'query' of the episode must be an object"),
    (lambda r: r["demonstrations"].append("x"), "demonstration 2 is not an object"),
    (lambda r: r["demonstrations"][1].pop("question"), "demonstration 1 lacks question"),
    (lambda r: r["query"].pop("images"), "the query lacks images"),
    (lambda r: r["query"].update(answers=[]), "the query has no answer"),
    (lambda r: r["query"].update(info=[]), "'info' of the query must be an object"),
    (lambda r: r["query"].update(answers=["x", 3]), "'answers' of the query must be a list of strings"),
    (lambda r: r["demonstrations"][1]["images"][1].pop("pixels"), "image 2 of demonstration 1 lacks pixels"),
    (lambda r: r["demonstrations"][0].update(images=["a.png"]), "image 1 of demonstration 0 is not an object"),
]


@pytest.mark.parametrize(("breakage", "words"), BREAKAGES)
def test_a_malformed_line(
    tmp_path: Path, photos: Path, breakage: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(pair(photos)[::-1], path)
    edit(path, breakage, line=1)
    with pytest.raises(ProbeError, match=rf"m\.jsonl, line 2: {words}"):
        read_manifest(path)


def test_a_broken_line_is_found_before_any_image_is_opened(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(pair(photos), path)
    path.write_bytes(path.read_bytes()[:-10])
    (photos / "red.png").unlink()
    with pytest.raises(ProbeError, match=r"m\.jsonl, line 2: this is not JSON"):
        read_manifest(path)


def test_the_key_follows_content_and_not_place(tmp_path: Path, photos: Path) -> None:
    key = episodes_key(pair(photos))
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    assert episodes_key(pair(moved)) == key
    write_manifest(pair(photos), tmp_path / "m.jsonl")
    assert episodes_key(read_manifest(tmp_path / "m.jsonl")) == key
    assert episodes_key(pair(photos)[::-1]) != key
    image = Image.open(moved / "red.png").convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(moved / "red.png")
    assert episodes_key(pair(moved)) != key
