"""What can be read linearly from vectors: probes, their control tasks, and a permutation test.

A *probe* is a multinomial logistic regression on standardised features, with scikit-learn's penalty of C = 1 and
nothing tuned. It is fitted on some episodes and judged on others: folds are cut by *group*, so that what belongs
together (the same example, asked twice) never stands on both sides, and the scale of the features is learned within the
fold. Every episode is judged once, out of fold, by a probe that has seen no episode of its group.

High accuracy alone does not say that the features hold the label: a probe may memorise. Hewitt and Liang's *control
task* asks the same probe for labels that are a fixed random function of the input's type (:func:`control_labels`);
*selectivity* is the accuracy minus that on the control task.

:func:`permutation_test` asks whether there is anything to read at all. Its probe is one that can be fitted a thousand
times: a ridge regression on one-hot labels, on the same folds. Its predictions are linear in the labels, so that
permuted labels cost a matrix product each and every permutation is a full refit. Labels are exchanged between groups,
never within one, and the largest accuracy of all sites is compared with the largest of all sites, which holds the
error over the whole search.

References
----------
Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (EMNLP 2019, arXiv 1909.03368), sections 2 and
3. Ojala and Garriga, "Permutation Tests for Studying Classifier Performance" (JMLR 11, 2010), test 1. Westfall and
Young, "Resampling-Based Multiple Testing" (1993), the single-step maximum.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from probe.errors import UsageError

C = 1.0
"""Inverse strength of the probe's penalty, scikit-learn's default; features are standardised."""

MAX_ITERATIONS = 2000

PENALTY = 0.1
"""Of the permutation test's ridge regression, for each episode of the training folds."""

CHUNK = 4_000_000
"""Numbers of permuted one-hot labels held at a time."""

Fold = tuple[NDArray[np.intp], NDArray[np.intp]]


def grouped_folds(groups: Sequence[Hashable], folds: int) -> list[Fold]:
    """Training and test episodes of each fold; a group is never on both sides.

    Raises
    ------
    UsageError
        If there are fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    codes = _codes(groups)
    n_groups = len(set(codes.tolist()))
    if folds < 2 or n_groups < folds:
        raise UsageError(
            f"{n_groups} groups of episodes cannot make {folds} folds; take 2 folds or more, and more episodes."
        )
    # Groups of one size are dealt in turn: in the order of the data, labels that recur would fall into one fold.
    mixed = np.random.default_rng(0).permutation(n_groups)[codes]
    return [(train, test) for train, test in GroupKFold(folds).split(codes, groups=mixed)]


def decode(
    features: Float[np.ndarray, "site episode width"],
    labels: Sequence[str],
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
) -> Float[np.ndarray, "site episode"]:
    """Whether a probe that never saw an episode's group tells the episode's label, by site.

    Parameters
    ----------
    features
        What stands at each site (a layer and a position).
    labels
        Of each episode.
    groups
        What each episode belongs to.
    folds
        How many parts the groups are cut into; each is judged by a probe fitted on the others.

    Returns
    -------
    ndarray
        1 right, 0 wrong.

    Raises
    ------
    UsageError
        If there are fewer groups than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    codes = _codes(labels)
    cut = grouped_folds(groups, folds)
    right = np.zeros(features.shape[:2], dtype=np.float32)
    for site, vectors in enumerate(features):
        x = vectors.astype(np.float64)
        for train, test in cut:
            if len(set(codes[train].tolist())) == 1:  # which is no task for a regression
                predicted = np.full(len(test), codes[train][0])
            else:
                regression = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITERATIONS))
                predicted = regression.fit(x[train], codes[train]).predict(x[test])
            right[site, test] = predicted == codes[test]
    return right


def control_labels(types: Sequence[Hashable], labels: Sequence[str], *, seed: int = 0) -> list[str]:
    """Labels of a control task: every type gets one at random, in the proportions of the true labels.

    Hewitt and Liang draw each type's label by itself. With few types that leaves some labels much commoner than others,
    and guessing easier than in the task that is compared; so labels are dealt to the types instead.

    Parameters
    ----------
    types
        Of each episode: a property of its input that recurs in other episodes.
    labels
        Of each episode.
    seed
        Of the random function, in which the order of the episodes plays no part.

    Returns
    -------
    list of str
        The same for episodes of the same type. If there is more than one type and more than one label, two at least.
    """
    distinct = sorted(set(types), key=repr)
    pool = sorted(labels)
    dealt = [pool[(2 * place + 1) * len(pool) // (2 * len(distinct))] for place in range(len(distinct))]
    if len(set(dealt)) == 1 and len(dealt) > 1:
        dealt[0] = next((label for label in pool if label != dealt[0]), dealt[0])
    order = np.random.default_rng(seed).permutation(len(distinct)).tolist()
    given = {kind: dealt[place] for kind, place in zip(distinct, order, strict=True)}
    return [given[kind] for kind in types]


def lookup(
    keys: Sequence[Hashable], labels: Sequence[str], groups: Sequence[Hashable], *, folds: int = 5
) -> Float[np.ndarray, "episode"]:
    """Whether the commonest label of the training episodes with the same key is right: what a table could guess.

    A key that the training episodes lack gets their commonest label.
    """
    right = np.zeros(len(labels), dtype=np.float32)
    for train, test in grouped_folds(groups, folds):
        table: dict[Hashable, Counter[str]] = defaultdict(Counter)
        for place in train:
            table[keys[place]][labels[place]] += 1
        overall = Counter(labels[place] for place in train)
        for place in test:
            guess = table.get(keys[place], overall).most_common(1)[0][0]
            right[place] = guess == labels[place]
    return right


@dataclass(frozen=True)
class Permutation:
    """Whether there is anything to read, by site.

    Attributes
    ----------
    accuracy
        ``[site]``, out-of-fold accuracy of the ridge probe: what is tested.
    p
        ``[site]``, ``(1 + #{permutations at least as accurate}) / (1 + permutations)``.
    p_family
        ``[site]``, the same against the most accurate site of each permutation.
    highest
        ``[permutation]``, the accuracy of that site.
    """

    accuracy: Float[np.ndarray, "site"]
    p: Float[np.ndarray, "site"]
    p_family: Float[np.ndarray, "site"]
    highest: Float[np.ndarray, "permutation"]


def permutation_test(
    features: Float[np.ndarray, "site episode width"],
    labels: Sequence[str],
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    permutations: int = 199,
    seed: int = 0,
) -> Permutation:
    """Test at every site whether the features tell anything of the labels.

    Parameters
    ----------
    features, labels, groups, folds
        As in :func:`decode`.
    permutations
        How often labels are exchanged between groups; the same ones at all sites.
    seed
        Of the permutations.

    Returns
    -------
    Permutation
    """
    codes = _codes(labels)
    cut = grouped_folds(groups, folds)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([codes, *(permute_groups(codes, groups, rng) for _ in range(permutations))])
    accuracy = np.stack([_accuracies(vectors.astype(np.float64), shuffled, cut) for vectors in features])
    observed, null = accuracy[:, 0], accuracy[:, 1:]
    highest = null.max(0)
    return Permutation(
        observed,
        (1 + (null >= observed[:, None]).sum(1)) / (1 + permutations),
        (1 + (highest >= observed[:, None]).sum(1)) / (1 + permutations),
        highest,
    )


def permute_groups(
    codes: Int[np.ndarray, "episode"], groups: Sequence[Hashable], rng: np.random.Generator
) -> Int[np.ndarray, "episode"]:
    """Exchange whole groups' labels with those of other groups of the same size.

    A group without another of its size keeps its labels: nothing is exchangeable with it.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    by_size: dict[int, list[list[int]]] = defaultdict(list)
    for places in members.values():
        by_size[len(places)].append(places)
    permuted = codes.copy()
    for alike in by_size.values():
        blocks = np.array(alike)
        permuted[blocks] = codes[blocks[rng.permutation(len(blocks))]]
    return permuted


def _accuracies(
    x: Float[np.ndarray, "episode width"], codes: Int[np.ndarray, "draw episode"], cut: Sequence[Fold]
) -> Float[np.ndarray, "draw"]:
    """Out-of-fold accuracy of the ridge probe for each draw of labels."""
    smoother = _smoother(x, cut)
    n, n_labels = len(x), int(codes.max()) + 1
    step = max(1, CHUNK // (n * n_labels))
    found = []
    for start in range(0, len(codes), step):
        part = codes[start : start + step]
        one_hot = (part.T[:, :, None] == np.arange(n_labels)).reshape(n, -1)
        scores = (smoother @ one_hot.astype(np.float32)).reshape(n, len(part), n_labels)
        found.append((scores.argmax(2) == part.T).mean(0))
    return np.concatenate(found)


def _smoother(x: Float[np.ndarray, "episode width"], cut: Sequence[Fold]) -> Float[np.ndarray, "episode episode"]:
    """The matrix S of ``scores = S Y``: each row predicts an episode from the labels of its training episodes."""
    from sklearn.preprocessing import StandardScaler

    smoother = np.zeros((len(x), len(x)), dtype=np.float32)
    for train, test in cut:
        scaler = StandardScaler().fit(x[train])
        fitted, judged = scaler.transform(x[train]), scaler.transform(x[test])
        penalty = PENALTY * len(train)
        if fitted.shape[1] <= len(train):
            inverse = np.linalg.solve(fitted.T @ fitted + penalty * np.eye(fitted.shape[1]), fitted.T)
            weights = judged @ inverse
        else:  # the same by the Gram matrix, which is the smaller one
            weights = np.linalg.solve(fitted @ fitted.T + penalty * np.eye(len(train)), fitted @ judged.T).T
        # The intercept is the mean of the labels, which the weights see subtracted.
        smoother[np.ix_(test, train)] = weights - weights.mean(1, keepdims=True) + 1 / len(train)
    return smoother


def _codes(values: Sequence[Hashable]) -> NDArray[np.intp]:
    """Numbers in place of values, in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.intp)
