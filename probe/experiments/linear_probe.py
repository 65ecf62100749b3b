"""What can be read linearly from the residual stream: along layers, at a few named positions.

Episodes are read in batches (:mod:`probe.experiments.probe_vectors`), labels come from
:mod:`probe.experiments.probe_targets`, and :mod:`probe.measures.decoding` fits and tests the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probe.data.example import Episode
from probe.data.manifest import content_key
from probe.errors import UsageError
from probe.experiments.answering import check_words, facts
from probe.experiments.probe_targets import Target, default_targets, find_target, groups_of
from probe.experiments.probe_vectors import choose_positions, read_all
from probe.measures.decoding import PENALTY, C, control_labels, decode, lookup, permutation_test
from probe.models.model import Model
from probe.store import Keep, key

GUESSES = ("chance", "majority", "question", "context")
"""Guesses that need no vector: one over the number of labels; the commonest label; the commonest label of the same
question in the training folds; the demonstrations' commonest answer (its share of hits where several are)."""

FEWEST_GROUPS = 2
"""A label that fewer groups of episodes have cannot be both learned and asked; these episodes are left out."""


def linear_probe(
    model: Model,
    episodes: Sequence[Episode],
    *,
    targets: Sequence[str] | None = None,
    positions: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    permutations: int = 199,
    seed: int = 0,
    batch_size: int = 16,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Probe the residual stream for what episodes are about.

    Parameters
    ----------
    model
        From :func:`probe.load`.
    episodes
        Some hundred, each with an id of its own.
    targets
        What to read, as in :mod:`probe.experiments.probe_targets`; default
        :func:`~probe.experiments.probe_targets.default_targets`.
    positions
        Of :data:`~probe.experiments.probe_vectors.POSITIONS`; default all that every episode has.
    layers
        Default all with self-attention.
    folds
        Parts into which groups of episodes are cut; each is judged by a probe fitted on the others.
    permutations
        Of the labels, for the test of each target.
    seed
        Of permutations and control tasks.
    batch_size
        Episodes in one forward.
    keep
        Keeps finished batches and targets.
    progress
        Called with the work done, of :func:`n_steps`.

    Returns
    -------
    xarray.Dataset
        Over (target, position, layer, episode): ``right`` and ``control_right``, whether the probe tells the label, and
        that of the control task, out of fold; NaN where the episode has no label or there is no control task. Over
        (target, position, layer): ``ridge_accuracy``, ``p`` and ``p_family``, as in
        :class:`~probe.measures.decoding.Permutation`. Over (target, guess): ``guess_accuracy`` of each of
        :data:`GUESSES`, NaN where it makes no sense. Over target: ``n_labels``, ``n_groups``, ``n_types``,
        ``n_left_out``, ``about``, ``control``. Over (target, episode): ``label``, ``control_label`` and ``group``, -1
        where the episode is left out.

    Raises
    ------
    UsageError
        If there are no or too few episodes, ids repeat, or a target, a position or a layer is not there.
    ProbeError
        If an image cannot be read, memory runs out, or a vector is not finite.
    """
    if not episodes:
        raise UsageError("There are no episodes to probe.")
    if batch_size < 1 or permutations < 1 or seed < 0:
        raise UsageError(
            "A batch and a test hold one episode and one permutation at least, and a seed is 0 or more; asked for "
            f"{batch_size}, {permutations} and {seed}."
        )
    if len({episode.id for episode in episodes}) != len(episodes):
        raise UsageError("Two episodes have the same id; results could not be told apart.")
    asked = [
        _prepare(find_target(name, episodes), episodes, folds)
        for name in dict.fromkeys(default_targets(episodes) if targets is None else targets)
    ]
    if not asked:
        raise UsageError("There is nothing to read; name at least one target.")
    chosen = choose_positions(model, episodes, positions)
    numbers = model.choose_layers(layers)
    if not numbers:
        raise UsageError(f"The layers of {model.name} that were named have no self-attention; name others.")
    check_words(model, episodes)
    vectors = read_all(model, episodes, chosen, numbers, batch_size, keep, progress)
    work = key({"episodes": content_key(episodes), "positions": chosen, "layers": numbers, "folds": folds})
    parts = []
    for count, target in enumerate(asked, start=2):

        def fit(target: Asked = target) -> xr.Dataset:
            return _probe(vectors, target, episodes, chosen, numbers, folds, permutations, seed)

        name = f"target-{key({'work': work, 'target': target.target.name, 'n': permutations, 'seed': seed})}"
        parts.append(keep(name, fit) if keep else fit())
        if progress:
            progress(count * len(episodes))
    names = [target.target.name for target in asked]
    result = xr.concat(parts, xr.Variable("target", names), data_vars="all", coords="minimal", compat="override")
    result = result.assign_coords(
        query=("episode", [episode.query.id for episode in episodes]),
        shots=("episode", [episode.shots for episode in episodes]),
        seed=("episode", [episode.seed for episode in episodes]),
    )
    result.attrs = {
        **facts(model),
        "experiment": "linear_probe",
        "probe": f"multinomial logistic regression, L2, C = {C:g}, standardised features",
        "tested_probe": f"ridge regression on one-hot labels, penalty {PENALTY:g} for each training episode",
        "folds": folds,
        "permutations": permutations,
        "probe_seed": seed,
        "n_attempted": len(episodes),
        "n_done": len(episodes),
    }
    return result


def n_steps(n_episodes: int, n_targets: int) -> int:
    """What :func:`linear_probe` counts: every episode once when it is read, and once for each target."""
    return n_episodes * (1 + n_targets)


# ----------------------------------------------------------------------------------------------------------- the labels


@dataclass(frozen=True)
class Asked:
    """A target with the episodes that take part in it."""

    target: Target
    places: NDArray[np.intp]
    labels: list[str]
    groups: list[int]


def _prepare(target: Target, episodes: Sequence[Episode], folds: int) -> Asked:
    """Leave out what cannot be both learned and asked; refuse what is too little before anything runs."""
    groups = groups_of(episodes, of_demonstration=target.of_demonstration)
    pairs = {(label, group) for label, group in zip(target.labels, groups, strict=True) if label is not None}
    n_groups = {label: sum(other == label for other, _ in pairs) for label in {label for label, _ in pairs}}
    known = [(i, label) for i, label in enumerate(target.labels) if label is not None]
    places = [i for i, label in known if n_groups[label] >= FEWEST_GROUPS]
    labels = [label for _, label in known if n_groups[label] >= FEWEST_GROUPS]
    within = [groups[place] for place in places]
    if len(set(labels)) < 2 or len(set(within)) < folds or folds < 2:
        raise UsageError(
            f"The target {target.name} has {len(set(labels))} labels that occur in {FEWEST_GROUPS} or more unrelated "
            f"episodes, and {len(set(within))} such episodes; {folds} folds need 2 labels and as many episodes, and a "
            "probe some hundred. Take more episodes, or another target."
        )
    return Asked(target, np.array(places), labels, within)


def _guesses(asked: Asked, episodes: Sequence[Episode], folds: int) -> list[float]:
    """In the order of :data:`GUESSES`."""
    labels = asked.labels
    counts = [labels.count(label) for label in set(labels)]
    questions = [episodes[place].query.question for place in asked.places]
    by_question = np.nan
    if len(set(questions)) > 1:
        by_question = float(lookup(questions, labels, asked.groups, folds=folds).mean())
    shown = [[example.answer for example in episodes[place].demonstrations] for place in asked.places]
    in_context = np.nan
    if asked.target.in_context and all(shown):
        in_context = float(np.mean([_commonest(x, label) for x, label in zip(shown, labels, strict=True)]))
    return [1 / len(counts), max(counts) / len(labels), by_question, in_context]


def _commonest(shown: Sequence[str], label: str) -> float:
    """How often the commonest of the answers is the label, where equally common ones are drawn."""
    counts = {answer: shown.count(answer) for answer in shown}
    commonest = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (label in commonest) / len(commonest)


# ----------------------------------------------------------------------------------------------------------- the probes


def _probe(
    vectors: NDArray[np.float32],
    asked: Asked,
    episodes: Sequence[Episode],
    positions: Sequence[str],
    layers: Sequence[int],
    folds: int,
    permutations: int,
    seed: int,
) -> xr.Dataset:
    """One target at all sites."""
    target, grid = asked.target, (len(positions), len(layers))
    sites = vectors[asked.places].transpose(2, 1, 0, 3).reshape(-1, len(asked.places), vectors.shape[-1])
    control = None
    if target.types is not None:
        control = control_labels([target.types[place] for place in asked.places], asked.labels, seed=seed)
    test = permutation_test(sites, asked.labels, asked.groups, folds=folds, permutations=permutations, seed=seed)

    def spread(labels: list[str] | None) -> NDArray[np.float32]:
        full = np.full((*grid, len(episodes)), np.nan, dtype=np.float32)
        if labels is not None:
            full[..., asked.places] = decode(sites, labels, asked.groups, folds=folds).reshape(*grid, -1)
        return full

    def named(labels: list[str] | None) -> NDArray[np.str_]:
        by_place = dict(zip(asked.places.tolist(), labels or [""] * len(asked.places), strict=True))
        return np.array([by_place.get(place, "") for place in range(len(episodes))], dtype=str)

    grouped = np.full(len(episodes), -1, dtype=np.int64)
    grouped[asked.places] = asked.groups
    site = ("position", "layer")
    types: set[Hashable] = set() if control is None else {(target.types or [])[place] for place in asked.places}
    return xr.Dataset(
        {
            "right": ((*site, "episode"), spread(asked.labels)),
            "control_right": ((*site, "episode"), spread(control)),
            "ridge_accuracy": (site, test.accuracy.reshape(grid)),
            "p": (site, test.p.reshape(grid)),
            "p_family": (site, test.p_family.reshape(grid)),
            "guess_accuracy": ("guess", _guesses(asked, episodes, folds)),
            "label": ("episode", named(asked.labels)),
            "control_label": ("episode", named(control)),
            "group": ("episode", grouped),
            "n_labels": len(set(asked.labels)),
            "n_groups": len(set(asked.groups)),
            "n_types": len(types),
            "n_left_out": len(episodes) - len(asked.places),
            "about": target.about,
            "control": target.control,
        },
        coords={
            "position": list(positions),
            "layer": list(layers),
            "episode": [episode.id for episode in episodes],
            "guess": list(GUESSES),
        },
    )
