"""The synthetic world: pictures show what they should, and answers follow from the rule an episode claims to have."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from probe.data import Episode, Example
from probe.data.scenes import (
    ATTRIBUTES,
    COLOURS,
    HELD_OUT_PAIRS,
    VALUES,
    Scene,
    Split,
    _digit_scans,
    every_scene,
    held_out,
    render,
)
from probe.data.tasks import (
    DRAW_RULE,
    FIXED,
    TASKS,
    answer_item,
    draw_items,
    draw_scene,
    fixed_rule,
    synthetic_episodes,
)
from probe.data.words import CUES, ENGLISH, LANGUAGES, NONCE, NUMERALS, PLURALS, UNCUED
from probe.errors import UsageError

TEXT_TASKS = [task for task in TASKS if task.endswith("-text")]
BINDING = ["binding-cued", "binding-uncued"]

# Written out again, so that a table of the package that is out of step with the scenes shows.
COLOURS_IN_ORDER = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan"]
KINDS_IN_ORDER = [
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "heart",
    "diamond",
    "ring",
    *(f"#{i}" for i in range(10)),
]
ITALIAN_OF = {
    **{"red": "rosso", "green": "verde", "blue": "blu", "yellow": "giallo"},
    **{"orange": "arancio", "purple": "viola", "pink": "rosa", "cyan": "ciano"},
    **{"circle": "cerchio", "square": "quadrato", "triangle": "triangolo", "star": "stella"},
    **{"cross": "croce", "heart": "cuore", "diamond": "rombo", "ring": "anello"},
    **{"#0": "zero", "#1": "uno", "#2": "due", "#3": "tre", "#4": "quattro"},
    **{"#5": "cinque", "#6": "sei", "#7": "sette", "#8": "otto", "#9": "nove"},
    **{"one": "singolo", "two": "coppia", "three": "trio", "four": "quartetto", "small": "piccolo", "big": "grande"},
}
IN_ORDER = [COLOURS_IN_ORDER, KINDS_IN_ORDER, ["one", "two", "three", "four"], ["small", "big"]]
PLACE = {"colour": 0, "kind": 1, "count": 2, "size": 3}
NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4}


def words_and_question(example: Example) -> tuple[list[str], str]:
    """What a text-only twin says of its picture, and what it asks."""
    *words, question = example.question.split()
    assert len(words) == 4
    return words, question


def expected_answer(example: Example, info: dict[str, Any]) -> str:
    """The answer from the words, the question and the rule, by none of the package's code or tables."""
    words, question = words_and_question(example)
    if info["task"] == "operator":
        assert question == "?"
        return str(NUMBER[words[2]] + info["shift"])
    if info["task"] in ("vqa", "binding-cued"):
        attribute = question.removesuffix("?")
        assert attribute == info.get("attribute", attribute)
    else:
        assert question == "?"
        attribute = info["attribute"]
    word = words[PLACE[attribute]]
    if info["task"].startswith("binding"):
        return info["labels"][IN_ORDER[PLACE[attribute]].index(word)]
    return ITALIAN_OF[word] if info["language"] == "italian" else word


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_every_answer_follows_from_the_rule(task: str) -> None:
    for episode in synthetic_episodes(task, shots=6, n=60, seed=5):
        for example in episode.examples:
            assert example.answers == (expected_answer(example, episode.info),)
            assert example.images == ()


def test_a_description_counts_and_names() -> None:
    rng = np.random.default_rng(0)
    rule = DRAW_RULE["describe"](rng)
    for scene in every_scene():
        item = answer_item(rule, scene, rng)
        count, colour, noun = item.answer.split()
        assert item.question == "describe:"
        assert (NUMBER[count], colour) == (scene.count + 1, scene.value("colour"))
        kind = scene.value("kind")
        if count == "one":
            assert noun == kind
        else:
            assert noun == kind + ("es" if kind == "cross" else "s")


@pytest.mark.parametrize("task", ["vqa", "recognition", *BINDING, "operator"])
def test_a_text_twin_tells_what_the_picture_shows(task: str) -> None:
    pairs = zip(
        synthetic_episodes(task, shots=2, n=12, seed=2),
        synthetic_episodes(f"{task}-text", shots=2, n=12, seed=2),
        strict=True,
    )
    for seen, told in pairs:
        assert seen.info == told.info
        for picture, text in zip(seen.examples, told.examples, strict=True):
            words, question = words_and_question(text)
            assert (picture.question, picture.answers) == (question, text.answers)
            (image,) = picture.images
            assert isinstance(image, Image.Image)
            assert perceived(image) == (words[0], NUMBER[words[2]])


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_does_not_depend_on_how_many_there_are(task: str) -> None:
    many = synthetic_episodes(task, shots=2, n=5, seed=7)
    assert synthetic_episodes(task, shots=2, n=3, seed=7) == many[:3]
    assert synthetic_episodes(task, shots=2, n=5, seed=8) != many
    assert len({json.dumps([e.question + e.answer for e in episode.examples]) for episode in many}) == 5


@pytest.mark.parametrize("task", TASKS)
def test_the_form_of_an_episode(task: str) -> None:
    episodes = synthetic_episodes(task, shots=3, n=4, seed=1)
    assert len({episode.id for episode in episodes}) == 4
    assert len({example.id for episode in episodes for example in episode.examples}) == 16
    for episode in episodes:
        assert (episode.shots, episode.strategy, episode.seed) == (3, f"synthetic:{task}", 1)
        assert json.loads(json.dumps(episode.info))["task"] == task.removesuffix("-text")
    assert synthetic_episodes(task, shots=0, n=1)[0].demonstrations == ()


def test_rules_vary_between_episodes() -> None:
    def seen(task: str, key: str) -> set[object]:
        return {episode.info[key] for episode in synthetic_episodes(task, shots=0, n=60)}

    assert seen("recognition-text", "attribute") == seen("binding-uncued-text", "attribute") == set(ATTRIBUTES)
    assert seen("recognition-text", "language") == {"english", "italian"}
    assert seen("operator-text", "shift") == {1, 2, 3, 4, 5}
    questions = {episode.query.question.split()[-1] for episode in synthetic_episodes("vqa-text", shots=0, n=60)}
    assert questions == {"colour?", "kind?", "count?", "size?"}


@pytest.mark.parametrize("task", BINDING)
def test_labels_are_distinct_and_bound_anew(task: str) -> None:
    bindings = [episode.info["labels"] for episode in synthetic_episodes(f"{task}-text", shots=0, n=40)]
    for labels in bindings:
        assert len(set(labels.values())) == len(labels) in (2, 4)
        assert set(labels.values()) <= set(NONCE)
    assert len({json.dumps(labels) for labels in bindings}) == 40
    assert len({labels[0] for labels in bindings if 0 in labels}) > 10


def shows_the_answer(episode: Episode) -> bool:
    return episode.query.answer in {example.answer for example in episode.demonstrations}


@pytest.mark.parametrize("task", BINDING)
def test_query_in_context(task: str) -> None:
    def share(shots: int, **options: bool) -> float:
        return float(
            np.mean([shows_the_answer(e) for e in synthetic_episodes(f"{task}-text", shots=shots, n=150, **options)])
        )

    assert share(1) == share(4) == 1  # the default
    assert share(1, query_in_context=True) == 1
    assert share(0) == 0
    # one demonstration of 2 or 4 classes
    assert 0.15 < share(1, query_in_context=False) < 0.5


@pytest.mark.parametrize("task", TEXT_TASKS)
@pytest.mark.parametrize("novel", [False, True])
def test_held_out_pairs_are_shown_only_when_asked_for_and_only_in_the_query(task: str, novel: bool) -> None:
    for episode in synthetic_episodes(task, shots=5, n=80, novel_pair_query=novel):
        for example in episode.demonstrations:
            assert not is_held_out(example)
        assert is_held_out(episode.query) == novel


def is_held_out(example: Example) -> bool:
    words, _ = words_and_question(example)
    return (VALUES["colour"].index(words[0]), VALUES["kind"].index(words[1])) in HELD_OUT_PAIRS


def test_every_value_is_common_in_training_and_can_be_shown_in_a_held_out_pair() -> None:
    assert len(HELD_OUT_PAIRS) == 27
    for place, n_others, attribute in ((0, 18, "colour"), (1, 8, "kind")):
        count = Counter(pair[place] for pair in HELD_OUT_PAIRS)
        assert set(count) == set(range(len(VALUES[attribute])))
        assert max(count.values()) < n_others / 3
    rng = np.random.default_rng(0)
    for attribute in ATTRIBUTES:
        for value in range(len(VALUES[attribute])):
            for novel in (False, True):
                scene = draw_scene(rng, attribute=attribute, value=value, novel_pair=novel)
                assert (getattr(scene, attribute), held_out(scene)) == (value, novel)


def test_scenes_are_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(draw_scene(rng) for _ in range(20_000))
    allowed = [scene for scene in every_scene() if not held_out(scene)]
    assert set(drawn) <= set(allowed)
    for attribute in ("count", "size"):
        counts = Counter[int]()
        for scene, times in drawn.items():
            counts[getattr(scene, attribute)] += times
        expected = 20_000 / len(VALUES[attribute])
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())
    for attribute in ("colour", "kind"):  # some lose more pairs than others
        expected_of = Counter(getattr(scene, attribute) for scene in allowed)
        for value, n_scenes in expected_of.items():
            expected = 20_000 * n_scenes / len(allowed)
            count = sum(times for scene, times in drawn.items() if getattr(scene, attribute) == value)
            assert abs(count - expected) < 5 * expected**0.5


@pytest.mark.parametrize("task", [*DRAW_RULE])
def test_items_say_what_their_answer_depends_on(task: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        rule = DRAW_RULE[task](rng)
        for item in draw_items(rule, 5, rng):
            if rule.labels is not None:
                assert rule.labels[item.label_class] == item.answer
            elif rule.shift is not None:
                assert item.label_class == item.scene.count
            elif rule.attribute is not None:
                assert item.label_class == getattr(item.scene, rule.attribute)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "recogniton"}, "did you mean .*recognition"),
        ({"task": "describe-text"}, "There is no task 'describe-text'"),
        ({"shots": -1}, "asked for -1, 1 and 0"),
        ({"n": 0}, "asked for 1, 0 and 0"),
        ({"seed": -1}, "asked for 1, 1 and -1"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        synthetic_episodes(**({"task": "vqa", "shots": 1, "n": 1} | options))


# The pictures.


def object_pixels(image: Image.Image, colour: str) -> np.ndarray:
    """``[6, 28, 28]``: for each cell, row by row, which pixels are nearer to ``colour`` than to the background."""
    pixels = np.asarray(image, dtype=float)
    background = np.median(pixels.reshape(-1, 3), axis=0)  # objects never fill half of a picture
    near = np.linalg.norm(pixels - COLOURS[colour], axis=-1) < np.linalg.norm(pixels - background, axis=-1)
    return near.reshape(2, 28, 3, 28).transpose(0, 2, 1, 3).reshape(6, 28, 28)


def perceived(image: Image.Image) -> tuple[str, int]:
    """The colour and the number of objects, by looking: the colour that most pixels have, and the cells where it is."""
    pixels = np.asarray(image, dtype=float)
    colour = max(COLOURS, key=lambda name: int((np.linalg.norm(pixels - COLOURS[name], axis=-1) < 45).sum()))
    return colour, int((object_pixels(image, colour).sum((1, 2)) >= 15).sum())


# 5 has no factor in common with the numbers of values, so that all of them occur.
@pytest.mark.parametrize("split", ["train", "test"])
def test_each_object_lies_within_a_cell_of_its_own(split: Split) -> None:
    for scene in every_scene()[::5]:
        image = render(scene, seed=1, split=split)
        assert (image.mode, image.size) == ("RGB", (84, 56))
        counts = object_pixels(image, scene.value("colour")).sum((1, 2))
        order = np.argsort(-counts)
        n_objects = int(scene.value("count"))
        assert counts[order[n_objects - 1]] >= 15, scene
        assert counts[order[n_objects]] <= 2, scene
        cells = np.asarray(image, dtype=float).reshape(2, 28, 3, 28, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1, 3)
        for cell in cells[order[n_objects:]]:
            assert np.abs(cell - np.median(cell, axis=0)).max() < 40, scene  # a grey slope and a little noise


def test_a_picture_shows_its_colour_and_count() -> None:
    for scene in every_scene()[::7]:
        assert perceived(render(scene, seed=2)) == (scene.value("colour"), int(scene.value("count"))), scene


def test_big_objects_are_bigger() -> None:
    for kind in range(len(VALUES["kind"])):
        small, big = (
            np.mean([object_pixels(render(Scene(0, kind, 0, size), seed), "red").sum() for seed in range(5)])
            for size in (0, 1)
        )
        assert big > 2 * small


def test_every_cell_is_used() -> None:
    used = sum(
        (object_pixels(render(Scene(2, 0, 0, 0), seed), "blue").sum((1, 2)) >= 15).astype(int) for seed in range(300)
    )
    assert all(abs(count - 50) < 5 * 6.5 for count in used)


def test_a_render_depends_on_scene_seed_and_split_alone() -> None:
    scenes = every_scene()[::97]
    splits: tuple[Split, Split] = ("train", "test")
    keys = [(scene, seed, split) for scene in scenes for seed in range(3) for split in splits]
    first = [render(scene, seed, split=split).tobytes() for scene, seed, split in keys]
    again = [render(scene, seed, split=split).tobytes() for scene, seed, split in reversed(keys)]
    assert first == again[::-1]
    assert len(set(first)) == len(first)


def test_degrading_takes_edges_and_leaves_colour() -> None:
    scene = Scene(0, 3, 3, 1)
    clean = np.asarray(render(scene, 0), dtype=float)
    smooth = np.asarray(render(scene, 0).filter(ImageFilter.MedianFilter(5)), dtype=float)  # as good as without noise
    edges = 4 * smooth - sum(np.roll(smooth, shift, axis) for axis in (0, 1) for shift in (-1, 1))

    def left(degrade: float) -> float:
        """How much of the clean picture's edges is there."""
        return float((edges * np.asarray(render(scene, 0, degrade=degrade), dtype=float)).sum() / (edges * clean).sum())

    assert left(0) == 1
    assert 0.6 > left(0.5) > left(1)
    for degrade in (0.5, 1.0):
        degraded = np.asarray(render(scene, 0, degrade=degrade), dtype=float)
        assert np.abs(degraded.mean((0, 1)) - clean.mean((0, 1))).max() < 10


def test_training_and_test_share_no_digit_scan() -> None:
    from sklearn.datasets import load_digits

    scans = {
        split: [{scan.tobytes() for scan in digit} for digit in _digit_scans(split)] for split in ("train", "test")
    }
    train, test = (set().union(*scans[split]) for split in ("train", "test"))
    assert not train & test
    per_digit = np.bincount(load_digits().target)
    for digit in range(10):
        assert len(scans["train"][digit]) + len(scans["test"][digit]) == per_digit[digit]
        assert len(scans["test"][digit]) > 20


# The words.


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_one_word_for_each_value(language: str) -> None:
    table = LANGUAGES[language]
    assert set(table) == set(ATTRIBUTES)
    for attribute in ATTRIBUTES:
        assert len(table[attribute]) == len(VALUES[attribute])
    words = [word for attribute in ATTRIBUTES for word in table[attribute]]
    assert len(set(words)) == len(words)


def test_words_belong_to_one_table_only() -> None:
    """A word that stood in two would make the hidden rule ambiguous."""
    tables = [
        [word for attribute in ATTRIBUTES for word in LANGUAGES[language][attribute]] for language in LANGUAGES
    ] + [list(NONCE), list(NUMERALS), list(PLURALS), list(CUES.values()), [UNCUED]]
    words = [word for table in tables for word in table]
    assert [word for word, times in Counter(words).items() if times > 1] == []
    assert all(word.split() == [word] for word in words)
    assert len(PLURALS) == len(ENGLISH["kind"])
    assert set(CUES) == set(ATTRIBUTES)


# --- Fixed rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*FIXED, "operator-text:2", "binding-cued:kind-3", "binding-uncued:size-0"])
def test_a_fixed_rule_is_the_same_in_all_episodes(task):
    episodes = synthetic_episodes(task, shots=2, n=6, seed=5)
    assert len({str(episode.info) for episode in episodes}) == 1
    answers = {x.info[episodes[0].info["attribute"]]: x.answer for e in episodes for x in e.examples}
    assert all(answers[x.info[episodes[0].info["attribute"]]] == x.answer for e in episodes for x in e.examples)
    assert synthetic_episodes(task, shots=2, n=6, seed=5) == episodes


def test_every_operator_and_recognition_task_has_a_name():
    drawn = {str(fixed_rule(task)) for task in FIXED}
    rng = np.random.default_rng(0)
    assert drawn == {str(DRAW_RULE[task](rng)) for task in ("operator", "recognition") for _ in range(300)}


def test_bindings_of_different_numbers_differ():
    labels = [fixed_rule(f"binding-cued:colour-{number}").labels for number in range(5)]
    assert len({str(label) for label in labels}) == 5
    assert fixed_rule("binding-cued:colour-1").labels == fixed_rule("binding-uncued:colour-1").labels


@pytest.mark.parametrize(
    "task",
    ["operator:6", "operator:x", "recognition:colour", "recognition:colour-greek", "vqa:1", "binding-cued:hue-1"],
)
def test_a_rule_that_does_not_exist_is_refused(task):
    with pytest.raises(UsageError, match="There is no rule"):
        synthetic_episodes(task, shots=1, n=1)
