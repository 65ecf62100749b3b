"""Recognition and learning where the truth is planted, and on the bundled models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import probe
from probe.data.example import Episode, Example
from probe.data.groups import labelled_episodes
from probe.data.tasks import synthetic_examples
from probe.data.words import NONCE
from probe.errors import UsageError
from probe.experiments import task_split as module
from probe.experiments.task_split import n_readings, task_split
from probe.measures.split_summary import summarise_split

COLOURS = ("red", "green", "blue", "pink")


def episodes(n: int = 120, shots: int = 8) -> list[Episode]:
    rng = np.random.default_rng(0)
    words = rng.choice(COLOURS, 400, p=(0.4, 0.3, 0.2, 0.1)).tolist()
    pool = [Example(f"e{i}", (), "colour?", (word,), {"truth": word}) for i, word in enumerate(words)]
    return labelled_episodes(pool, shots=shots, n=n, seed=1)


def recogniser(episode: Episode, rng: np.random.Generator) -> str:
    """Knows colours and nothing else; the labels do not matter."""
    truth = str(episode.query.info["truth"])
    return truth if truth in episode.info["label_set"] else str(rng.choice(episode.info["label_set"]))


def learner(episode: Episode, rng: np.random.Generator) -> str:
    """Knows nothing; says what a demonstration of the same colour says, else guesses."""
    same = [x.answer for x in episode.demonstrations if x.info["truth"] == episode.query.info["truth"]]
    return same[-1] if same else str(rng.choice(episode.info["label_set"]))


def copier(episode: Episode, rng: np.random.Generator) -> str:
    return episode.demonstrations[-1].answer if episode.shots else "nothing"


@pytest.fixture
def split_as(monkeypatch: pytest.MonkeyPatch):
    """Run task_split with a rule in place of a model; all else is real."""

    def run(rule, given: list[Episode], **options: object) -> xr.Dataset:
        def answering(model: object, changed: list[Episode], **_: object) -> xr.Dataset:
            rng = np.random.default_rng(0)
            said = np.array([rule(episode, rng) for episode in changed])
            names = ("prediction", "choice", "choice_normalised")
            found = xr.Dataset({name: ("episode", said) for name in names}, attrs={"model": "stub"})
            return found.assign(shared_first_token=("episode", [False] * len(said)))

        monkeypatch.setattr(module, "answering", answering)
        monkeypatch.setattr(module, "check_words", lambda model, episodes: (0, 1))
        return task_split(None, given, **options)  # type: ignore[arg-type]

    return run


def test_who_only_recognises(split_as) -> None:
    summary = summarise_split(split_as(recogniser, episodes(400), shots=(0, 1, 4, 8)))
    accuracy = summary["accuracy"].sel(end="estimate")
    assert (accuracy.sel(setting=["gold", "random"]) == 1).all()
    assert (summary["corrected"].sel(setting="random", end="estimate") == 1).all()
    assert (accuracy.sel(setting="flipped") == 0).all()
    learned = summary["corrected"].sel(setting="abstract")
    assert (learned.sel(end="estimate") < 0.05).all()
    assert (summary["accuracy"].sel(setting="abstract", end="high") > 0.25).all()
    assert (summary["corrected"].sel(setting="flipped", end="high") < 0).all()


def test_who_only_learns(split_as) -> None:
    summary = summarise_split(split_as(learner, episodes(400), shots=(0, 1, 4, 8)))
    estimate = summary["corrected"].sel(end="estimate")
    assert (estimate.sel(setting=["gold", "abstract", "flipped"], shot=[4, 8]) == 1).all()
    # With one shot the answer is known where it shows the query's colour, one time in four, else guessed.
    assert float(summary["accuracy"].sel(setting="abstract", shot=1, end="estimate")) == pytest.approx(
        1 / 4 + 3 / 16, abs=0.07
    )
    assert (summary["accuracy"].sel(setting="random", shot=[4, 8], end="low") < 0.3).all()


def test_who_only_copies(split_as) -> None:
    result = split_as(copier, episodes(200), shots=(1, 8))
    summary = summarise_split(result)
    labelled = {"setting": ["gold", "random", "abstract", "flipped"], "shot": [1, 8], "end": "estimate"}
    assert (summary["wrong_copied"].sel(labelled) == 1).all()
    assert (summary["in_labels"].sel(labelled) == 1).all()
    assert (summary["corrected"].sel(setting="abstract", shot=[1, 8], end="low") < 0).all()
    assert float(summary["in_labels"].sel(setting="words", shot=0, end="estimate")) == 0


def test_guesses_by_hand(split_as) -> None:
    result = split_as(copier, episodes(100), shots=(0, 2))
    for episode in range(100):
        cell = result.isel(episode=episode)
        assert float(cell["chance"].sel(setting="gold", shot=0)) == 1 / 4
        right = str(cell["right"].sel(setting="gold", shot=0).item())
        assert float(cell["prior"].sel(setting="gold", shot=0)) == float(right == "red")
        # Which symbol the commonest label became, nobody can guess.
        assert float(cell["prior"].sel(setting="abstract", shot=2)) == 1 / 4
        assert float(cell["majority"].sel(setting="gold", shot=0)) == 1 / 4
        shown = [x.answer for x in episodes(100)[episode].demonstrations[:2]]
        assert float(cell["majority"].sel(setting="gold", shot=2)) == (right in shown) / 2
    summary = summarise_split(result)
    share = float((result["prior"].sel(setting="gold", shot=0)).mean())
    assert float(summary["guess"].sel(setting="gold", shot=0)) == pytest.approx(share)
    assert 0.3 < share < 0.5


def test_the_same_changes_at_every_number_of_shots(split_as) -> None:
    seen: dict[tuple[int, str], list[list[str]]] = {}

    def look(episode: Episode, rng: np.random.Generator) -> str:
        seen.setdefault((episode.shots, episode.perturbations[0] if episode.perturbations else ""), []).append(
            [x.answer for x in episode.demonstrations]
        )
        return "x"

    split_as(look, episodes(20), shots=(2, 8), settings=("random", "abstract", "flipped"))
    names = {name for _, name in seen}
    assert len(names) == 3
    for name in names:
        assert [labels[:2] for labels in seen[8, name]] == seen[2, name]


def test_words_are_read_without_demonstrations_only(split_as) -> None:
    result = split_as(recogniser, episodes(10), shots=(2, 4))
    assert result["shot"].values.tolist() == [0, 2, 4]
    assert result["chosen"].sel(setting="words", shot=0).notnull().all()
    assert result["chosen"].sel(setting="words", shot=[2, 4]).isnull().all()
    assert result["chosen"].sel(setting="gold", shot=0).isnull().all()
    summary = summarise_split(result)
    assert np.isnan(summary["accuracy"].sel(setting="words", shot=2)).all()
    assert int(summary["n"].sel(setting="words", shot=2)) == 0
    assert n_readings(10, ("gold", "words"), (2, 4)) == 30


def test_seeds_apart(split_as) -> None:
    given = [*episodes(30), *(replace(e, seed=7, id=e.id + "x") for e in episodes(10))]
    summary = summarise_split(split_as(recogniser, given, shots=(1,), settings=("gold",)))
    assert summary["by_seed"].dims == ("setting", "shot", "seed")
    assert summary["seed"].values.tolist() == [1, 7]


def test_what_cannot_be_split() -> None:
    with pytest.raises(UsageError, match=r"no setting 'golden'; .*gold"):
        task_split(None, episodes(2), settings=("golden",))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"has 8 demonstrations, but 16 shots are asked for"):
        task_split(None, episodes(2))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no episodes"):
        task_split(None, [])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no set of labels"):
        task_split(None, probe.synthetic_episodes("vqa", shots=1, n=1), shots=(1,))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 or more"):
        task_split(None, episodes(2), shots=(-1, 2))  # type: ignore[arg-type]


def test_the_bundled_models_learn_or_only_copy() -> None:
    """With few episodes; `probe task-split` prints the figures that are reported."""
    pool = synthetic_examples("recognition", n=700, seed=3)
    given = labelled_episodes(pool, shots=8, n=60, seed=3)
    options: dict = {"settings": ("gold", "abstract", "words"), "shots": (0, 8), "symbols": NONCE, "batch_size": 30}
    kept: dict[str, xr.Dataset] = {}

    def keep(name: str, compute):
        return kept[name] if name in kept else kept.setdefault(name, compute())

    done: list[int] = []
    toy = task_split(probe.load("toy"), given, keep=keep, progress=done.append, **options)
    assert done[-1] <= n_readings(60, options["settings"], options["shots"])
    assert len(kept) == 8
    assert "unknown to toy" in toy.attrs["no_words"]
    found = summarise_split(toy)["accuracy"].sel(end="estimate")
    assert float(found.sel(setting="gold", shot=8)) > 0.9
    assert float(found.sel(setting="abstract", shot=8)) > 0.85
    assert float(found.sel(setting="abstract", shot=0)) < 0.6
    control = summarise_split(task_split(probe.load("toy-no-binding"), given, **options))
    assert float(control["accuracy"].sel(setting="gold", shot=8, end="estimate")) > 0.9
    assert float(control["accuracy"].sel(setting="abstract", shot=8, end="estimate")) < 0.6
    assert float(control["wrong_copied"].sel(setting="abstract", shot=8, end="estimate")) > 0.9
