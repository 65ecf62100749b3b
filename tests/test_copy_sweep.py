"""A wrong answer that is planted more and more often, among demonstrations that are more and less alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import xarray as xr

from probe.data.choose import Space
from probe.data.example import Episode, Example
from probe.errors import UsageError
from probe.experiments import copy_sweep as module
from probe.experiments.copy_sweep import copy_sweep, plant

COLOURS = ("red", "green", "blue", "pink", "grey", "teal", "lime", "plum")


def world(n: int = 80) -> tuple[list[Example], Space]:
    rng = np.random.default_rng(0)
    pool = [Example(f"e{i}", (), ("hue?", "tint?")[i % 2], (str(rng.choice(COLOURS)),)) for i in range(n)]
    vectors = rng.normal(size=(n, 4))
    return pool, Space(vectors, vectors, "made up")


def planted(levels: tuple[float, ...] = (0, 0.5, 1), **options):
    pool, space = world()
    return pool, space, plant(pool, None, space=space, shots=3, n=20, levels=levels, seed=1, **options)


def test_levels_are_parts_of_the_ranking() -> None:
    pool, space, rows = planted()
    unit = space.pool / np.linalg.norm(space.pool, axis=1, keepdims=True)
    for nearest, middle, farthest in zip(*rows, strict=True):
        query = int(nearest.episode.query.id[1:])
        near = unit @ unit[query]
        same = [i for i in range(80) if pool[i].question == pool[query].question and i != query]
        ranked = sorted(same, key=lambda i: -near[i])
        for one, start in ((nearest, 0), (middle, round(0.5 * (len(same) - 3))), (farthest, len(same) - 3)):
            expected = ranked[start : start + 3]
            assert [x.id for x in one.episode.demonstrations] == [pool[i].id for i in expected[::-1]]
            assert one.similarity == pytest.approx(np.mean([near[i] for i in expected]), abs=1e-5)
            assert one.episode.query == nearest.episode.query
            assert one.answer == nearest.answer


def test_the_planted_answer_is_nobodys_and_spreads() -> None:
    _, _, rows = planted()
    for row in rows:
        for one in row:
            own = [x.answer for x in one.episode.demonstrations]
            assert one.answer not in [*own, *one.episode.query.answers]
            before = {i: answer for i, answer in enumerate(own)}
            for times in range(4):
                answers = [x.answer for x in one.repeated(times).demonstrations]
                changed = {i for i in before if answers[i] != before[i]}
                assert changed == set(one.order[:times])
                assert Counter(answers)[one.answer] == times
                assert one.repeated(times).query == one.episode.query


def test_a_voter_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says the commonest answer gives the planted one from two of three on, whatever is alike."""

    def answering(model: object, episodes: list[Episode], **options: object) -> xr.Dataset:
        names.append(str(options["name"]))
        said = [Counter(x.answer for x in e.demonstrations).most_common(1)[0][0] for e in episodes]
        return xr.Dataset({"prediction": ("episode", said), "correct": ("episode", [0.0] * len(said))})

    names: list[str] = []
    monkeypatch.setattr(module, "answering", answering)
    pool, space = world()
    result = copy_sweep(None, pool, space=space, shots=3, n=20, levels=(0, 1))  # type: ignore[arg-type]
    said = result["said_planted"].mean("episode").values
    assert (said[:, 0] == 0).all()
    assert (said[:, 2:] == 1).all()
    assert len(set(names)) == 8
    assert (result["similarity"].sel(level=0) > result["similarity"].sel(level=1)).all()
    assert result.attrs["encoder"] == "made up"


def test_a_question_that_few_ask_takes_the_whole_pool() -> None:
    pool, space = world(40)
    rare = [Example(x.id, (), "unique?" if i == 7 else x.question, x.answers) for i, x in enumerate(pool)]
    [row] = plant(rare, None, space=space, shots=3, n=40, levels=(0,), seed=1)
    [one] = [one for one in row if one.episode.query.id == "e7"]
    assert one.episode.shots == 3


def test_queries_that_leave_no_answer_to_plant_are_left_out() -> None:
    pool, space = world()
    mixed = [Example(x.id, (), "big?", (("yes", "no")[i // 2 % 2],)) if i % 2 else x for i, x in enumerate(pool)]
    rows = plant(mixed, None, space=space, shots=3, n=80, levels=(0, 0.3, 0.6, 1), seed=1)
    asked = {one.episode.query.question for one in rows[0]}
    assert asked == {"hue?"}
    assert {len(row) for row in rows} == {36}  # and 4 whose 12 demonstrations give all colours
    binary = [Example(x.id, (), "big?", (("yes", "no")[i // 2 % 2],)) for i, x in enumerate(pool)]
    with pytest.raises(UsageError, match="more than yes or no"):
        plant(binary, None, space=space, shots=3, n=80, levels=(0, 0.3, 0.6, 1), seed=1)


def test_what_cannot_be_planted() -> None:
    pool, space = world(3)
    with pytest.raises(UsageError, match="needs 4 demonstrations, but only 2 other"):
        copy_sweep(None, pool, space=space)  # type: ignore[arg-type]
    for options in ({"shots": 0}, {"levels": (2.0,)}, {"levels": ()}):
        with pytest.raises(UsageError, match="one shot or more, and levels are 0 to 1"):
            copy_sweep(None, pool, space=space, **options)  # type: ignore[arg-type]
