"""Random demonstrations: never the query, never its picture, all others equally often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from probe.data import Example
from probe.data.choose import random_episodes
from probe.errors import UsageError


def texts(n: int) -> list[Example]:
    return [Example(f"e{index}", (), f"{index}?", (str(index),)) for index in range(n)]


def with_images(*images: tuple[Path | Image.Image, ...]) -> list[Example]:
    return [Example(f"e{index}", shown, f"{index}?", (str(index),)) for index, shown in enumerate(images)]


def test_each_example_is_the_query_once() -> None:
    examples = texts(12)
    episodes = random_episodes(examples, shots=3, n=100, seed=1)
    assert sorted(episode.query.id for episode in episodes) == sorted(example.id for example in examples)
    assert [episode.query for episode in episodes] != examples
    assert len({episode.id for episode in episodes}) == 12
    for episode in episodes:
        ids = [example.id for example in episode.examples]
        assert len(set(ids)) == len(ids) == 4
        assert (episode.strategy, episode.seed) == ("random", 1)


def test_an_episode_does_not_depend_on_how_many_there_are() -> None:
    examples = texts(20)
    many = random_episodes(examples, shots=4, n=20, seed=3)
    assert random_episodes(examples, shots=4, n=7, seed=3) == many[:7]
    assert random_episodes(examples, shots=4, n=1, seed=3) == many[:1]


def test_more_shots_begin_with_the_same_demonstrations() -> None:
    examples = texts(20)
    few, many = (random_episodes(examples, shots=shots, n=20, seed=3) for shots in (4, 9))
    assert [episode.demonstrations for episode in few] == [episode.demonstrations[:4] for episode in many]
    assert [episode.query for episode in few] == [episode.query for episode in many]


def test_seeds_differ_in_queries_and_in_demonstrations() -> None:
    examples = texts(20)
    one, two = (random_episodes(examples, shots=4, n=20, seed=seed) for seed in (0, 1))
    assert [episode.query for episode in one] != [episode.query for episode in two]
    of_one = {episode.query: episode.demonstrations for episode in one}
    assert any(of_one[episode.query] != episode.demonstrations for episode in two)


def test_every_other_example_is_drawn_equally_often_at_every_place() -> None:
    """1,500 draws for each of 5 x 3 cells: 300 +- 15.5; a bias of a third shows, chance does not."""
    examples = texts(6)
    counts: Counter[tuple[str, int]] = Counter()
    for seed in range(1500):
        episode = next(e for e in random_episodes(examples, shots=3, n=6, seed=seed) if e.query.id == "e0")
        counts.update((example.id, place) for place, example in enumerate(episode.demonstrations))
    assert len(counts) == 15
    assert all(abs(count - 300) < 5 * 15.5 for count in counts.values()), counts


def test_queries_come_in_random_order() -> None:
    first = Counter(random_episodes(texts(5), shots=0, n=1, seed=seed)[0].query.id for seed in range(1000))
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
        for episode in random_episodes(examples, shots=2, n=7, seed=0)
    }
    assert episodes["e3"] == {"e5", "e6"}  # two images, either of which rules out an example
    for seed in range(20):
        for episode in random_episodes(examples, shots=2, n=7, seed=seed):
            shown = {example.id for example in episode.demonstrations}
            if episode.query.id in ("e0", "e1", "e2"):
                assert not shown & {"e0", "e1", "e2", "e3"}
            if episode.query.id == "e4":
                assert "e3" not in shown


def test_the_same_pixels_in_memory_are_the_same_image() -> None:
    red, red_too, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "red", "blue"))
    examples = with_images((red,), (red_too,), (blue,))
    for seed in range(20):
        for episode in random_episodes(examples, shots=1, n=3, seed=seed):
            if episode.query.id != "e2":
                assert episode.demonstrations[0].id == "e2"


def test_too_few_without_the_querys_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    examples = with_images((path,), (path,), (path,), ())
    with pytest.raises(UsageError, match=r"'e[012]' needs 2 demonstrations, but only 1 "):
        random_episodes(examples, shots=2, n=4, seed=0)
    assert len(random_episodes(examples, shots=1, n=4, seed=0)) == 4


def test_as_many_shots_as_possible() -> None:
    for episode in random_episodes(texts(4), shots=3, n=4, seed=0):
        assert {example.id for example in episode.examples} == {"e0", "e1", "e2", "e3"}
    with pytest.raises(UsageError, match="4 shots and a query need 5 examples, but there are 4"):
        random_episodes(texts(4), shots=4, n=1, seed=0)
    with pytest.raises(UsageError, match="need 1 examples, but there are 0"):
        random_episodes([], shots=0, n=1, seed=0)


@pytest.mark.parametrize(("shots", "n", "seed"), [(-1, 1, 0), (1, 0, 0), (1, -3, 0), (1, 1, -1)])
def test_numbers_out_of_range(shots: int, n: int, seed: int) -> None:
    with pytest.raises(UsageError, match=f"asked for {shots}, {n} and {seed}"):
        random_episodes(texts(4), shots=shots, n=n, seed=seed)
