"""Perturbations of episodes: each does what its name says, to every demonstration, and is written down."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from probe.data.example import Episode, Example
from probe.data.manifest import read_manifest, write_manifest
from probe.data.perturb import PERTURBATIONS, SYMBOLS, answer_type, perturb
from probe.errors import UsageError


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 36, 3), dtype=np.uint8))


PICTURES = [picture(i) for i in range(12)]
QUESTIONS = ("What colour?", "How many?", "Is it big?")
ANSWERS = (("red", "blue", "green"), ("1", "2", "3"), ("yes", "no", "yes"))


def example(number: int) -> Example:
    kind = number % 3
    return Example(f"x{number}", (PICTURES[number % 12],), QUESTIONS[kind], (ANSWERS[kind][number // 3 % 3],))


POOL = [example(i) for i in range(24)]
EPISODES = [Episode(f"e{i}", tuple(POOL[(5 * i + j) % 24] for j in range(4)), POOL[(5 * i + 4) % 24]) for i in range(4)]


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name != "declarative"])
def test_seeded_recorded_and_nothing_changed_in_place(name):
    before = copy.deepcopy([(e.id, [(x.question, x.answers) for x in e.examples]) for e in EPISODES])
    once, again = perturb(EPISODES, name, seed=3), perturb(EPISODES, name, seed=3)
    assert [(e.id, [(x.question, x.answers) for x in e.examples]) for e in EPISODES] == before
    for a, b, old in zip(once, again, EPISODES, strict=True):
        assert a.perturbations == (f"{name} (seed 3)",)
        assert [(x.question, x.answers) for x in a.examples] == [(x.question, x.answers) for x in b.examples]
        assert [len(x.images) for x in a.examples] == [len(x.images) for x in old.examples]
    # An episode is the same whatever stands beside it.
    alone = perturb(EPISODES[2:3], name, seed=3, pool=POOL)
    beside = perturb(EPISODES, name, seed=3, pool=POOL)[2]
    assert [(x.question, x.answers) for x in alone[0].examples] == [(x.question, x.answers) for x in beside.examples]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mismatched-image", lambda x: [id(image) for image in x.images]),
        ("mismatched-question", lambda x: x.question),
        ("mismatched-answer", lambda x: x.answer),
    ],
)
def test_mismatches_change_one_part_of_every_demonstration(name, part):
    parts = {
        "image": lambda x: [id(image) for image in x.images],
        "question": lambda x: x.question,
        "answer": lambda x: x.answer,
    }
    for old, new in zip(EPISODES, perturb(EPISODES, name, pool=POOL), strict=True):
        assert new.query is old.query
        for a, b in zip(old.demonstrations, new.demonstrations, strict=True):
            assert part(a) != part(b)
            kept = [other for word, other in parts.items() if word not in name]
            assert all(other(a) == other(b) for other in kept)


def test_the_query_is_never_material():
    """With a pool of the query and one other example, only the other one is taken."""
    pool = [EPISODES[0].query, POOL[20]]
    for seed in range(5):
        [new] = perturb(EPISODES[:1], "mismatched-image", pool=pool, seed=seed)
        assert all(x.images == POOL[20].images for x in new.demonstrations)


def test_wrong_answers_are_wrong_and_of_the_same_type():
    for old, new in zip(EPISODES, perturb(EPISODES, "wrong-answers", pool=POOL), strict=True):
        for a, b in zip(old.demonstrations, new.demonstrations, strict=True):
            assert b.answer not in a.answers
            assert answer_type(a.answer) == answer_type(b.answer)
            assert b.answer in ANSWERS[QUESTIONS.index(a.question)]


def test_images_are_exchanged_blurred_and_blanked():
    [old] = EPISODES[:1]
    [permuted] = perturb([old], "permuted-images")
    assert Counter(id(x.images[0]) for x in permuted.demonstrations) == Counter(
        id(x.images[0]) for x in old.demonstrations
    )
    assert all(a.images != b.images for a, b in zip(old.demonstrations, permuted.demonstrations, strict=True))
    [blurred], [blank], [query] = (perturb([old], n) for n in ("blurred-images", "blank-images", "blurred-query"))
    for a, b, c in zip(old.demonstrations, blurred.demonstrations, blank.demonstrations, strict=True):
        before, soft, flat = (np.asarray(x.images[0]).astype(float) for x in (a, b, c))
        assert soft.shape == flat.shape == before.shape
        assert soft.std() < before.std() / 4
        assert flat.std(axis=(0, 1)).max() == 0
        np.testing.assert_allclose(flat.mean((0, 1)), before.mean((0, 1)), atol=0.5)
    assert blurred.query is old.query
    assert query.demonstrations == old.demonstrations
    assert np.asarray(query.query.images[0]).std() < np.asarray(old.query.images[0]).std() / 4


def labelled(episode: Episode) -> list[str]:
    return [x.answer for x in episode.examples]


def test_flipped_and_abstract_labels_are_bijections_that_move_the_query_too():
    for name in ("flipped-labels", "abstract-labels"):
        for old, new in zip(EPISODES, perturb(EPISODES, name), strict=True):
            pairs = set(zip(labelled(old), labelled(new), strict=True))
            assert len(pairs) == len(set(labelled(old))) == len(set(labelled(new)))
            assert all(a != b for a, b in pairs)
            assert new.info["gold"] == list(old.query.answers)
            allowed = SYMBOLS if name == "abstract-labels" else labelled(old)
            assert set(labelled(new)) <= set(allowed)


def test_random_labels_leave_the_query_and_are_uniform():
    labels = ["red", "blue", "green"]
    base = Episode("r", tuple(POOL[0:24:3]), POOL[3])
    drawn = Counter()
    for seed in range(60):
        [new] = perturb([base], "random-labels", labels=labels, seed=seed)
        assert new.query is base.query
        drawn.update(x.answer for x in new.demonstrations)
    assert set(drawn) == set(labels)
    assert max(drawn.values()) < 1.35 * min(drawn.values())  # 480 draws


def test_they_compose_in_order_and_survive_a_manifest(tmp_path):
    [new] = perturb(EPISODES[:1], ["flipped-labels", "abstract-labels", "instruction", "blurred-images"], seed=1)
    assert [text.split()[0] for text in new.perturbations] == [
        "flipped-labels",
        "abstract-labels",
        "instruction",
        "blurred-images",
    ]
    assert new.info["gold"] == list(EPISODES[0].query.answers)
    write_manifest([new], tmp_path / "episodes.jsonl")
    [read] = read_manifest(tmp_path / "episodes.jsonl")
    assert read.perturbations == new.perturbations
    assert labelled(read) == labelled(new)


def test_declarative_sentences_come_from_a_table():
    sentences = {question: f"{question[:-1]} is [MASK]." for question in QUESTIONS}
    [new] = perturb(EPISODES[:1], "declarative", sentences=sentences)
    assert [x.question for x in new.examples] == [sentences[x.question] for x in EPISODES[0].examples]
    with pytest.raises(UsageError, match="there is no sentence for"):
        perturb(EPISODES[:1], "declarative")


def test_what_cannot_be_done_is_said():
    one = Episode("one", (POOL[0],), POOL[9])
    cases = {
        "permuted-images": "has 1 demonstrations",
        "flipped-labels": "has one label, 'red'",
        "mismatched-question": "no example of the pool has another question",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            perturb([one], name)
    with pytest.raises(UsageError, match="did you mean blank-query"):
        perturb([one], "blank-querry")
    with pytest.raises(UsageError, match="'red', which is none of the labels"):
        perturb([one], "random-labels", labels=["blue", "green"])
    with pytest.raises(UsageError, match="there are 10 symbols"):
        perturb([one], "abstract-labels", labels=["red", *map(str, range(20))])
