"""Perturbations of episodes: each does what its name says, to every demonstration, and is written down."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from probe.data.changes import PERTURBATIONS, SYMBOLS, answer_type
from probe.data.example import Episode, Example
from probe.data.manifest import read_manifest, write_manifest
from probe.data.perturb import perturb
from probe.errors import UsageError


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 36, 3), dtype=np.uint8))


PICTURES = [picture(i) for i in range(12)]
QUESTIONS = ("What colour?", "How many?", "Is it big?")
ANSWERS = (("red", "blue", "green"), ("1", "2", "3"), ("yes", "no", "yes"))


def example(number: int) -> Example:
    kind = number % 3
    question = QUESTIONS[kind] if number < 24 else f"Again: {QUESTIONS[kind].lower()}"
    return Example(f"x{number}", (PICTURES[number % 12],), question, (ANSWERS[kind][number // 3 % 3],))


POOL = [example(i) for i in range(30)]
EPISODES = [
    Episode(
        f"e{i}",
        tuple(POOL[(5 * i + j) % 24] for j in range(4)),
        POOL[(5 * i + 4) % 24],
        info={"target": i, "kept": "yes"},
    )
    for i in range(4)
]


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name not in ("declarative", "planted-answer")])
def test_seeded_recorded_and_nothing_changed_in_place(name):
    before = copy.deepcopy([(e.id, [(x.question, x.answers) for x in e.examples]) for e in EPISODES])
    once, again = perturb(EPISODES, name, seed=3, pool=POOL), perturb(EPISODES, name, seed=3, pool=POOL)
    assert [(e.id, [(x.question, x.answers) for x in e.examples]) for e in EPISODES] == before
    for a, b, old in zip(once, again, EPISODES, strict=True):
        assert a.perturbations == (f"{name} (seed 3)",)
        assert a.info["kept"] == "yes"
        assert [(x.question, x.answers) for x in a.examples] == [(x.question, x.answers) for x in b.examples]
        assert [len(x.images) for x in a.examples] == [len(x.images) for x in old.examples]
    # An episode is the same whatever stands beside it.
    alone = perturb(EPISODES[2:3], name, seed=3, pool=POOL)
    assert [(x.question, x.answers) for x in alone[0].examples] == [(x.question, x.answers) for x in once[2].examples]


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


def test_answers_are_exchanged_and_nothing_else():
    [old] = EPISODES[:1]
    for seed in range(5):
        [new] = perturb([old], "permuted-answers", seed=seed)
        assert Counter(x.answers for x in new.demonstrations) == Counter(x.answers for x in old.demonstrations)
        order = [[x.answers for x in old.demonstrations].index(x.answers) for x in new.demonstrations]
        assert new.query == old.query
        assert len(set(order)) < len(order) or all(place != of for place, of in enumerate(order))
        for a, b in zip(old.demonstrations, new.demonstrations, strict=True):
            assert (a.images, a.question) == (b.images, b.question)


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
        "permuted-images": "has 1 demonstrations; exchanging images",
        "permuted-answers": "has 1 demonstrations; exchanging answers",
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


def test_a_wrong_target_is_wrong_for_the_query_too():
    for seed in range(20):
        for old, new in zip(EPISODES, perturb(EPISODES, "wrong-target", seed=seed, pool=POOL), strict=True):
            target = old.info["target"]
            wrong = new.demonstrations[target].answer
            assert wrong not in (*old.demonstrations[target].answers, *old.query.answers)
            assert answer_type(wrong) == answer_type(old.demonstrations[target].answer)
            others = [place for place in range(4) if place != target]
            assert [new.demonstrations[p] for p in others] == [old.demonstrations[p] for p in others]
    with pytest.raises(UsageError, match=r"e0 has no demonstration that alone .* 'sole'"):
        perturb([Episode("e0", tuple(POOL[:2]), POOL[3])], "wrong-target", pool=POOL)


def test_a_planted_answer_is_given_by_nobody_else():
    pool = [*POOL, Example("other", (), "What colour?", ("mauve",)), Example("more", (), "How many?", ("44",))]
    episodes = [Episode("e", (POOL[0], POOL[1], POOL[3]), POOL[6]), Episode("f", (POOL[4], POOL[1]), POOL[7])]
    places = set()
    for seed in range(30):
        for old, new in zip(episodes, perturb(episodes, "planted-answer", seed=seed, pool=pool), strict=True):
            place, answer = new.info["planted"]["demonstration"], new.info["planted"]["answer"]
            places.add(place)
            assert new.demonstrations[place].answers == (answer,)
            assert answer not in [a for x in old.examples for a in x.answers]
            assert [x.answer for i, x in enumerate(new.demonstrations) if i != place] == [
                x.answer for i, x in enumerate(old.demonstrations) if i != place
            ]
    assert len(places) > 1
    with pytest.raises(UsageError, match="no answer of the type 'yes/no' is left"):
        perturb([Episode("e", (POOL[2], POOL[5]), POOL[8])], "planted-answer", pool=POOL)
    with pytest.raises(UsageError, match="no demonstration in which"):
        perturb([Episode("e", (), POOL[8])], "planted-answer", pool=POOL)


def test_the_episodes_own_labels_and_other_symbols():
    episode = Episode("e", (POOL[0], POOL[3]), POOL[0], info={"label_set": ["green", "red", "blue"]})
    for seed in range(10):
        [changed] = perturb([episode], "abstract-labels", seed=seed, symbols=("dax", "wug", "fep", "toma"))
        meaning = changed.info["mapping"]
        assert sorted(meaning.values()) == ["blue", "green", "red"]
        assert list(meaning) == changed.info["label_set"]
        assert set(meaning) <= {"dax", "wug", "fep", "toma"}
        for old, new in zip(episode.examples, changed.examples, strict=True):
            assert meaning[new.answer] == old.answer
        [stated] = perturb([episode], "stated-labels", seed=seed)
        words = ", ".join(f"{symbol} for {label}" for symbol, label in stated.info["mapping"].items())
        assert stated.query.question == f"Answer with {words}. What colour?"
        assert stated.demonstrations[0].question == "What colour?"
    with pytest.raises(UsageError, match="3 labels, but there are 2 symbols"):
        perturb([episode], "abstract-labels", symbols=("a", "b"))


def test_another_question_of_the_same_type():
    for episode in perturb(EPISODES, "other-question", seed=1, pool=POOL):
        old = next(e for e in EPISODES if e.id == episode.id)
        asked = [x for x in POOL if x.question == episode.query.question]
        assert episode.query.question != old.query.question
        assert any(answer_type(x.answer) == answer_type(old.query.answer) for x in asked)
        assert episode.query.images == old.query.images
    with pytest.raises(UsageError, match="no other question than 'What colour"):
        perturb([Episode("e", (), POOL[0])], "other-question")


def test_what_the_query_alone_says_or_shows_is_never_taken():
    query = Example("query", (picture(99),), "What colour?", ("gold",))
    twin = Example("twin", query.images, "How many?", ("7",))
    given = [Episode("e", tuple(POOL[:4]), query)]
    for seed in range(40):
        [wrong] = perturb(given, "wrong-answers", seed=seed, pool=[*POOL, query])
        assert "gold" not in [x.answer for x in wrong.demonstrations]
        [image] = perturb(given, "mismatched-image", seed=seed, pool=[*POOL[:6], query, twin])
        assert all(x.images != query.images for x in image.demonstrations)


def test_another_spelling_is_no_other_answer():
    own = Example("own", (), "What animal?", ("cat", "kitten"))
    others = [Example("a", (), "What animal?", ("a cat",)), Example("b", (), "What animal?", ("Kitten.",))]
    dog = Example("d", (), "What animal?", ("dog",))
    for name in ("wrong-answers", "mismatched-answer"):
        for seed in range(20):
            [changed] = perturb([Episode("e", (own,), POOL[0])], name, seed=seed, pool=[own, *others, dog])
            assert changed.demonstrations[0].answers == ("dog",)
        with pytest.raises(UsageError, match="give a larger pool"):
            perturb([Episode("e", (own,), POOL[0])], name, pool=[own, *others])
    people = Example("p", (), "Is it big?", ("yes",) * 7 + ("no",) * 3, {"annotated": True})
    [changed] = perturb([Episode("e", (people,), POOL[0])], "wrong-answers", pool=POOL)
    assert changed.demonstrations[0] == Example("p", (), "Is it big?", ("no",))


def test_what_cannot_be_changed_is_left_out_if_asked():
    given = [Episode("yes", (POOL[2], POOL[5]), POOL[8]), Episode("colour", (POOL[0],), POOL[3])]
    assert [e.id for e in perturb(given, "planted-answer", pool=POOL, leave_out=True)] == ["colour"]


def test_the_same_change_whatever_the_number_of_shots():
    few, many = (Episode(f"{n} shots", tuple(POOL[:n]), POOL[24], "RS", 3) for n in (3, 6))
    for name in ("wrong-answers", "random-labels", "mismatched-image"):
        labels = [a for of_kind in ANSWERS for a in of_kind]
        [a], [b] = (perturb([e], name, pool=POOL, labels=labels) for e in (few, many))
        assert a.demonstrations == b.demonstrations[:3]
