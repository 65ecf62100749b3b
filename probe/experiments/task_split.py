"""Task recognition against task learning: what demonstrations tell when their labels are right, random, or symbols.

Demonstrations can help in two ways. They tell which task it is (its input, its labels, its format), and a model that
knows the task already needs no more: task *recognition*, TR. Or they teach which label belongs to which input: task
*learning*, TL. Changing the labels tells the two apart (Pan et al., Findings of ACL 2023):

============ ================================================ ============================ ==========================
setting      the demonstrations' labels                       right is                     measures
============ ================================================ ============================ ==========================
``gold``     right                                            the true label               TR and TL together
``random``   each drawn from the label set                    the true label               TR
``abstract`` symbols, a bijection for each episode            the true label's symbol      TL
``flipped``  exchanged, the same for the whole episode        what the true label became   TL against what is known
``words``    none; the question states the symbols in words   the true label's symbol      whether symbols can be used
============ ================================================ ============================ ==========================

The model chooses among the label set, by the sum of log p over the tokens, and also answers freely. An accuracy is
compared with the best of three guesses that need no input: chance, the label that is commonest in the pool, and the
label that is commonest among the demonstrations. The *TR ratio* is how often the free answer is one of the labels at
all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import xarray as xr

from probe.data.changes import SYMBOLS
from probe.data.example import Episode
from probe.data.perturb import perturb
from probe.errors import UsageError, did_you_mean
from probe.experiments.answering import answering, check_words, label_set
from probe.models.model import Model
from probe.scoring import exact_match
from probe.store import Keep

SETTINGS: dict[str, tuple[str, ...]] = {
    "gold": (),
    "random": ("random-labels",),
    "abstract": ("abstract-labels",),
    "flipped": ("flipped-labels",),
    "words": ("stated-labels",),
}
"""What each setting does to an episode, by :func:`probe.perturb`."""

SHOTS = (0, 1, 2, 4, 8, 16)


def task_split(
    model: Model,
    episodes: Sequence[Episode],
    *,
    settings: Sequence[str] = tuple(SETTINGS),
    shots: Sequence[int] = SHOTS,
    symbols: Sequence[str] = SYMBOLS,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Measure recognition and learning of the same episodes, by setting and shots.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        With closed label sets and as many demonstrations as the largest of ``shots``, as
        :func:`~probe.data.groups.labelled_episodes` makes them. With fewer shots, the first ones are shown.
    settings
        Of :data:`SETTINGS`; ``words`` is read without demonstrations only.
    shots
        Numbers of demonstrations.
    symbols
        Of ``abstract`` and ``words``; the model should read each as one token.
    seed
        Of all changes of labels.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches.
    progress
        Called with the number of episodes read, of :func:`n_readings`.

    Returns
    -------
    xarray.Dataset
        Over (setting, shot, episode), NaN where ``words`` has demonstrations: ``chosen`` (the most probable label is
        the right one), ``chosen_normalised`` (the same by the mean over tokens), ``generated`` (the free answer is the
        right one), ``in_labels`` (it is one of the labels), ``in_context`` (it is a demonstration's answer),
        ``shared_first_token`` (two labels begin alike), and of the
        three guesses whether they are right: ``chance``, ``prior``, ``majority`` (shares, where several are
        commonest). Texts are ``prediction``, ``choice`` and ``right``. Coordinates ``seed`` and ``group`` of the
        episodes. Where the model does not know the words of the setting ``words``, that is missing too, and the
        attribute ``no_words`` says why.

    Raises
    ------
    UsageError
        If an episode has no label set or too few demonstrations, a setting is unknown, or numbers do not fit.
    """
    chosen = list(dict.fromkeys(settings))
    for name in chosen:
        if name not in SETTINGS:
            raise UsageError(f"There is no setting {name!r}; {did_you_mean(name, tuple(SETTINGS))}")
    numbers = sorted(set(shots))
    _check(episodes, numbers)
    _check_symbols(model, episodes, chosen, symbols, seed)
    cells: dict[tuple[str, int], xr.Dataset] = {}
    attrs: dict[str, object] = {}
    done = 0
    for name in chosen:
        for number in numbers if name != "words" else [0]:
            cut = [replace(episode, demonstrations=episode.demonstrations[:number]) for episode in episodes]
            changed = perturb(cut, SETTINGS[name], seed=seed, symbols=symbols)
            if name == "words" and (problem := _unreadable(model, changed)):
                attrs["no_words"] = problem
                done += len(episodes)
                continue

            def onward(now: int, before: int = done) -> None:
                if progress:
                    progress(before + now)

            answers = answering(
                model,
                changed,
                probable="labels",
                batch_size=batch_size,
                keep=keep,
                name=f"{name}-{number}-",
                progress=onward,
            )
            attrs |= answers.attrs
            cells[name, number] = _judge(name, answers, changed)
            done += len(episodes)
    result = _stack(cells, chosen, sorted({number for _, number in cells}), episodes)
    result.attrs = {
        **attrs,
        "experiment": "task_split",
        "symbols": list(symbols),
        "labels_seed": seed,
        "n_attempted": len(episodes),
        "n_done": len(episodes),
    }
    return result


def n_readings(n_episodes: int, settings: Sequence[str], shots: Sequence[int]) -> int:
    """How many episodes :func:`task_split` reads."""
    return n_episodes * sum(1 if name == "words" else len(set(shots)) for name in dict.fromkeys(settings))


def _check_symbols(
    model: Model, episodes: Sequence[Episode], settings: Sequence[str], symbols: Sequence[str], seed: int
) -> None:
    """Refuse symbols that the model does not know before anything is read."""
    if "abstract" in settings:
        try:
            check_words(model, perturb(episodes, SETTINGS["abstract"], seed=seed, symbols=symbols))
        except UsageError as error:
            raise UsageError(f"{error} Or give symbols that it knows (--symbols).") from error


def _unreadable(model: Model, episodes: Sequence[Episode]) -> str:
    """Why a model cannot be told symbols in words; empty if it can. A small vocabulary is no reason to read nothing."""
    try:
        check_words(model, episodes)
    except UsageError as error:
        return str(error)
    return ""


def _check(episodes: Sequence[Episode], shots: Sequence[int]) -> None:
    if not episodes:
        raise UsageError("There are no episodes to read.")
    if not shots or shots[0] < 0:
        raise UsageError(f"Numbers of shots are 0 or more, and one at least; got {list(shots)}.")
    for episode in episodes:
        label_set(episode)
        if episode.shots < shots[-1]:
            raise UsageError(
                f"Episode {episode.id} has {episode.shots} demonstrations, but {shots[-1]} shots are asked for; make "
                "episodes with as many."
            )


def _judge(setting: str, answers: xr.Dataset, changed: Sequence[Episode]) -> xr.Dataset:
    """One setting at one number of shots."""
    right = [episode.query.answer for episode in changed]
    labels = [label_set(episode) for episode in changed]
    said = answers["prediction"].values.tolist()
    shown = [[example.answer for example in episode.demonstrations] for episode in changed]
    # The label that is commonest in the pool stands first in its set. What it was exchanged for, nobody knows who has
    # not learned it.
    known = setting in ("gold", "random", "words")
    prior = [float(of[0] == x) if known else 1 / len(of) for of, x in zip(labels, right, strict=True)]
    values = {
        "chosen": [c == x for c, x in zip(answers["choice"].values.tolist(), right, strict=True)],
        "chosen_normalised": [c == x for c, x in zip(answers["choice_normalised"].values.tolist(), right, strict=True)],
        "generated": [exact_match(y, [x]) for y, x in zip(said, right, strict=True)],
        "in_labels": [exact_match(y, of) for y, of in zip(said, labels, strict=True)],
        "in_context": [exact_match(y, of) for y, of in zip(said, shown, strict=True)],
        "shared_first_token": answers["shared_first_token"].values,
        "chance": [1 / len(of) for of in labels],
        "prior": prior,
        "majority": [_majority(of, x, len(every)) for of, x, every in zip(shown, right, labels, strict=True)],
    }
    texts = {"prediction": said, "choice": answers["choice"].values.tolist(), "right": right}
    return xr.Dataset(
        {
            **{name: ("episode", np.array(column, dtype=np.float64)) for name, column in values.items()},
            **{name: ("episode", np.array(column, dtype=str)) for name, column in texts.items()},
        }
    )


def _majority(shown: Sequence[str], right: str, n_labels: int) -> float:
    """How often the commonest label in context is right, where equally common ones are drawn; without any, chance."""
    if not shown:
        return 1 / n_labels
    counts = Counter(shown)
    commonest = [label for label, count in counts.items() if count == max(counts.values())]
    return (right in commonest) / len(commonest)


def _stack(
    cells: dict[tuple[str, int], xr.Dataset], settings: Sequence[str], shots: Sequence[int], episodes: Sequence[Episode]
) -> xr.Dataset:
    example = next(iter(cells.values()))
    n = len(episodes)
    variables = {}
    for name, column in example.items():
        missing = np.full(n, np.nan) if column.dtype.kind == "f" else np.full(n, "", dtype="U1")
        rows = [[cells[s, k][name].values if (s, k) in cells else missing for k in shots] for s in settings]
        variables[name] = (("setting", "shot", "episode"), np.array(rows))
    return xr.Dataset(
        variables,
        coords={
            "setting": list(settings),
            "shot": list(shots),
            "episode": [episode.id for episode in episodes],
            "query": ("episode", [episode.query.id for episode in episodes]),
            "seed": ("episode", [episode.seed for episode in episodes]),
            "group": ("episode", [str(episode.info.get("group", "")) for episode in episodes]),
        },
    )
