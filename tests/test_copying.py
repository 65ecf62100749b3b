"""Copying where the truth is planted: copiers, voters, oracles, and those who answer by chance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import xarray as xr
from PIL import Image

import probe
from probe.data.example import Episode, Example
from probe.errors import UsageError
from probe.experiments import answering as answering_module
from probe.experiments.copy_rate import copy_rate
from probe.measures.copy_summary import summarise_copying
from probe.measures.copying import NOWHERE, copying

WORDS = ("red", "green", "blue", "pink")


def test_by_hand() -> None:
    found = copying(
        ["Two", "dog.", "cat", "no", "x"],
        [["2", "3", "2"], ["a dog", "cat", "cat"], ["dog", "cat"], [], ["y", "z"]],
        [["2"], ["cat"], ["cat", "kitten"], ["no"], ["z"]],
    )
    assert found.copied.tolist() == [True, True, True, False, False]
    assert found.gold_shown.tolist() == [True, True, True, False, True]
    assert found.right.tolist() == [True, False, True, True, False]
    assert found.harmful.tolist() == [False, True, False, False, False]
    assert found.place.tolist() == [NOWHERE, 0, 1, NOWHERE, NOWHERE]
    assert found.null.tolist() == [0, 1 / 4, 1 / 4, 0, 0]
    assert found.majority == ["2", "cat", "cat", "", "z"]  # a tie goes to the nearest


def test_null_is_the_mean_over_other_queries_sets() -> None:
    rng = np.random.default_rng(0)
    said = rng.choice(WORDS, 30).tolist()
    shown = [rng.choice(WORDS, rng.integers(0, 5)).tolist() for _ in range(30)]
    expected = [np.mean([said[i] in shown[j] for j in range(30) if j != i]) for i in range(30)]
    np.testing.assert_allclose(copying(said, shown, [["red"]] * 30).null, expected)
    assert np.isnan(copying(["red"], [["red"]], [["red"]]).null).all()
    # Sets that show the query itself are left out: they have its answer because of it.
    shows = [{int(other)} for other in rng.integers(0, 30, 30)]
    expected = [np.mean([said[i] in shown[j] for j in range(30) if j != i and i not in shows[j]]) for i in range(30)]
    np.testing.assert_allclose(copying(said, shown, [["red"]] * 30, shows).null, expected)


def test_an_oracle_among_unlike_answers_has_no_excess_in_its_own_pool(answers_as) -> None:
    """A hundred answers, each once: another's demonstrations can give a query's answer by showing it alone."""
    unlike = [Example(f"e{i}", (), "which?", (f"word{i}",), {"truth": f"word{i}"}) for i in range(100)]
    result = answers_as("oracle", probe.choose(unlike, shots=4, seed=0), counterfactual=False)
    assert rates(result)["excess"][0] == 0


# ------------------------------------------------------------------------------------ through the whole experiment


@dataclass
class Says:
    """Stands in for a model: what it says is a function of the episode."""

    rule: str
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __call__(self, episode: Episode) -> str:
        shown = [example.answer for example in episode.demonstrations]
        if self.rule == "last":
            return shown[-1]
        if self.rule == "second":
            return shown[1]
        if self.rule == "oracle":
            return str(episode.query.info["truth"])
        return str(self.rng.choice(WORDS))  # by chance


@pytest.fixture
def answers_as(monkeypatch: pytest.MonkeyPatch):
    """Run copy_rate with a rule in place of a model's forward; all else is real."""

    def run(rule: str, episodes: list[Episode], **options: object) -> xr.Dataset:
        says = Says(rule)

        def generate(model: object, batch: list[Episode], *, max_new_tokens: int) -> list[str]:
            return [says(episode) for episode in batch]

        class Stub:
            name, fingerprint, origin, dtype, attention_implementation, prompt, caveat = "stub", "", "", "", "", "", ""
            family = type("Family", (), {"name": "stub", "like_images": False})
            tokenizer = staticmethod(lambda texts, add_special_tokens: {"input_ids": [[0] for _ in texts]})

            def unknown_words(self, episodes: object) -> tuple[int, int]:
                return 0, 1

            def encode(self, episode: Episode, images: object) -> Episode:
                return episode

            def batch(self, episodes: list[Episode], *, with_answer: bool) -> list[Episode]:
                return episodes

        monkeypatch.setattr(answering_module, "generate", generate)
        return copy_rate(Stub(), episodes, **options)  # type: ignore[arg-type]

    return run


def pool(n: int = 400) -> list[Example]:
    rng = np.random.default_rng(1)
    words = rng.choice(WORDS, n, p=(0.5, 0.25, 0.15, 0.1)).tolist()
    return [Example(f"e{i}", (), "colour?", (word,), {"truth": word}) for i, word in enumerate(words)]


def rates(result: xr.Dataset, group: int = 0) -> dict[str, list[float]]:
    summary = summarise_copying(result)
    return {str(m): summary["rate"].isel(group=group).sel(measure=m).values.tolist() for m in summary["measure"].values}


def retrieved(shots: int = 3) -> list[Episode]:
    """Every demonstration of the query's own answer, as retrieval by question and answer would have it."""
    examples = pool()
    return [
        Episode(f"e{i}", tuple([x for x in examples if x.answer == q.answer and x is not q][:shots]), q, "SQA")
        for i, q in enumerate(examples[:120])
    ]


def test_a_copier_of_the_last(answers_as) -> None:
    result = answers_as("last", probe.choose(pool(), shots=4, n=300, seed=1))
    found = rates(result)
    assert found["copy_rate"][0] == 1
    assert found["excess"][0] == pytest.approx(1 - found["null"][0])
    assert found["excess"][1] > 0.2
    # Whether its demonstration was changed or another, it says what stands last: one planting in four shows.
    last = result["planted_place"].values == 3
    assert 0.1 < last.mean() < 0.4
    np.testing.assert_array_equal(
        result["planted_after"].values[~np.isnan(result["planted_after"])] == 1,
        last[~np.isnan(result["planted_after"])],
    )
    summary = summarise_copying(result)
    profile = summary["profile"].isel(group=0).sel(end="estimate").values
    assert profile.tolist() == [0, 0, 0, 1]
    assert int(summary["n_profile"][0]) == int((result["place"] == 3).sum()) > 30


def test_a_copier_of_the_only_demonstration_is_wholly_counterfactual(answers_as) -> None:
    result = answers_as("last", probe.choose(pool(), shots=1, n=200, seed=1))
    found = rates(result)
    assert found["copy_rate"][0] == found["counterfactual"][0] == 1
    assert found["counterfactual"][1] > 0.97
    assert found["copied_if_wrong"][0] == 1
    assert found["harmful"][0] == pytest.approx(1 - found["accuracy"][0])
    assert found["majority"] == found["accuracy"]  # a vote of one


def test_an_oracle_never_copies(answers_as) -> None:
    by_chance = answers_as("oracle", probe.choose(pool(), shots=4, n=400, seed=2))
    found = rates(by_chance)
    assert found["copy_rate"][0] > 0.7  # which looks like copying
    assert found["excess"][1] < 0 < found["excess"][2]
    assert abs(found["excess"][0]) < 0.05
    for result in (by_chance, answers_as("oracle", retrieved())):
        found = rates(result)
        assert found["harmful"][0] == 0
        assert found["counterfactual"][0] == 0
        assert found["accuracy"][0] == 1
    assert found["copy_rate"][0] == found["gold_shown"][0] == 1
    assert np.isnan(found["null"]).all()
    assert np.isnan(found["excess"]).all()


def test_the_interval_of_the_excess_covers_nothing_as_often_as_it_should(answers_as) -> None:
    """Answers by chance, whatever the demonstrations: excess 0, in the interval in 95 % of runs."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        said = rng.choice(WORDS, 80).tolist()
        shown = [rng.choice(WORDS, 2).tolist() for _ in range(80)]
        found = copying(said, shown, [["red"]] * 80)
        interval = probe_stats(found.copied - found.null)
        covered += interval[0] <= 0 <= interval[1]
    assert covered >= 52


def probe_stats(values: np.ndarray) -> tuple[float, float]:
    from probe.stats import mean_interval

    interval = mean_interval(values, resamples=1000)
    return interval.low, interval.high


def test_each_strategy_and_number_of_shots_by_itself(answers_as) -> None:
    one, four = (probe.choose(pool(), shots=shots, n=50, seed=1) for shots in (1, 4))
    together = answers_as("last", [*one, *four, *retrieved()])
    summary = summarise_copying(together)
    assert summary["group"].values.tolist() == ["RS, 1 shot", "RS, 4 shots", "SQA, 3 shots"]
    assert rates(together, 1) == rates(answers_as("last", four))
    assert np.isnan(summary["profile"].isel(group=0, place=2).values).all()
    assert summary["n"].sel(measure="copy_rate").values.tolist() == [50, 50, 120]


def test_where_no_answer_is_free(answers_as) -> None:
    examples = [Example(f"y{i}", (), "?", (("yes", "no")[i % 2],)) for i in range(40)]
    result = answers_as("last", probe.choose(examples, shots=4, n=20, seed=0))
    assert np.isnan(result["planted_after"]).all()
    assert np.isnan(rates(result)["counterfactual"][0])
    assert set(result["answer_type"].values.tolist()) == {"yes/no"}
    plain = answers_as("last", probe.choose(examples, shots=4, n=20, seed=0), counterfactual=False)
    assert "planted_after" not in plain
    assert np.isnan(rates(plain)["counterfactual"][0])


def test_annotators_and_types(answers_as) -> None:
    people = ("red",) * 6 + ("blue",) * 3 + ("green",)
    examples = [
        replace(x, answers=people, info={"truth": "blue", "answer_type": "hue", "annotated": True}) for x in pool(40)
    ]
    result = answers_as("oracle", probe.choose(examples, shots=2, n=20, seed=0))
    assert result["score"].values.tolist() == [pytest.approx(0.9)] * 20
    assert result["correct"].all()
    assert summarise_copying(result)["answer_type"].values.tolist() == ["hue"]


def test_where_all_annotators_agree_spelling_does_not_count() -> None:
    def example(*answers: str) -> Example:
        return Example("e", (), "?", answers, {"annotated": True})

    for said in ("Yes", "yes.", "yes"):
        assert answering_module.score(said, example(*["yes"] * 10)) == 1
    assert answering_module.score("no", example(*["yes"] * 10)) == 0
    assert answering_module.score("Yes", example(*["yes"] * 3, *["no"] * 7)) == pytest.approx(0.9)
    assert answering_module.score("red", Example("e", (), "?", ("red", "Crimson", "scarlet", "ruby"))) == 1


def test_families_that_ask_for_it_read_equally_many_images_together() -> None:
    class Model:
        family = type("Family", (), {"like_images": True})

    picture = Image.new("RGB", (2, 2))
    one = Example("one", (picture,), "?", ("x",))
    episodes = [Episode(f"e{i}", (one,) * shots, one) for i, shots in enumerate((1, 1, 1, 2, 2, 1))]
    units = [[e.id for e in unit] for unit in answering_module.units(Model(), episodes, 2)]  # type: ignore[arg-type]
    assert units == [["e0", "e1"], ["e2"], ["e3", "e4"], ["e5"]]
    Model.family.like_images = False  # type: ignore[attr-defined]
    assert [len(u) for u in answering_module.units(Model(), episodes, 4)] == [4, 2]  # type: ignore[arg-type]


def test_a_kept_part_belongs_to_its_episodes(answers_as) -> None:
    kept: dict[str, xr.Dataset] = {}

    def keep(name: str, compute):
        return kept[name] if name in kept else kept.setdefault(name, compute())

    for seed in (1, 2):
        episodes = probe.choose(pool(), shots=2, n=20, seed=seed)
        result = answers_as("last", episodes, keep=keep, counterfactual=False)
        assert result["prediction"].values.tolist() == [e.demonstrations[-1].answer for e in episodes]


def test_nothing_to_copy_from(answers_as) -> None:
    with pytest.raises(UsageError, match="no demonstrations to copy from"):
        answers_as("oracle", probe.choose(pool(), shots=0, n=5))


def test_the_toy_and_a_run_that_goes_on(tmp_path) -> None:
    """On the real model, in parts that are kept; and alone as in batches."""
    model = probe.load("toy")
    episodes = probe.synthetic_episodes("binding-cued", shots=4, n=10, seed=11)
    kept: dict[str, xr.Dataset] = {}

    def keep(name: str, compute):
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    done: list[int] = []
    first = copy_rate(model, episodes, batch_size=4, keep=keep, progress=done.append)
    assert done == [4, 8, 10, 14, 18, 20]
    assert len(kept) == 6
    again = copy_rate(model, episodes, batch_size=1)
    xr.testing.assert_equal(first.drop_attrs(), again.drop_attrs())
    xr.testing.assert_equal(first, copy_rate(model, episodes, batch_size=4, keep=lambda name, compute: kept[name]))
    assert first["copied"].mean() >= 0.9
    assert first.attrs["experiment"] == "copy_rate"
    assert "seeded in training" in first.attrs["caveat"]
