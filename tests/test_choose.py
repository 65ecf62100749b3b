"""Chosen demonstrations: never the query, never its picture; all others equally often, or the nearest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probe.data import Episode, Example
from probe.data.choose import Space, choose
from probe.data.strategies import STRATEGIES, Key, View
from probe.errors import UsageError
from probe.models.encoders import Encoder
from probe.models.spaces import embed


def texts(n: int) -> list[Example]:
    return [Example(f"e{index}", (), f"{index}?", (str(index),)) for index in range(n)]


def with_images(*images: tuple[Path | Image.Image, ...]) -> list[Example]:
    return [Example(f"e{index}", shown, f"{index}?", (str(index),)) for index, shown in enumerate(images)]


def test_each_example_is_the_query_once() -> None:
    examples = texts(12)
    episodes = choose(examples, shots=3, n=100, seed=1)
    assert sorted(episode.query.id for episode in episodes) == sorted(example.id for example in examples)
    assert [episode.query for episode in episodes] != examples
    assert len({episode.id for episode in episodes}) == 12
    for episode in episodes:
        ids = [example.id for example in episode.examples]
        assert len(set(ids)) == len(ids) == 4
        assert (episode.strategy, episode.seed) == ("RS", 1)


def test_an_episode_does_not_depend_on_how_many_there_are() -> None:
    examples = texts(20)
    many = choose(examples, shots=4, n=20, seed=3)
    assert choose(examples, shots=4, n=7, seed=3) == many[:7]
    assert choose(examples, shots=4, n=1, seed=3) == many[:1]


def test_more_shots_begin_with_the_same_demonstrations() -> None:
    examples = texts(20)
    few, many = (choose(examples, shots=shots, n=20, seed=3) for shots in (4, 9))
    assert [episode.demonstrations for episode in few] == [episode.demonstrations[:4] for episode in many]
    assert [episode.query for episode in few] == [episode.query for episode in many]


def test_seeds_differ_in_queries_and_in_demonstrations() -> None:
    examples = texts(20)
    one, two = (choose(examples, shots=4, n=20, seed=seed) for seed in (0, 1))
    assert [episode.query for episode in one] != [episode.query for episode in two]
    of_one = {episode.query: episode.demonstrations for episode in one}
    assert any(of_one[episode.query] != episode.demonstrations for episode in two)


def test_every_other_example_is_drawn_equally_often_at_every_place() -> None:
    """1,500 draws for each of 5 x 3 cells: 300 +- 15.5; a bias of a third shows, chance does not."""
    examples = texts(6)
    counts: Counter[tuple[str, int]] = Counter()
    for seed in range(1500):
        episode = next(e for e in choose(examples, shots=3, n=6, seed=seed) if e.query.id == "e0")
        counts.update((example.id, place) for place, example in enumerate(episode.demonstrations))
    assert len(counts) == 15
    assert all(abs(count - 300) < 5 * 15.5 for count in counts.values()), counts


def test_queries_come_in_random_order() -> None:
    first = Counter(choose(texts(5), shots=0, n=1, seed=seed)[0].query.id for seed in range(1000))
    assert len(first) == 5
    assert all(abs(count - 200) < 5 * 12.7 for count in first.values()), first


def test_the_querys_image_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    same = [tmp_path / "a.png", tmp_path / "below" / ".." / "a.png"]
    link = tmp_path / "link.png"
    link.symlink_to(same[0])
    other = tmp_path / "b.png"
    examples = with_images((same[0],), (same[1],), (link,), (other, same[0]), (other,), (), ())
    episodes = {
        episode.query.id: {example.id for example in episode.demonstrations}
        for episode in choose(examples, shots=2, n=7, seed=0)
    }
    assert episodes["e3"] == {"e5", "e6"}  # two images, either of which rules out an example
    for seed in range(20):
        for episode in choose(examples, shots=2, n=7, seed=seed):
            shown = {example.id for example in episode.demonstrations}
            if episode.query.id in ("e0", "e1", "e2"):
                assert not shown & {"e0", "e1", "e2", "e3"}
            if episode.query.id == "e4":
                assert "e3" not in shown


def test_the_same_pixels_in_memory_are_the_same_image() -> None:
    red, red_too, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "red", "blue"))
    examples = with_images((red,), (red_too,), (blue,))
    for seed in range(20):
        for episode in choose(examples, shots=1, n=3, seed=seed):
            if episode.query.id != "e2":
                assert episode.demonstrations[0].id == "e2"


def test_too_few_without_the_querys_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    examples = with_images((path,), (path,), (path,), ())
    with pytest.raises(UsageError, match=r"'e[012]' needs 2 demonstrations, but only 1 "):
        choose(examples, shots=2, n=4, seed=0)
    assert len(choose(examples, shots=1, n=4, seed=0)) == 4


def test_as_many_shots_as_possible() -> None:
    for episode in choose(texts(4), shots=3, n=4, seed=0):
        assert {example.id for example in episode.examples} == {"e0", "e1", "e2", "e3"}
    with pytest.raises(UsageError, match="4 shots need 4 examples besides the query, but there are 3"):
        choose(texts(4), shots=4, n=1, seed=0)
    with pytest.raises(UsageError, match="no example to ask about"):
        choose([], shots=0, n=1, seed=0)


@pytest.mark.parametrize(("shots", "n", "seed"), [(-1, 1, 0), (1, 0, 0), (1, -3, 0), (1, 1, -1)])
def test_numbers_out_of_range(shots: int, n: int, seed: int) -> None:
    with pytest.raises(UsageError, match=f"asked for {shots}, {n} and {seed}"):
        choose(texts(4), shots=shots, n=n, seed=seed)


# ----------------------------------------------------------------------------------------------------- by similarity


def naive(values: np.ndarray, query: np.ndarray) -> list[float]:
    """Cosines, one by one."""
    return [float(v @ query / (np.linalg.norm(v) * np.linalg.norm(query))) for v in values]


@pytest.fixture(scope="module")
def world() -> tuple[list[Example], dict[Key, Space]]:
    """Sixty examples, two questions about each of thirty images, and unequal vectors of all."""
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (2, 2), (index, 0, 0)) for index in range(30)]
    answers = ("red", "blue", "green", "A dog.")
    pool = [Example(f"e{i}", (images[i // 2],), f"q{i}", (answers[i % 4],)) for i in range(60)]
    seen = np.repeat(rng.normal(size=(30, 5)), 2, axis=0)
    values: dict[Key, np.ndarray] = {
        "image": seen,
        "question": rng.normal(size=(60, 4)),
        "question+answer": rng.normal(size=(60, 3)),
    }
    return pool, {key: Space(value, value, f"{key} encoder") for key, value in values.items()}


def places(episode: Episode) -> list[int]:
    return [int(example.id[1:]) for example in episode.demonstrations]


@pytest.mark.parametrize(("strategy", "key"), [("SI", "image"), ("SQ", "question"), ("SQA", "question+answer")])
def test_the_nearest_are_the_nearest(world: Any, strategy: str, key: Key) -> None:
    pool, spaces = world
    for episode in choose(pool, strategy=strategy, shots=5, seed=2, order="similar-first", spaces=spaces):
        query = int(episode.query.id[1:])
        near = naive(spaces[key].pool, spaces[key].queries[query])
        allowed = [i for i in range(60) if i // 2 != query // 2]
        assert [near[i] for i in places(episode)] == pytest.approx(sorted((near[i] for i in allowed), reverse=True)[:5])
        assert episode.info["similarity"][key] == pytest.approx([near[i] for i in places(episode)], abs=1e-6)
        assert episode.info["encoders"] == {key: f"{key} encoder"}
        assert len(set(places(episode))) == 5


def test_the_order_is_as_asked_and_written_down(world: Any) -> None:
    pool, spaces = world
    first, last, mixed = (
        choose(pool, strategy="SQ", shots=6, seed=2, order=order, spaces=spaces)
        for order in ("similar-first", "similar-last", "random")
    )
    for a, b, c in zip(first, last, mixed, strict=True):
        assert places(a) == places(b)[::-1]
        assert sorted(places(c)) == sorted(places(a))
        assert [e.info["order"] for e in (a, b, c)] == ["similar-first", "similar-last", "random"]
        at = c.info["similarity"]["question"]
        assert sorted(at, reverse=True) == a.info["similarity"]["question"]
    assert any(places(c) not in (places(a), places(b)) for a, b, c in zip(first, last, mixed, strict=True))
    default = choose(pool, strategy="SQ", shots=6, seed=2, spaces=spaces)
    assert [places(e) for e in default] == [places(e) for e in last]


def test_all_strategies_ask_the_same_queries(world: Any) -> None:
    pool, spaces = world
    queries = {
        name: [e.query.id for e in choose(pool, strategy=name, shots=2, n=20, seed=4, spaces=spaces)]
        for name in STRATEGIES
        if not STRATEGIES[name].alone and name != "SQPA"
    }
    assert len(queries) == 10
    assert all(asked == queries["RS"] for asked in queries.values())


@pytest.mark.parametrize(("strategy", "first", "then"), [("SI-Q", "image", "question"), ("SQ-I", "question", "image")])
def test_the_first_criterion_leaves_candidates_to_the_second(world: Any, strategy: str, first: Key, then: Key) -> None:
    pool, spaces = world
    for episode in choose(pool, strategy=strategy, shots=3, candidates=8, seed=2, order="similar-first", spaces=spaces):
        query = int(episode.query.id[1:])
        allowed = [i for i in range(60) if i // 2 != query // 2]
        by_first, by_then = (naive(spaces[key].pool, spaces[key].queries[query]) for key in (first, then))
        left = sorted(allowed, key=lambda i: -round(by_first[i], 6))[:8]  # no tie across the eighth
        assert set(places(episode)) <= set(left)
        assert [by_then[i] for i in places(episode)] == pytest.approx(
            sorted((by_then[i] for i in left), reverse=True)[:3]
        )
    with pytest.raises(UsageError, match="9 shots cannot be chosen among 8 candidates"):
        choose(pool, strategy=strategy, shots=9, candidates=8, spaces=spaces)


def test_questions_about_the_nearest_images(world: Any) -> None:
    pool, spaces = world
    options: Any = {"shots": 4, "seed": 1, "order": "similar-first", "spaces": spaces}
    one, two = (choose(pool, strategy=name, candidates=5, **options) for name in ("SI-1", "SI-2"))
    for a, b in zip(one, two, strict=True):
        query = int(a.query.id[1:])
        image, question = (naive(spaces[key].pool, spaces[key].queries[query]) for key in ("image", "question"))
        near = sorted((i for i in range(30) if i != query // 2), key=lambda i: -image[2 * i])
        assert places(a) == sorted((j for i in near[:5] for j in (2 * i, 2 * i + 1)), key=lambda j: -question[j])[:4]
        assert places(b) == [max((2 * i, 2 * i + 1), key=lambda j: question[j]) for i in near[:4]]


def test_mixed_similarity_and_taking_turns(world: Any) -> None:
    pool, spaces = world
    options: Any = {"shots": 4, "seed": 1, "order": "similar-first", "spaces": spaces}
    mean, turns = (choose(pool, strategy=name, **options) for name in ("SI+SQ", "SI/SQ"))
    for a, b in zip(mean, turns, strict=True):
        query = int(a.query.id[1:])
        image, question = (naive(spaces[key].pool, spaces[key].queries[query]) for key in ("image", "question"))
        allowed = [i for i in range(60) if i // 2 != query // 2]
        assert places(a) == sorted(allowed, key=lambda i: -(image[i] + question[i]))[:4]
        taken: list[int] = []
        for near in (image, question, image, question):
            best = sorted((i for i in allowed if i not in taken), key=lambda i: -round(near[i], 6))
            taken += [place for place in [places(b)[len(taken)]] if near[place] == pytest.approx(near[best[0]])]
        assert taken == places(b)


def test_no_image_twice_if_asked(world: Any) -> None:
    pool, spaces = world
    for name in ("RS", "SI", "SQ", "SI+SQ"):
        options: Any = {"strategy": name, "shots": 20, "seed": 1, "spaces": spaces}
        assert any(len({i // 2 for i in places(e)}) < 20 for e in choose(pool, **options))
        assert all(len({i // 2 for i in places(e)}) == 20 for e in choose(pool, distinct_images=True, **options))
    with pytest.raises(UsageError, match="only 29 other examples with images of their own"):
        choose(pool, shots=30, distinct_images=True)


def test_equally_near_examples_are_taken_by_chance() -> None:
    pool = texts(40)
    same = np.ones((40, 3))
    taken: Counter[str] = Counter()
    for seed in range(200):
        for episode in choose(pool, strategy="SQ", shots=4, n=1, seed=seed, spaces={"question": Space(same, same, "")}):
            taken.update(example.id for example in episode.demonstrations)
    assert len(taken) == 40
    assert max(taken.values()) < 45  # 20 expected, standard deviation 4.3


def test_a_large_pool_is_sorted_as_a_small_one() -> None:
    """More than is sorted at once, with ties across the cut."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, 9000).astype(float)
    view = View(
        query=texts(1)[0],
        pool=range(9000),  # type: ignore[arg-type]
        shown=None,  # type: ignore[arg-type]
        taken=set(),
        similarity={},
        rng=rng,
        distinct=False,
        candidates=0,
    )
    order = list(view.ranked(scores))
    assert sorted(order) == list(range(9000))
    assert scores[order].tolist() == sorted(scores.tolist(), reverse=True)
    assert order[:50] != sorted(order[:50])


def test_only_one_gives_the_answer(world: Any) -> None:
    pool, spaces = world
    key: Key = "question+answer"
    for shots in (1, 5):
        options: Any = {"shots": shots, "seed": 1, "order": "similar-first", "spaces": spaces}
        sole, wrong = (choose(pool, strategy=name, **options) for name in ("sole", "sole-wrong"))
        assert len(sole) == 60
        for episode, changed in zip(sole, wrong, strict=True):
            query = int(episode.query.id[1:])
            near = naive(spaces[key].pool, spaces[key].queries[query])
            allowed = [i for i in range(60) if i // 2 != query // 2]
            gives = [i for i in allowed if i % 4 == query % 4]
            best = max(gives, key=lambda i: near[i])
            target = episode.info["target"]
            assert places(episode)[target] == best
            others = sorted((i for i in allowed if i % 4 != query % 4), key=lambda i: -near[i])[: shots - 1]
            assert places(episode) == sorted([best, *others], key=lambda i: -near[i])
            assert changed.demonstrations[target].answer not in episode.query.answers
            assert changed.perturbations == ("wrong-target (seed 1)",)
            same = [i for i in range(shots) if i != target]
            assert [changed.demonstrations[i] for i in same] == [episode.demonstrations[i] for i in same]


def test_queries_whose_answer_nobody_gives_are_left_out(world: Any) -> None:
    pool, spaces = world
    queries = [Example("a", (), "q?", ("A DOG",)), Example("b", (), "q?", ("mauve",))]
    space = spaces["question+answer"]
    given: dict[Key, Space] = {"question+answer": Space(space.pool, np.ones((2, 3)), "")}
    episodes = choose(pool, queries, strategy="sole", shots=3, spaces=given)
    assert [episode.query.id for episode in episodes] == ["a"]
    assert episodes[0].demonstrations[episodes[0].info["target"]].answer == "A dog."
    with pytest.raises(UsageError, match="sole needs a demonstration"):
        choose(pool, queries, strategy="sole", shots=0, spaces=given)


def test_one_alone_where_no_image_may_stand_twice() -> None:
    """What is passed over blocks no image: the only one that gives the answer shares its image with a better one."""
    shared, other = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    pool = [Example("a", (shared,), "q", ("x",)), Example("b", (shared,), "q", ("wanted",))]
    pool += [Example("c", (other,), "q", ("y",))]
    near = np.array([[1, 0.1], [1, 0.3], [1, 0.2]])
    given: dict[Key, Space] = {"question+answer": Space(near, np.array([[1.0, 0.0]]), "")}
    query = Example("query", (), "q", ("wanted",))
    for shots, ids in ((1, {"b"}), (2, {"a", "c"})):
        options: Any = {"strategy": "sole", "shots": shots, "spaces": given, "distinct_images": True}
        episodes = choose(pool, [query], **options)
        assert [{x.id for x in e.demonstrations} for e in episodes] == ([ids] if shots == 1 else [])


def test_yes_and_no_that_annotators_disagree_on_have_a_wrong_answer() -> None:
    people = ("yes",) * 8 + ("no",) * 2
    pool = [Example(f"e{i}", (), f"q{i}", people if i % 2 else ("no",) * 10) for i in range(12)]
    values = np.random.default_rng(0).normal(size=(12, 3))
    spaces: dict[Key, Space] = {"question+answer": Space(values, values, "")}
    for episode in choose(pool, strategy="sole-wrong", shots=1, spaces=spaces):
        assert {episode.query.answer, episode.demonstrations[0].answer} == {"yes", "no"}


def test_queries_of_their_own(world: Any) -> None:
    pool, spaces = world
    queries = [pool[7], Example("new", (pool[10].images[0],), "q?", ("red",)), Example("e3", (), "elsewhere", ("x",))]
    values = spaces["question"].pool
    given: dict[Key, Space] = {"question": Space(values, values[[7, 11, 3]], "")}
    for seed in range(5):
        for episode in choose(pool, queries, strategy="SQ", shots=50, seed=seed, spaces=given):
            shown = set(places(episode))
            left_out = {"e7": {6, 7}, "new": {10, 11}, "e3": set()}[episode.query.id]
            assert not shown & left_out
    [episode] = choose(pool, queries[2:], strategy="RS", shots=60)
    assert len(places(episode)) == 60


def test_sparse_vectors_and_vectors_of_zeros() -> None:
    from scipy.sparse import csr_matrix

    values = np.array([[1.0, 0], [2, 0.1], [0, 1], [0, 0]])
    for made in (values, csr_matrix(values)):
        episodes = choose(
            texts(4), strategy="SQ", shots=3, order="similar-first", spaces={"question": Space(made, made, "")}
        )
        [of_first] = [places(e) for e in episodes if e.query.id == "e0"]
        assert of_first[0] == 1
        assert sorted(of_first[1:]) == [2, 3]


def test_what_cannot_be_chosen(world: Any) -> None:
    pool, spaces = world
    with pytest.raises(UsageError, match=r"no strategy 'SX'; .*SI"):
        choose(pool, strategy="SX", shots=1)
    with pytest.raises(UsageError, match="no order 'last'"):
        choose(pool, shots=1, order="last")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="SI-Q compares by question; give vectors"):
        choose(pool, strategy="SI-Q", shots=1, spaces={"image": spaces["image"]})
    with pytest.raises(UsageError, match="of 60 pool examples and 60 queries, but there are 60 and 1"):
        choose(pool, pool[:1], strategy="SI", shots=1, spaces=spaces)


def test_pseudo_answers_are_no_true_ones(world: Any) -> None:
    pool, spaces = world
    true = spaces["question+answer"]
    pseudo: dict[Key, Space] = {"question+answer": replace(true, pseudo_answers=[f"said {i}" for i in range(60)])}
    one = choose(pool, strategy="SQPA", shots=3, n=10, spaces=pseudo)
    other = choose(pool, strategy="SQA", shots=3, n=10, spaces=spaces)
    assert [e.demonstrations for e in one] == [e.demonstrations for e in other]
    assert all(e.info["pseudo_answer"] == f"said {e.query.id[1:]}" for e in one)
    assert "pseudo_answer" not in other[0].info
    with pytest.raises(UsageError, match="SQPA compares the queries' pseudo answers"):
        choose(pool, strategy="SQPA", shots=3, spaces=spaces)
    with pytest.raises(UsageError, match="sole compares the queries' true answers"):
        choose(pool, strategy="sole", shots=3, spaces=pseudo)


def test_a_second_round_keeps_the_order_of_the_first(world: Any) -> None:
    pool, _ = world
    first = choose(pool, pool[:20], shots=2, n=8, seed=3)
    second = choose(pool, [e.query for e in first], shots=2, n=8, seed=3, shuffle=False)
    assert [(e.id, e.query, e.demonstrations) for e in second] == [(e.id, e.query, e.demonstrations) for e in first]


def test_vectors_are_embedded_for_what_is_compared() -> None:
    examples = [Example(f"e{i}", (), f"q{i}", (f"a{i}",)) for i in range(3)]
    read: list[list[str]] = []

    def encode(texts: Any) -> np.ndarray:
        read.append(list(texts))
        return np.ones((len(texts), 2), dtype=np.float32)

    texts = Encoder("stub", None, encode)
    space = embed(examples, strategies=["SQPA"], texts=texts, pseudo_answers={"e0": "x", "e1": "y", "e2": "z"})
    assert read == [["q0 a0", "q1 a1", "q2 a2"], ["q0 x", "q1 y", "q2 z"]]
    assert space["question+answer"].pseudo_answers == ["x", "y", "z"]
    with pytest.raises(UsageError, match="none for the query 'e1'"):
        embed(examples, strategies=["SQPA"], texts=texts, pseudo_answers={"e0": "x"})
    with pytest.raises(UsageError, match="SQPA compares pseudo answers and SQA true ones"):
        embed(examples, strategies=["SQA", "SQPA"], texts=texts, pseudo_answers={})
    with pytest.raises(UsageError, match="SI compares by image; give an encoder of images"):
        embed(examples, strategies=["SI"], texts=texts)
    with pytest.raises(UsageError, match="'e0' has no image, but SI compares images"):
        embed(examples, strategies=["SI"], images=Encoder("stub", encode, None))
    with pytest.raises(UsageError, match="stub cannot read"):
        embed(examples, strategies=["SQ"], texts=Encoder("stub", encode, None))


def test_several_images_count_alike() -> None:
    red, blue = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    lengths = {"red": 1.0, "blue": 100.0}

    def encode(pictures: Any) -> np.ndarray:
        return np.array([[lengths["red"], 0] if p is red else [0, lengths["blue"]] for p in pictures], np.float32)

    space = embed(with_images((red, blue), (red,)), strategies=["SI"], images=Encoder("stub", encode, None))["image"]
    np.testing.assert_allclose(space.pool, [[0.5, 0.5], [1, 0]])
