"""Episodes with closed sets of labels, and the pools of the synthetic tasks."""

from __future__ import annotations

from collections import Counter

import pytest

from probe.data.example import Example
from probe.data.groups import label_groups, labelled_episodes
from probe.data.tasks import synthetic_examples
from probe.errors import UsageError


def pool() -> list[Example]:
    """Colours of unequal frequency, a yes/no question, and one that always has the same answer."""
    colours = ["red"] * 30 + ["blue"] * 20 + ["green"] * 12 + ["pink"] * 8 + ["mauve"] * 1
    return [
        *(Example(f"c{i}", (), "colour?", (colour,)) for i, colour in enumerate(colours)),
        *(Example(f"y{i}", (), "big?", (("yes", "no")[i % 2],)) for i in range(40)),
        *(Example(f"s{i}", (), "sky?", ("blue",)) for i in range(10)),
    ]


def test_groups_have_their_commonest_answers() -> None:
    groups = label_groups(pool())
    assert groups["colour?"].labels == ["red", "blue", "green", "pink"]
    assert label_groups(pool(), labels=9)["colour?"].labels[-1] == "mauve"
    assert label_groups(pool(), labels=9, shots=5)["colour?"].labels[-1] == "pink"  # mauve has none besides a query
    assert label_groups(pool(), shots=36)["colour?"].labels == ["red", "blue"]
    assert "big?" not in label_groups(pool(), shots=40)
    assert sorted(groups) == ["big?", "colour?"]  # about the sky there is one answer
    assert all(pool()[p].answer == "green" for p in groups["colour?"].members["green"])


def test_every_label_is_shown_equally_often() -> None:
    for shots in (0, 1, 3, 8, 10):
        episodes = labelled_episodes(pool(), shots=shots, n=60, seed=3)
        assert len({e.query.id for e in episodes}) == len(episodes) == 60
        for episode in episodes:
            labels = episode.info["label_set"]
            assert episode.query.answer in labels
            assert {x.question for x in episode.examples} == {episode.info["group"]}
            counts = Counter(x.answer for x in episode.demonstrations)
            assert max(counts.values(), default=0) - min((counts[x] for x in labels), default=0) <= 1
            assert len({x.id for x in episode.examples}) == shots + 1
            for block in range(0, shots - len(labels) + 1, len(labels)):
                assert {x.answer for x in episode.demonstrations[block : block + len(labels)]} == set(labels)


def test_more_shots_begin_alike_and_the_place_of_the_querys_label_is_drawn() -> None:
    few, many = (labelled_episodes(pool()[:71], shots=shots, n=40, seed=5) for shots in (8, 8))
    assert few == many
    places = Counter(next(i for i, x in enumerate(e.demonstrations) if x.answer == e.query.answer) for e in few)
    assert set(places) == {0, 1, 2, 3}


def test_other_queries_and_what_cannot_be() -> None:
    queries = [
        Example("a", (), "colour?", ("red",)),
        Example("b", (), "colour?", ("mauve",)),
        Example("c", (), "?", ("red",)),
    ]
    assert [e.query.id for e in labelled_episodes(pool(), queries, shots=2, n=9)] == ["a"]
    with pytest.raises(UsageError, match="No query belongs to a question"):
        labelled_episodes(pool(), queries[1:], shots=2, n=9)
    with pytest.raises(UsageError, match="two or more; asked for 1"):
        labelled_episodes(pool(), shots=2, n=9, labels=1)
    with pytest.raises(UsageError, match="No query belongs"):
        labelled_episodes(pool(), shots=200, n=9)


def test_a_pool_of_a_synthetic_task_and_its_twin() -> None:
    seen, read = (synthetic_examples(task, n=400, seed=2) for task in ("recognition", "recognition-text"))
    for one, twin in zip(seen, read, strict=True):
        assert (one.answers, one.info) == (twin.answers, twin.info)
        assert (len(one.images), len(twin.images)) == (1, 0)
        assert twin.question.endswith(" ?") and one.question == "?"
    assert len({x.info["group"] for x in seen}) == 8
    assert {x.info["group"] for x in synthetic_examples("vqa", n=60)} == {"colour?", "kind?", "count?", "size?"}
    assert {x.info["group"] for x in synthetic_examples("operator", n=60)} == {f"count plus {k}" for k in range(1, 6)}
    assert synthetic_examples("vqa", n=5, seed=1) == synthetic_examples("vqa", n=9, seed=1)[:5]
    twins = [labelled_episodes(x, shots=4, n=30, seed=1) for x in (seen, read)]
    assert [[x.answer for x in e.examples] for e in twins[0]] == [[x.answer for x in e.examples] for e in twins[1]]
    with pytest.raises(UsageError, match="binding-cued cannot be pooled"):
        synthetic_examples("binding-cued", n=5)
    with pytest.raises(UsageError, match="no task 'vqaa'"):
        synthetic_examples("vqaa", n=5)
