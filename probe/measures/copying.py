"""Whether a model answered what a demonstration answers: pure functions of texts.

For a query q with the prediction y, the demonstrations' answers a_1 … a_k and the accepted answers G, all compared by
:func:`probe.scoring.answer_key`, with S = {a_1 … a_k}:

- *copied*: y in S. Its mean is the copy rate, CR.
- *gold shown*: G meets S. Copying is then no mistake, and being right looks like copying.
- *harmful*: y in S and y not in G: copying that being right cannot explain.
- *place*: the demonstration j with y = a_j, where there is only one.
- *null*: the share of the other queries whose S has y, of those whose demonstrations do not show q itself. The mean of
  copied − null is the excess copy rate. It is a null model where demonstrations are drawn at random and nowhere else:
  where they are retrieved, they share the query's answer because they are like it.
- *majority*: the commonest answer among the demonstrations, of several that of the last one: what a model that did
  nothing but vote would say.

The copy rate is that of "How to Configure Good In-Context Sequence for Visual Question Answering" (Li et al., CVPR
2024), whose formula is not public: this is the direct reading, over all queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.scoring import answer_key

NOWHERE = -1
"""The place of an answer that no demonstration gives, or more than one."""


@dataclass(frozen=True)
class Copying:
    """One entry for each query.

    Attributes
    ----------
    copied, gold_shown, harmful, right
        ``[query]``, booleans; ``right`` is y in G.
    place
        ``[query]``, the copied demonstration or :data:`NOWHERE`.
    null
        ``[query]``, in [0, 1]; NaN if there is no other query.
    majority
        The answer of the vote, as it is written; empty without demonstrations.
    """

    copied: NDArray[np.bool_]
    gold_shown: NDArray[np.bool_]
    harmful: NDArray[np.bool_]
    right: NDArray[np.bool_]
    place: NDArray[np.int64]
    null: NDArray[np.float64]
    majority: list[str]


def copying(
    predictions: Sequence[str],
    demonstrations: Sequence[Sequence[str]],
    accepted: Sequence[Sequence[str]],
    shows: Sequence[Collection[int]] | None = None,
) -> Copying:
    """Compare predictions with the demonstrations' answers.

    Parameters
    ----------
    predictions
        What the model answered to each query.
    demonstrations
        For each query, the answers that its demonstrations show, in the order in which they are read.
    accepted
        For each query, the answers that are right.
    shows
        For each query, which of the queries its demonstrations show, if they are from one pool. A query is never its
        own demonstration, so sets that show it are no fair comparison: they hold its answer because of it.

    Returns
    -------
    Copying
    """
    said = [answer_key(text) for text in predictions]
    shown = [[answer_key(text) for text in answers] for answers in demonstrations]
    gold = [{answer_key(text) for text in answers} for answers in accepted]
    copied = np.array([y in s for y, s in zip(said, shown, strict=True)], dtype=bool)
    right = np.array([y in g for y, g in zip(said, gold, strict=True)], dtype=bool)
    return Copying(
        copied=copied,
        gold_shown=np.array([not g.isdisjoint(s) for g, s in zip(gold, shown, strict=True)], dtype=bool),
        harmful=copied & ~right,
        right=right,
        place=np.array(
            [s.index(y) if s.count(y) == 1 else NOWHERE for y, s in zip(said, shown, strict=True)], dtype=np.int64
        ),
        null=_null(said, shown, shows or [()] * len(said)),
        majority=[_vote(keys, texts) for keys, texts in zip(shown, demonstrations, strict=True)],
    )


def _null(said: Sequence[str], shown: Sequence[Sequence[str]], shows: Sequence[Collection[int]]) -> NDArray[np.float64]:
    """Share of the other queries' sets that have each prediction, of those that do not show the query itself."""
    having = Counter(key for answers in shown for key in set(answers))
    showing: dict[int, set[int]] = {}
    for place, queries in enumerate(shows):
        for query in queries:
            showing.setdefault(query, set()).add(place)
    null = np.full(len(said), np.nan)
    for query, y in enumerate(said):
        left_out = {query} | showing.get(query, set())
        if len(left_out) < len(said):
            null[query] = (having[y] - sum(y in shown[place] for place in left_out)) / (len(said) - len(left_out))
    return null


def _vote(keys: Sequence[str], texts: Sequence[str]) -> str:
    if not keys:
        return ""
    counts = Counter(keys)
    most = max(counts.values())
    return next(text for key, text in zip(reversed(keys), reversed(texts), strict=True) if counts[key] == most)
